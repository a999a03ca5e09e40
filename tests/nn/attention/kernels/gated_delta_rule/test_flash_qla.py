"""The rule by FlashQLA, with a stand-in for the library: how arguments are mapped, what the probe
finds and remembers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nn.attention.kernels.gated_delta_rule.flash_qla_stand_in import LENGTHS, stand_in
from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet
from olmo_core.nn.attention.kernels.gated_delta_rule import (
    flash_qla,
    rules,
)
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla import flash_qla_gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.probe import Problem
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

PROBLEM = Problem(torch.device("cpu"), torch.bfloat16, 128, 128, 1, key_heads=1)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("flash_qla")
    module.chunk_gated_delta_rule = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    monkeypatch.setattr(flash_qla, "_PROBED", {})
    LENGTHS.clear()
    yield module
    LENGTHS.clear()


def make(
    batch: int, tokens: int, heads: int, group: int, value_dim: int = 128, seed: int = 0
) -> list[Tensor]:
    """q, k, v, g and beta in bfloat16 and float32, none of them contiguous; beta up to 2."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(tokens, batch, *shape, generator=draw).transpose(0, 1)

    values = heads * group
    shapes = (heads, 128), (heads, 128), (values, value_dim)
    halves = [randn(*s).bfloat16() for s in shapes]
    return [*halves, -0.3 * randn(values).abs(), 2 * randn(values).sigmoid()]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    heads, group, parts = draw(st.sampled_from([(1, 1, 2), (2, 1, 1), (1, 3, 1), (2, 2, 2)]))
    if batch * tokens * heads < 2:
        tokens = 2
    value_dim = 128 * parts
    inputs = make(batch, tokens, heads, group, value_dim, draw(st.integers(0, 99)))
    options: dict[str, Any] = {"normalize_qk": draw(st.booleans())}
    if not options["normalize_qk"]:  # with beta near 2, longer keys than 1 grow beyond bounds
        inputs[1] = inputs[1] / inputs[1].float().norm(dim=-1, keepdim=True).bfloat16()
    if draw(st.booleans()):
        options["scale"] = 0.3
    rows = batch
    if draw(st.booleans()):
        cuts = st.lists(st.integers(0, batch * tokens), max_size=5)
        cu = [0, *sorted(draw(cuts)), batch * tokens]
        options["cu_doc_lens"] = torch.tensor(cu, dtype=torch.int32)
        rows = 1
    if draw(st.booleans()):
        shape = rows, heads * group, 128, value_dim
        options["initial_state"] = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
    return inputs, options


@given(problems(), st.sampled_from([(0,), (1,), (0, 1)]))
@settings(max_examples=40, deadline=None)
def test_it_computes_the_rule(
    problem: tuple[list[Tensor], dict[str, Any]], used: tuple[int, ...]
) -> None:
    inputs, options = problem
    LENGTHS.clear()
    answers = []
    for rule, wide in ((flash_qla_gated_delta_rule, False), (gated_delta_rule_reference, True)):
        given_, state = list(inputs), options.get("initial_state")
        if state is not None:
            given_.append(state)
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in given_]
        called = options if state is None else {**options, "initial_state": leaves[5]}
        out, final = rule(*leaves[:5], **called)
        dout = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape)
        cotangents = [dout.to(out.dtype), torch.full_like(final, 0.1)]
        asked, weights = ([pair[i] for i in used] for pair in ((out, final), cotangents))
        grads = torch.autograd.grad(asked, leaves, weights, materialize_grads=True)
        assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, leaves))
        assert wide or (out.dtype == torch.bfloat16 and final.dtype == torch.float32)
        answers.append([out, final, *grads])
    for got, want in zip(*answers, strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= 2e-2 * want.norm() + 1e-12


def test_autocast_decides_the_dtype() -> None:
    q, k, v, g, beta = (x.float() for x in make(1, 3, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = flash_qla_gated_delta_rule(q, k, v, g, beta)
    assert out.dtype == torch.bfloat16


def test_bad_input_is_refused_at_the_door() -> None:
    q, k, v, g, beta = make(1, 3, 1, 1)
    rule = flash_qla_gated_delta_rule
    with pytest.raises(ValueError, match="q and k"):
        rule(q, k[:, :2], v, g, beta)
    with pytest.raises(ValueError, match="bfloat16 and float16, not torch"):
        rule(q.float(), k.float(), v.float(), g, beta)
    with pytest.raises(ValueError, match="key_dim is 128, not 64"):
        rule(q[..., :64], k[..., :64], v, g, beta)
    with pytest.raises(ValueError, match="value_dim is a multiple of 128, not 96"):
        rule(q, k, v[..., :96], g, beta)
    with pytest.raises(ValueError, match="fewer than two keys"):
        rule(*(x[:, :1] for x in (q, k, v, g, beta)))
    for cu, error in (([0, 4], ValueError), ([1, 3], ValueError), ([0, 2, 1, 3], ValueError)):
        with pytest.raises(error):
            rule(q, k, v, g, beta, cu_doc_lens=torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(TypeError):
        rule(q, k, v, g, beta, cu_doc_lens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="initial_state"):
        rule(q, k, v, g, beta, initial_state=torch.zeros(1, 1, 128, 64))


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.requires_grad_() for x in make(1, 3, 1, 1)]
    for result in flash_qla_gated_delta_rule(*leaves):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(result.sum(), leaves[2:], create_graph=True)
        torch.autograd.grad(result.sum(), leaves[2:], retain_graph=True)


# The probe


def test_the_probe_tells_right_from_wrong(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usable, reason = flash_qla._probe(PROBLEM, True)
    assert usable and "forward and backward" in reason
    assert flash_qla._probe(PROBLEM, False)[1].endswith("forward")

    def wrong(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = stand_in(*inputs, **options)
        return 1.1 * out, state

    def wrong_state(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = stand_in(*inputs, **options)
        return out, 1.1 * state

    def wrong_gate(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        *others, beta = inputs
        return stand_in(*others, beta.detach() + 0 * beta, **options)

    def nothing(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = stand_in(*inputs, **options)
        return out * float("nan"), state

    def no_documents(*inputs: Tensor, cu_seqlens: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return stand_in(*inputs, cu_seqlens=None, **options)

    for gradients in (False, True):
        for function in (wrong, wrong_state, nothing, no_documents):
            flash_qla._PROBED.clear()
            library.chunk_gated_delta_rule = function
            usable, reason = flash_qla._probe(PROBLEM, gradients)
            assert not usable and "is off by" in reason, function
    flash_qla._PROBED.clear()
    library.chunk_gated_delta_rule = wrong_gate
    assert flash_qla._probe(PROBLEM, False)[0] and not flash_qla._probe(PROBLEM, True)[0]

    def broken(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("nvcc failed\nand more")

    flash_qla._PROBED.clear()
    library.chunk_gated_delta_rule = broken
    assert flash_qla._probe(PROBLEM, False) == (
        False,
        "its probe failed: RuntimeError: nvcc failed",
    )


def test_what_a_probe_said_holds_for_what_it_was_made_for(library: Any) -> None:
    calls = []

    def counted(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(inputs[0].dtype)
        raise RuntimeError("refuses")

    library.chunk_gated_delta_rule = counted
    changes: list[dict[str, Any]] = [
        {}, {"dtype": torch.float16}, {"value_dim": 256}, {"group": 2}, {"key_heads": 2},
        {"batch": 2}, {"key_dim": 128},
    ]  # fmt: skip
    for n in (1, 2):
        for change in changes:
            flash_qla._probe(replace(PROBLEM, **change), False)
        assert len(calls) == 6, n
    flash_qla._probe(PROBLEM, True)
    assert len(calls) == 7

    def full(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(None)
        raise torch.OutOfMemoryError("none left")

    library.chunk_gated_delta_rule = full
    flash_qla._PROBED.clear()
    for n in (8, 9):
        assert flash_qla._probe(PROBLEM, False) == (False, "its probe found no memory")
        assert len(calls) == n


def test_modes_of_the_caller_do_not_reach_the_probe() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        assert flash_qla._probe(PROBLEM, True)[0]


def test_the_layer_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = GatedDeltaNet(
        d_model=32, n_heads=1, n_v_heads=2, head_dim=128, expand_v=2.0, dtype=torch.bfloat16
    ).requires_grad_(False)
    x = torch.randn(2, 5, 32).bfloat16()
    cu = torch.tensor([0, 1, 7, 10], dtype=torch.int32)

    def answers() -> list[Tensor]:
        outs = [layer(x), layer(x, cu_doc_lens=cu)]
        layer.init_kv_cache_manager(2, 16)
        outs.append(layer(x))
        layer.kv_cache_manager = None
        return outs

    want = answers()
    calls = []

    def run(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(inputs)
        return flash_qla_gated_delta_rule(*inputs, **options)

    row = replace(rules.RULES[0], run=run, refusal=lambda q, v: None)
    monkeypatch.setattr(rules, "RULES", (row, *rules.RULES[1:]))
    for got, expected in zip(answers(), want, strict=True):
        assert (got - expected).norm() <= 2e-2 * expected.norm()
    assert len(calls) == 3
