"""The short convolution against ``torch.nn.functional.conv1d`` in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.kernels.convolution import torch_form
from olmo_core.nn.convolution import CausalConv1d, causal_conv1d


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: list[int] | None, silu: bool
) -> Tensor:
    """Each document by itself, by torch's own convolution."""
    batch, tokens, channels = x.shape
    past = weight.shape[-1] - 1
    documents = [tokens] * batch if lengths is None else lengths
    outs = []
    for piece in x.reshape(1, batch * tokens, channels).split(documents, 1):
        padded = F.pad(piece.transpose(1, 2), (past, 0))
        if piece.shape[1]:
            outs.append(F.conv1d(padded, weight, bias, groups=channels).transpose(1, 2))
    out = torch.cat(outs, 1).view(x.shape)
    return F.silu(out) if silu else out


def make(batch: int, tokens: int, channels: int, size: int, bias: bool) -> list[Tensor]:
    shapes = [(batch, tokens, channels), (channels, 1, size)] + [(channels,)] * bias
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


def assert_same(got: Tensor, want: Tensor, inputs: list[Tensor], atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(want, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    size=st.integers(1, 5),
    bias=st.booleans(),
    silu=st.booleans(),
    ends=st.none() | st.lists(st.integers(0, 1000), max_size=10),
)
def test_equals_torch(
    batch: int, tokens: int, size: int, bias: bool, silu: bool, ends: list[int] | None
) -> None:
    inputs = make(batch, tokens, 3, size, bias)
    x, weight, b = (*inputs, None)[:3]
    total, lengths, cu = batch * tokens, None, None
    if ends is not None:
        stops = [0, *sorted(e % (total + 1) for e in ends), total]
        lengths = [b - a for a, b in itertools.pairwise(stops)]
        cu = torch.tensor(stops, dtype=torch.int32)
    want = reference(x, weight, b, lengths, silu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_form, "_CPU_BLOCK", 1)  # 16 tokens: several blocks
        got = causal_conv1d(x, weight, b, cu_doc_lens=cu, silu=silu)
        assert_same(got, want, inputs)


@pytest.mark.parametrize("documents", [False, True])
def test_compiled_equals_eager(documents: bool) -> None:
    inputs = make(2, 9, 3, 4, True)
    cu = torch.tensor([0, 1, 3, 3, 12, 18], dtype=torch.int32) if documents else None
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs, cu_doc_lens=cu), causal_conv1d(*inputs, cu_doc_lens=cu), inputs)


def test_gradcheck_and_no_second_derivative() -> None:
    inputs = make(2, 5, 2, 3, True)
    cu = torch.tensor([0, 1, 4, 10], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d(*x, cu_doc_lens=cu), inputs)
    (grad,) = torch.autograd.grad(causal_conv1d(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_state_continues(size: int) -> None:
    conv = CausalConv1d(3, size, bias=True, dtype=torch.float64)
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    whole = conv(x)
    past = torch.zeros(2, size - 1, 3, dtype=torch.float64)
    outs = []
    for piece in x.split([5, 1, 1, 3, 2], 1):
        outs.append(conv(piece, state=past))
        past = torch.cat((past, piece), 1)[:, piece.shape[1] :]
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("first", [0, 1, 7])
def test_the_first_document_continues_a_state(first: int, backend: str | None) -> None:
    conv = CausalConv1d(3, 4, bias=True, dtype=torch.float64)
    x, state = (torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (12, 3))
    cu = torch.tensor([0, first, 9, 12], dtype=torch.int32)

    def run(x: Tensor, state: Tensor) -> Tensor:
        return conv(x.view(2, 6, 3), cu, state=state[None]).view(12, 3)

    if backend is not None:
        run = torch.compile(run, fullgraph=True, backend=backend)
    got = run(x, state)
    head = conv(torch.cat((state, x[:first]))[None])[0, 3:]
    want = torch.cat((head, *(conv(part[None])[0] for part in (x[first:9], x[9:]) if len(part))))
    assert_same(got, want, [x, state])


def test_gradients_flow_through_the_state() -> None:
    conv = CausalConv1d(3, 4, dtype=torch.float64)
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(conv(x)[:, 5:].sum(), x)
    (got,) = torch.autograd.grad(conv(x[:, 5:], state=x[:, 2:5]).sum(), x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    x, weight = (t.detach().to(dtype) for t in make(2, 30, 4, 4, False))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got = causal_conv1d(*leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = causal_conv1d(*exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=1e-7)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(want.sum(), exact),
        strict=True,
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=1e-6)


def test_strided_input() -> None:
    fused = torch.randn(2, 20, 12, dtype=torch.float64)
    conv = CausalConv1d(4, 4, dtype=torch.float64)
    part = fused[..., 4:8]
    torch.testing.assert_close(conv(part), conv(part.clone()), rtol=0, atol=0)


def test_without_activation_it_is_linear() -> None:
    conv = CausalConv1d(4, 3, activation=None, dtype=torch.float64)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(conv(2 * x), 2 * conv(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive int"),
        ({"kernel_size": 0}, "kernel_size must be a positive int"),
        ({"kernel_size": 2.0}, "kernel_size must be a positive int"),
        ({"activation": "relu"}, "'silu' or None"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        CausalConv1d(**{"hidden_size": 3, "kernel_size": 4, **options})


def test_bad_calls() -> None:
    conv = CausalConv1d(3, 4)
    x = torch.zeros(2, 5, 3)
    cu = torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="Expected an input"):
        conv(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="Expected an input"):
        conv(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="the 3 inputs before x"):
        conv(x, state=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"of shape \(1, 3, 3\)"):
        conv(x, cu, state=torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="must end at"):
        conv(x, cu[:1].new_tensor([0, 9]))
