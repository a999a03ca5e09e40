"""The chunked gated delta rule against its recurrence in float64, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.nn.attention.kernels.gated_delta_rule import (
    chunks,
    gated_delta_rule,
    gated_delta_rule_step_,
)
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

NAMES = ("out", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial")


def make(
    batch: int = 1,
    tokens: int = 100,
    key_heads: int = 2,
    group: int = 1,
    key_dim: int = 16,
    value_dim: int = 24,
    states: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = key_heads * group
    return {
        "q": randn(batch, tokens, key_heads, key_dim),
        # Of unit length: the rule diverges where beta * |k|^2 > 2.
        "k": torch.nn.functional.normalize(randn(batch, tokens, key_heads, key_dim), dim=-1),
        "v": randn(batch, tokens, heads, value_dim),
        "g": -torch.rand((batch, tokens, heads), generator=generator, dtype=torch.float64),
        "beta": 2 * torch.rand((batch, tokens, heads), generator=generator, dtype=torch.float64),
        "initial_state": randn(states or batch, heads, key_dim, value_dim),
    }


def run(
    fn: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> dict[str, Tensor]:
    """The output, the final state and the gradients of all inputs, by a fixed cotangent."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    out, state = fn(**leaves, **{"normalize_qk": True, **options})
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, state)
    ]
    grads = torch.autograd.grad(
        (out, state), list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return dict(zip(NAMES, (out.detach(), state.detach(), *grads), strict=True))


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: ((got[name].double() - x.double()).norm() / (x.double().norm() + 1e-300)).item()
        for name, x in want.items()
    }


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    wrong = {name: error for name, error in errors(got, want).items() if not error <= bound}
    assert not wrong, f"relative errors above {bound}: {wrong}"


def as_rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a low-precision run really sees, in float64: rounding inputs is not its error."""
    return {name: x.to(dtype).double() for name, x in inputs.items()}


@pytest.mark.parametrize("normalize_qk", [True, False])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tokens", [1, 31, 64, 150])
def test_float64_equals_the_recurrence(tokens: int, group: int, normalize_qk: bool) -> None:
    inputs = make(batch=2, tokens=tokens, group=group)
    options = {"normalize_qk": normalize_qk, "scale": 0.3}
    want = run(gated_delta_rule_reference, inputs, **options)
    assert_close(run(gated_delta_rule, inputs, **options), want, 1e-12)


@given(
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    block=st.integers(1, 3),
)
def test_any_documents_and_any_blocks(
    batch: int, lengths: list[int], key_heads: int, group: int, block: int
) -> None:
    total = sum(lengths)
    tokens = max(1, -(-total // batch))
    lengths = [*lengths, batch * tokens - total]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = make(batch, tokens, key_heads, group, key_dim=5, value_dim=7, states=1)
    want = run(gated_delta_rule_reference, inputs, cu_doc_lens=cu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_CPU_BLOCK_BYTES", block * 4 * key_heads * group * 32 * 256)
        assert_close(run(gated_delta_rule, inputs, cu_doc_lens=cu), want, 1e-12)


def test_packed_equals_separate() -> None:
    lengths = [1, 1, 40, 3, 64, 1, 17]
    inputs = make(tokens=sum(lengths))
    del inputs["initial_state"]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed, state = gated_delta_rule(**inputs, cu_doc_lens=cu)
    pieces = [x.split(lengths, 1) for x in inputs.values()]
    separate = [gated_delta_rule(*piece) for piece in zip(*pieces, strict=True)]
    torch.testing.assert_close(
        packed, torch.cat([out for out, _ in separate], 1), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(state, separate[-1][1], rtol=0, atol=1e-13)


def test_empty_documents_change_nothing() -> None:
    inputs = make(tokens=70)
    cu = torch.tensor([0, 20, 64, 70], dtype=torch.int32)
    padded = torch.tensor([0, 20, 20, 64, 70, 70, 70], dtype=torch.int32)
    want = run(gated_delta_rule, inputs, cu_doc_lens=cu)
    assert_close(run(gated_delta_rule, inputs, cu_doc_lens=padded), want, 1e-13)


def test_segmented_equals_whole() -> None:
    """The final state of one half is the initial state of the next, gradients included."""
    inputs = make(batch=2, tokens=90)

    def halves(initial_state: Tensor, **x: Tensor) -> tuple[Tensor, Tensor]:
        options = {"normalize_qk": x.pop("normalize_qk")}
        first = {n: t[:, :37] for n, t in x.items()}
        second = {n: t[:, 37:] for n, t in x.items()}
        out1, state = gated_delta_rule(**first, initial_state=initial_state, **options)
        out2, state = gated_delta_rule(**second, initial_state=state, **options)
        return torch.cat((out1, out2), 1), state

    assert_close(run(halves, inputs), run(gated_delta_rule, inputs), 1e-12)


def _gates(kind: str, shape: tuple[int, ...]) -> Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if kind == "g=-80":
        return torch.full(shape, -80.0, dtype=torch.float64)
    if kind == "g=0":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "g=-80 or small":
        return torch.where(uniform < 0.3, -80.0, -0.01 * uniform)
    return -16 * uniform**3


EXTREME = ["g=-80", "g=0", "g=-80 or small", "g to -16"]


@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_gates(kind: str) -> None:
    inputs = make(tokens=200, key_dim=32, value_dim=32)
    inputs["g"] = _gates(kind, inputs["g"].shape)
    want = run(gated_delta_rule_reference, inputs)
    assert_close(run(gated_delta_rule, inputs), want, 1e-12)
    _assert_as_good_as_the_recurrence(inputs)


@pytest.mark.parametrize("kind", ["g=0", "g=-80 or small", "g to -16"])
def test_correlated_keys(kind: str) -> None:
    inputs = make(tokens=200, key_dim=32, value_dim=32)
    inputs["k"] = inputs["k"][:, :1] + 0.01 * inputs["k"]
    inputs["beta"].fill_(1.99)
    inputs["g"] = _gates(kind, inputs["g"].shape)
    want = run(gated_delta_rule_reference, inputs)
    got = run(gated_delta_rule, inputs)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-11, msg=name)
    _assert_as_good_as_the_recurrence(inputs)


def _assert_as_good_as_the_recurrence(inputs: dict[str, Tensor]) -> None:
    """float32: at most 20 times the error that the recurrence itself makes in float32."""
    want = run(gated_delta_rule_reference, as_rounded(inputs, torch.float32))
    own = errors(run(gated_delta_rule_reference, inputs, torch.float32), want)
    got = errors(run(gated_delta_rule, inputs, torch.float32), want)
    wrong = {n: (got[n], own[n]) for n in want if not got[n] <= 20 * max(own[n], 6e-8)}
    assert not wrong, f"error, and the recurrence's: {wrong}"


def test_float32_on_ordinary_inputs() -> None:
    inputs = make(batch=2, tokens=300, group=2, key_dim=64, value_dim=64)
    want = run(gated_delta_rule_reference, as_rounded(inputs, torch.float32))
    assert_close(run(gated_delta_rule, inputs, torch.float32), want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_its_rounding_only(dtype: torch.dtype) -> None:
    """States and sums are float32: the error is that of rounding inputs and results once."""
    inputs = make(tokens=150, key_dim=32, value_dim=32)
    halves = {
        n: x if n in ("g", "beta", "initial_state") else x.to(dtype) for n, x in inputs.items()
    }
    want = run(gated_delta_rule_reference, {n: x.double() for n, x in halves.items()})

    def mixed(**x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = {
            n: t.to(dtype) if n in ("q", "k", "v") else t
            for n, t in x.items()
            if n != "normalize_qk"
        }
        out, state = gated_delta_rule(**rounded, normalize_qk=True)
        assert out.dtype == dtype and state.dtype == torch.float32
        return out.float(), state

    assert_close(run(mixed, halves, torch.float32), want, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("documents", [False, True])
def test_gradcheck(documents: bool) -> None:
    inputs = make(batch=1, tokens=19, key_heads=1, group=2, key_dim=3, value_dim=2)
    cu = torch.tensor([0, 1, 5, 5, 19], dtype=torch.int32) if documents else None
    names = list(inputs)

    def fn(*values: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(
            **dict(zip(names, values, strict=True)), cu_doc_lens=cu, normalize_qk=True
        )

    assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in inputs.values()])


def test_only_one_result_is_used() -> None:
    inputs = make(tokens=40)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    for index in range(2):
        got = torch.autograd.grad(gated_delta_rule(**leaves)[index].sum(), leaves["k"])[0]
        want = torch.autograd.grad(gated_delta_rule_reference(**leaves)[index].sum(), leaves["k"])[
            0
        ]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    leaves = {n: x.requires_grad_() for n, x in make(tokens=20).items()}
    out, _ = gated_delta_rule(**leaves)
    (grad,) = torch.autograd.grad(out.sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_kept_scratch_carries_nothing_over() -> None:
    inputs = make(tokens=300)
    chunks._KEPT.__dict__.clear()
    with torch.inference_mode():
        gated_delta_rule(**{name: torch.full_like(x, float("nan")) for name, x in inputs.items()})
    run(gated_delta_rule, {name: torch.full_like(x, float("nan")) for name, x in inputs.items()})
    assert chunks._KEPT.__dict__
    want = run(gated_delta_rule_reference, inputs)
    assert_close(run(gated_delta_rule, inputs), want, 1e-12)


def test_strided_inputs() -> None:
    """Slices of a fused projection are read where they lie."""
    inputs = make(tokens=70, key_dim=16, value_dim=16)
    fused = torch.cat([inputs.pop(n) for n in ("q", "k", "v")], -1)
    parts = dict(zip(("q", "k", "v"), fused.split(16, -1), strict=True))
    want = gated_delta_rule(**{n: x.clone() for n, x in parts.items()}, **inputs)
    got = gated_delta_rule(**parts, **inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_autocast_keeps_the_gates() -> None:
    inputs = {n: x.float() for n, x in make(tokens=50).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out, state = gated_delta_rule(**inputs)
    rounded = {n: x.bfloat16() if n in "qkv" else x for n, x in inputs.items()}
    want, want_state = gated_delta_rule(**rounded)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close((out, state), (want, want_state), rtol=0, atol=0)


def test_checkpoint_and_selective_checkpoint() -> None:
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    inputs = make(tokens=40)
    want = run(gated_delta_rule, inputs)
    calls = []

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if op == torch.ops.olmo_core.gated_delta_rule.default:
            calls.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def plain(**x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(gated_delta_rule, use_reentrant=False, **x)

    def selective(**x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(
            gated_delta_rule,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
            **x,
        )

    assert_close(run(plain, inputs), want, 0)
    assert_close(run(selective, inputs), want, 0)
    assert calls


def test_opcheck() -> None:
    inputs = {n: x.requires_grad_() for n, x in make(tokens=20, key_dim=3, value_dim=4).items()}
    args = (*inputs.values(), None, 0.5, True, True)
    torch.library.opcheck(torch.ops.olmo_core.gated_delta_rule.default, args)


@pytest.mark.parametrize("normalize_qk", [True, False])
def test_steps_equal_the_recurrence(normalize_qk: bool) -> None:
    inputs = make(batch=2, tokens=9, group=2)
    want, want_state = gated_delta_rule_reference(**inputs, normalize_qk=normalize_qk)
    state = inputs.pop("initial_state").clone()
    outs = [
        gated_delta_rule_step_(
            *(x[:, t] for x in inputs.values()), state, normalize_qk=normalize_qk
        )[0]
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(outs, 1), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-12)


def test_compiles_whole_and_once_for_all_documents() -> None:
    def fn(cu: Tensor, **x: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(**x, cu_doc_lens=cu, normalize_qk=True)

    graphs = 0

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example)

    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    inputs = make(tokens=64)
    for ends in ([0, 20, 64, 64], [0, 1, 2, 64], [0, 64, 64, 64]):
        cu = torch.tensor(ends, dtype=torch.int32)

        def call(normalize_qk: bool, _cu: Tensor = cu, **x: Tensor) -> tuple[Tensor, Tensor]:
            return compiled(_cu, **x)

        want = run(gated_delta_rule_reference, inputs, cu_doc_lens=cu)
        assert_close(run(call, inputs), want, 1e-12)
    assert graphs == 1


@pytest.mark.parametrize("tokens", [1, 16, 20, 32, 33])
def test_gradients_are_as_contiguous_as_compilers_are_told(tokens: int) -> None:
    inputs = make(batch=2, tokens=tokens)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out, state = gated_delta_rule(**leaves, normalize_qk=True)
    grads = torch.autograd.grad([out.sum() + state.sum()], list(leaves.values()))
    assert all(x.is_contiguous() for x in grads)


GOOD = make(batch=2, tokens=6)
BAD: dict[str, tuple[dict[str, object], str]] = {
    "q of three dimensions": ({"q": GOOD["q"][0]}, "Expected q and k"),
    "v of three dimensions": ({"v": GOOD["v"][0]}, "Expected q and k"),
    "k of another head dim": ({"k": GOOD["k"][..., :8]}, "Expected q and k"),
    "k of another length": ({"k": GOOD["k"][:, :4]}, "Expected q and k"),
    "v of another batch": ({"v": GOOD["v"][:1]}, "Expected q and k"),
    "fewer value heads than key heads": ({"v": GOOD["v"][:, :, :1]}, "multiple of the key heads"),
    "no value heads": ({"v": GOOD["v"][:, :, :0]}, "no dimension empty"),
    "g per key dim": ({"g": GOOD["q"]}, "g must be"),
    "beta of another length": ({"beta": GOOD["beta"][:, :3]}, "beta must be"),
    "mixed dtypes": ({"v": GOOD["v"].float()}, "share a dtype"),
    "integers": ({n: GOOD[n].long() for n in "qkv"}, "floating point"),
    "integer beta": ({"beta": GOOD["beta"].long()}, "floating point"),
    "two devices": ({"g": GOOD["g"].to("meta")}, "share a device"),
    "a scale of zero": ({"scale": 0.0}, "scale must be positive"),
    "an infinite scale": ({"scale": float("inf")}, "scale must be positive"),
    "a transposed state": ({"initial_state": GOOD["initial_state"].mT}, "initial_state must be"),
    "an integer state": ({"initial_state": GOOD["initial_state"].long()}, "initial_state must be"),
    "a state per row with documents": (
        {"cu_doc_lens": torch.tensor([0, 12], dtype=torch.int32)},
        "1 with cu_doc_lens",
    ),
}
BAD_LENGTHS: dict[str, tuple[Tensor, str]] = {
    "not from 0": (torch.tensor([1, 12], dtype=torch.int32), "start at 0"),
    "decreasing": (torch.tensor([0, 8, 4, 12], dtype=torch.int32), "not decrease"),
    "short": (torch.tensor([0, 6], dtype=torch.int32), "end at"),
    "long": (torch.tensor([0, 6, 13], dtype=torch.int32), "end at"),
    "int64": (torch.tensor([0, 12]), "int32"),
    "two dimensions": (torch.tensor([[0, 12]], dtype=torch.int32), "1-D"),
    "one end": (torch.tensor([0], dtype=torch.int32), "1-D"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**GOOD, **change})


@pytest.mark.parametrize("case", BAD_LENGTHS)
def test_bad_lengths_are_refused(case: str) -> None:
    cu, message = BAD_LENGTHS[case]
    inputs = {n: x for n, x in GOOD.items() if n != "initial_state"}
    with pytest.raises((ValueError, TypeError), match=message):
        gated_delta_rule(**inputs, cu_doc_lens=cu)
