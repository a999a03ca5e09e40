"""Linear layers of a token or two: the same numbers, and nothing that listens is passed by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from olmo_core.nn.feed_forward import FeedForward
from olmo_core.nn.linear import apply_linear, linear

BLOCKS = "aten::bmm"


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def ops_of(run, *args) -> tuple[Tensor, set[str]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = run(*args)
    return out, {event.key for event in profile.key_averages()}


@settings(deadline=None, max_examples=40)
@given(
    rows=st.sampled_from([(), (1,), (2,), (1, 1), (2, 1), (1, 2), (3,)]),
    outputs=st.sampled_from([8, 24, 64, 100, 192, 257, 1000]),
    inputs=st.sampled_from([1, 33, 64, 577, 1536]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_numbers_are_those_of_a_linear_layer(rows, outputs, inputs, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*rows, inputs)
    with torch.no_grad():
        want = layer.double()(x.double())
        layer.float()
        got, plain = apply_linear(layer, x), layer(x)
    assert got.shape == plain.shape and got.dtype == plain.dtype
    assert got.stride() == plain.stride()  # so that view() does what it does of a layer's
    assert relative_error(got, want) <= 3 * relative_error(plain, want) + 1e-7


@pytest.mark.skipif(not torch._C.has_mkl, reason="blocks are for MKL")
def test_few_rows_of_a_large_matrix_go_in_blocks_and_nothing_else_does():
    layer = nn.Linear(576, 192, bias=False)
    one = torch.randn(1, 1, 576)
    with torch.no_grad():
        assert BLOCKS in ops_of(apply_linear, layer, one)[1]
        assert BLOCKS in ops_of(linear, one[:, ::1].expand(2, 1, 576), layer.weight)[1]
        for x, weight in (
            (torch.randn(3, 576), layer.weight),
            (torch.randn(0, 576), layer.weight),
            (one, torch.randn(193, 576)),  # no blocks
            (one, torch.randn(576, 192).t()),
            (one.double(), torch.randn(192, 576, dtype=torch.float64)),
            (torch.randn(64), torch.randn(64, 64)),
        ):
            assert BLOCKS not in ops_of(linear, x, weight)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, ops = ops_of(apply_linear, layer, one)
        assert out.dtype == torch.bfloat16 and BLOCKS not in ops
    assert apply_linear(layer, one).requires_grad


@pytest.mark.parametrize(
    ("rows", "bias"),
    [
        ((), torch.ones(192, dtype=torch.float64)),  # the sum would be of float64
        ((), torch.ones(192, dtype=torch.bfloat16)),
        ((), torch.ones(192, device="meta")),
        ((2,), torch.ones(5, 2, 192)),
        ((2,), torch.ones(2, 192)),
    ],
)
def test_a_bias_is_taken_or_refused_as_a_linear_layer_does(rows, bias):
    x, weight = torch.randn(*rows, 576), torch.randn(192, 576)
    layer = nn.Linear(576, 192)
    layer.bias = nn.Parameter(bias)
    with torch.no_grad():
        try:
            want = nn.functional.linear(x, weight, bias)
        except RuntimeError as error:
            for run in (lambda: linear(x, weight, bias), lambda: apply_linear(layer, x)):
                with pytest.raises(RuntimeError) as caught:
                    run()
                assert str(caught.value) == str(error)
        else:
            torch.testing.assert_close(linear(x, weight, bias), want)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.randn(2, 576).to_sparse()])
def test_what_is_no_rows_of_a_plain_tensor_goes_to_torch(x):
    weight = torch.randn(192, 576)
    with torch.no_grad():
        if x.dim():
            want = x.to_dense().double() @ weight.double().t()
            assert relative_error(linear(x, weight), want) < 1e-6
        else:
            with pytest.raises(RuntimeError, match="at least 1D"):
                linear(x, weight)


def test_it_is_a_view_of_the_matrix():
    weight = torch.randn(49152, 64)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        linear(torch.randn(1, 1, 64), weight)
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert largest <= 49152 * 4 + 4096


def hooked(layer: nn.Linear, calls: list) -> None:
    layer.register_forward_hook(lambda *_: calls.append(1))


def with_pre_hook(layer: nn.Linear, calls: list) -> None:
    layer.register_forward_pre_hook(lambda *_: calls.append(1))


def with_own_forward(layer: nn.Linear, calls: list) -> None:
    forward = layer.forward
    layer.forward = lambda x: (calls.append(1), forward(x))[1]  # type: ignore[method-assign]


def as_a_subclass(layer: nn.Linear, calls: list) -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    layer.__class__ = Mine


@pytest.mark.parametrize("listen", [hooked, with_pre_hook, with_own_forward, as_a_subclass])
@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_a_layer_that_somebody_listens_to_is_called(listen, name):
    layer, calls = FeedForward(d_model=256, hidden_size=256), []
    listen(getattr(layer, name), calls)
    with torch.no_grad():
        layer(torch.randn(1, 1, 256))
    assert calls == [1]


def test_modes_transforms_and_subclasses_see_one_linear():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = nn.Linear(256, 256, bias=False), torch.randn(1, 256)
    with torch.no_grad(), Watch():
        apply_linear(layer, x)
    assert not any("bmm" in name for name in seen)
    with torch.no_grad():
        rows = torch.vmap(lambda row: apply_linear(layer, row))(torch.randn(5, 256))
    assert rows.shape == (5, 256)
    _, tangent = torch.func.jvp(lambda y: linear(y, layer.weight.detach()), (x,), (x,))
    torch.testing.assert_close(tangent, x @ layer.weight.detach().t())
