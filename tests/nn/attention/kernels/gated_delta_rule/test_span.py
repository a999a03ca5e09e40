"""Spans of a sequence against the recurrence: their maps, and both passes from what follows of
them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nn.attention.kernels.gated_delta_rule.test_op import EXTREME, _gates, assert_close, make
from olmo_core.nn.attention.kernels.gated_delta_rule import chunks, gated_delta_rule, op
from olmo_core.nn.attention.kernels.gated_delta_rule.chunks import RuleInputs
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from olmo_core.nn.attention.kernels.gated_delta_rule.span import span_backward, span_forward

NAMES = ("out", "state", "dinitial", "dq", "dk", "dv", "dg", "dbeta")
OPTIONS: dict[str, Any] = {"scale": 0.3, "normalize_qk": True}


@pytest.fixture(params=["own passes", "two calls"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "two calls":
            without(patch)
        yield


def without(patch: pytest.MonkeyPatch) -> None:
    """Forms without passes of their own."""
    rows = [
        replace(row, run=replace(row.run, span_forward=None, span_backward=None))
        for row in op.FORMS
    ]
    patch.setattr(op, "FORMS", tuple(rows))


def cotangents(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the output and of the final state, and how the latter follows from the first."""
    generator = torch.Generator().manual_seed(1)
    state = inputs["initial_state"]
    key_dim = state.shape[2]
    dout, dfinal, matrix = (
        # What every dtype holds, so that it is the same for all.
        torch.randn(shape, generator=generator).bfloat16()
        for shape in (inputs["v"].shape, state.shape, (key_dim, key_dim))
    )
    return dout.to(inputs["v"]), dfinal.to(state), matrix.to(state) * key_dim**-0.5


def of_span(inputs: dict[str, Tensor], cu: Tensor | None = None) -> dict[str, Tensor]:
    """The results of a span whose incoming state is given, and that of the map at this state.

    The final state's gradient depends on the initial one's, as it does through other ranks.
    """
    *tensors, initial = inputs.values()
    tokens = tensors[0].shape[1]
    inner = [] if cu is None else sorted({*cu.tolist()} - {0, tokens})
    ends = torch.tensor([0, *inner, tokens], dtype=torch.int32, device=initial.device)
    cu = ends if inner else None
    dout, dfinal, matrix = cotangents(inputs)
    seen: list[Tensor] = []

    def incoming(n: Tensor, m: Tensor) -> Tensor:
        assert n.shape == initial.shape and m.shape == (*n.shape[:3], n.shape[2])
        assert n.is_contiguous() and m.is_contiguous()
        assert cu is None or not m.any()
        seen.append(n + m @ initial.to(n))
        return initial

    def outgoing(dinitial: Tensor) -> Tensor:
        assert dinitial.is_contiguous()
        seen.append(dinitial)
        return dfinal + matrix @ dinitial

    x = RuleInputs.of(tensors, cu, **OPTIONS)
    out, m, *saved = span_forward(x, incoming, inner[-1] if inner else 0, save=True)
    grads = span_backward(dout, x, tuple(saved), outgoing, inner[0] if inner else tokens)
    assert m.dtype == seen[0].dtype
    for grad, x in zip(grads, tensors, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype and grad.is_contiguous()
    return dict(zip(NAMES, (out, *seen, *grads), strict=True))


def of_rule(rule: Any, inputs: dict[str, Tensor], cu: Tensor | None = None) -> dict[str, Tensor]:
    """The same of a rule that knows it all, by autograd."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, state = rule(**leaves, **OPTIONS, cu_doc_lens=cu)
    dout, dfinal, matrix = cotangents(inputs)
    (dinitial,) = torch.autograd.grad(out, leaves["initial_state"], dout, retain_graph=True)
    grads = torch.autograd.grad(
        (out, state),
        list(leaves.values())[:-1],
        (dout, dfinal + matrix @ dinitial.to(dfinal)),
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(NAMES, (out.detach(), state.detach(), dinitial, *grads), strict=True))


@given(
    batch=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    block=st.integers(1, 3),
    own=st.booleans(),
)
def test_any_documents_and_any_blocks(
    batch: int, lengths: list[int], key_heads: int, group: int, block: int, own: bool
) -> None:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = batch if len(lengths) == 1 else 1
    inputs = make(rows, int(cu[-1]), key_heads, group, key_dim=5, value_dim=7)
    lengths_of_rule = None if len(lengths) == 1 else cu
    want = of_rule(gated_delta_rule_reference, inputs, lengths_of_rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_CPU_BLOCK_BYTES", block * 4 * key_heads * group * 32 * 256)
        if not own:
            without(patch)
        assert_close(of_span(inputs, cu), want, 1e-11)


@pytest.mark.usefixtures("form")
def test_documents_of_one_token() -> None:
    inputs = make(tokens=70, group=2)
    cu = torch.arange(71, dtype=torch.int32)
    assert_close(of_span(inputs, cu), of_rule(gated_delta_rule_reference, inputs, cu), 1e-12)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_gates_and_keys_that_are_alike(kind: str, alike: bool) -> None:
    inputs = make(tokens=200, key_dim=32, value_dim=32)
    inputs["g"] = _gates(kind, inputs["g"].shape)
    if alike:
        inputs["k"] = inputs["k"][:, :1] + 0.01 * inputs["k"]
        inputs["beta"].fill_(1.99)
    got, want = of_span(inputs), of_rule(gated_delta_rule_reference, inputs)
    for name, x in want.items():
        scale = float(x.abs().max()) if alike else 1.0
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-11 * max(1, scale), msg=name)

    # float32: a map errs no more than the pass that it stands for, but for what is at the floor.
    single = {name: x.float() for name, x in inputs.items()}
    exact = of_rule(gated_delta_rule_reference, {name: x.double() for name, x in single.items()})
    whole, span = of_rule(gated_delta_rule, single), of_span(single)
    for name, x in exact.items():
        apart, own = ((y[name].double() - x).norm() for y in (span, whole))
        assert apart <= max(4 * own, 1e-5 * x.norm(), 1e-6), (name, apart, own)


def test_its_own_passes_compute_what_the_op_does() -> None:
    """To the last bit: both run the same products in the same order."""
    inputs = {name: x.float() for name, x in make(batch=2, tokens=150, group=2).items()}
    want, got = of_rule(gated_delta_rule, inputs), of_span(inputs)
    for name, x in want.items():
        if name not in ("state", "dq", "dk", "dv", "dg", "dbeta"):
            assert torch.equal(got[name], x), name


@pytest.mark.parametrize("save", [True, False])
def test_what_is_saved_and_dtypes(save: bool) -> None:
    inputs = make(tokens=40)
    *tensors, initial = inputs.values()
    halves = [x.bfloat16() if i < 3 else x.float() for i, x in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        x = RuleInputs.of(halves, None, **OPTIONS)
        out, m, *saved = span_forward(x, lambda n, m: initial.float(), 0, save=save)
    assert out.dtype == torch.bfloat16 and m.dtype == torch.float32
    whole = op.form_of(halves[0], halves[2]).forward(x, initial.float(), save=save)
    assert torch.equal(out, whole[0])
    for mine, theirs in zip(saved, op.saved_outputs(whole[2], m), strict=True):
        assert torch.equal(mine, theirs)


def test_a_document_of_nan_stays_out_of_maps() -> None:
    """Chunks that the map does not depend on are left out: zero times NaN would be NaN."""
    cu = torch.tensor([0, 32, 96, 128], dtype=torch.int32)
    inputs = make(tokens=128)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 32:96] = float("nan")
    got = of_span(inputs, cu)
    assert got["state"].isfinite().all() and got["dinitial"].isfinite().all()
    assert got["out"][:, :32].isfinite().all() and got["dv"][:, 96:].isfinite().all()
