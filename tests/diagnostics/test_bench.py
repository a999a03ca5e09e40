"""What ``bench`` counts and measures, on problems small enough to check."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from olmo_core.diagnostics import bench
from olmo_core.diagnostics.bench_cases import (
    BenchCase,
    Problem,
    Settings,
    default_settings,
    document_lengths,
)
from olmo_core.diagnostics.contenders import (
    PEERS,
    Attend,
    Contender,
    Unavailable,
    absent_backends,
    contenders,
)

CPU = torch.device("cpu")
TINY = Settings(2, 4, 2, 16, 9, torch.float32, (24, 48), 3, 1e-3, 32)


@pytest.mark.parametrize("tokens", [2, 16, 100, 320, 4096])
def test_documents_fill_the_sequence(tokens: int) -> None:
    lengths = document_lengths(tokens)
    assert sum(lengths) == tokens and min(lengths) > 0
    assert tokens < 320 or len(lengths) == 16


@pytest.mark.parametrize("case", [BenchCase.full, BenchCase.window, BenchCase.documents])
@pytest.mark.parametrize("tokens", [5, 9, 40])
def test_visible_pairs_are_those_of_the_mask(case: BenchCase, tokens: int) -> None:
    p = Problem(case, TINY, tokens, CPU)
    assert p.pairs == p.batch * int(p.mask.sum())
    assert p.flops(backward=False) == 4 * 16 * 4 * p.pairs
    assert p.flops(backward=True) == 3.5 * p.flops(backward=False)


@pytest.mark.parametrize("case", list(BenchCase))
def test_everybody_computes_the_same(case: BenchCase) -> None:
    """The backend and the peers, forward and gradients, within float32 of the reference."""
    rows = list(bench.run(bench.plan(contenders(["torch"], True), [case], TINY.tokens), TINY, CPU))
    measured = [r for r in rows if not r.reason]
    assert {r.name for r in measured} >= {"torch"}
    assert len(measured) >= 4  # a peer at each length
    for r in measured:
        assert r.error is not None and r.error < 1e-5
        assert r.forward_ms and r.peak_mb
        assert (r.both_ms is None) == (case == BenchCase.decode)
    assert all(r.name in PEERS for r in rows if r.reason)


def test_a_wrong_contender_shows_its_error() -> None:
    def prepare(p: Problem) -> Attend:
        return lambda q, k, v: v.repeat_interleave(2, 2) + 0 * q + 0 * k.repeat_interleave(2, 2)

    (row,) = bench.run([bench.Plan(Contender("v", True, prepare), BenchCase.full, 24)], TINY, CPU)
    assert row.error is not None and row.error > 0.1


def test_failures_are_rows() -> None:
    def refuses(p: Problem) -> Attend:
        raise Unavailable("not today")

    def fails(p: Problem) -> Attend:
        def attend(*qkv: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no room\nfor this")

        return attend

    who = [Contender("a", False, refuses), Contender("b", False, fails)]
    rows = list(bench.run(bench.plan(who, [BenchCase.full], [24]), TINY, CPU))
    assert [r.reason for r in rows] == ["not today", "OutOfMemoryError: no room"]
    assert all(r.forward_ms is None for r in rows)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.zeros(1000)

    def call() -> None:
        for _ in range(3):  # freed before the next
            (x + 1).mul_(2)
        first, second = x + 1, x + 2
        assert first is not second

    assert bench.peak_bytes(call, CPU) == pytest.approx(8000, rel=0.05)


def test_decode_bytes() -> None:
    p = Problem(BenchCase.decode, TINY, 40, CPU)
    assert p.cache_bytes == 2 * 3 * 40 * 2 * 16 * 4


def test_nan_is_still_json() -> None:
    row = bench.Measurement("a", False, "full", 8, 1.0, 2.0, error=math.nan)
    assert row.as_dict()["error"] == "nan"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_absent_backends_have_reasons() -> None:
    absent = absent_backends(CPU, default_settings(CPU))
    assert set(absent) == {"flash_2", "flash_3", "flash_4", "te"}
    assert "needs an NVIDIA GPU" in absent["te"] and "not installed" in absent["te"]
    half = absent_backends(CPU, replace(TINY, dtype=torch.bfloat16))
    assert "takes" in absent["flash_2"] and "takes" not in half["flash_2"]


def test_a_small_problem_keeps_its_shape() -> None:
    settings = default_settings(CPU)
    p: Any = Problem(BenchCase.window, settings, 2048, CPU).smaller()
    assert (p.n_tokens, p.settings.window, p.batch) == (512, 128, 1)
    assert p.settings.head_dim == settings.head_dim
