"""Layouts: each token once, positions inside documents, and how even the work is."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nn.attention.parallel.test_balancers import cumulative, documents
from olmo_core.nn.attention.parallel.layout import (
    LAYOUTS,
    BalancedLayout,
    ContiguousLayout,
    Layout,
    Span,
    ZigZagLayout,
    token_index,
    token_positions,
)


@given(lengths=documents, n=st.integers(1, 4))
def test_zig_zag_gives_every_rank_the_two_mirrored_chunks(lengths: list[int], n: int) -> None:
    cu = cumulative([2 * n * length for length in lengths]).tolist()
    for rank, spans in enumerate(ZigZagLayout().spans(cu, n)):
        expected: list[int] = []
        for a, b in pairwise(cu):
            chunks = [
                list(range(a, b))[i * (b - a) // (2 * n) :][: (b - a) // (2 * n)]
                for i in range(2 * n)
            ]
            expected += chunks[rank] + chunks[2 * n - 1 - rank]
        assert token_index(spans).tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(lengths=documents, n=st.integers(1, 4))
def test_positions_count_from_the_documents_start(
    layout: Layout, lengths: list[int], n: int
) -> None:
    cu = cumulative([2 * n * length for length in lengths]).tolist()
    inside = torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])
    for rank, spans in enumerate(layout.spans(cu, n)):
        assert torch.equal(layout.positions(cu, n, rank), inside[token_index(spans)])
        assert torch.equal(token_positions(spans), inside[token_index(spans)])
        assert spans == sorted(spans)
        for span in spans:
            assert span.document in cu
            ends = [b for a, b in pairwise(cu) if a == span.document and a < b]
            assert span.document <= span.start < span.stop <= ends[0]


def test_layouts_refuse_lengths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="dealt evenly"):
        ContiguousLayout().spans([0, 9], 2)
    with pytest.raises(ValueError, match="dealt evenly"):
        BalancedLayout().spans([0, 4, 9], 2)
    with pytest.raises(ValueError, match="4 equal chunks"):
        ZigZagLayout().spans([0, 8, 14], 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_documents_are_dealt_once_each(name: str) -> None:
    rng, layout = random.Random(0), LAYOUTS[name]
    for _ in range(500):
        n = rng.randint(1, 6)
        multiple = layout.document_multiple(n)
        cu = [0]
        for _ in range(rng.randint(1, 12)):
            cu.append(cu[-1] + multiple * rng.choice((0, 1, 1, 2, 3, 7, 20, 90)))
        cu.append(cu[-1] + (-cu[-1] % n or n * multiple))
        ranks = layout.spans(cu, n)
        assert len(ranks) == n
        held = [token_index(spans) for spans in ranks]
        assert {len(rows) for rows in held} == {cu[-1] // n}
        assert torch.equal(torch.cat(held).sort().values, torch.arange(cu[-1]))
        for spans in ranks:
            for a, b in pairwise(spans):  # in order, and what touches is one
                assert a.stop < b.start or (a.stop == b.start and a.document != b.document)


def work(spans: list[Span], exact: bool) -> int:
    """The pairs of query and key, or the difference of squares, which is twice that at length."""
    own = 1 if exact else 0
    return sum(
        (s.stop - s.document) * (s.stop - s.document + own)
        - (s.start - s.document) * (s.start - s.document + own)
        for s in spans
    )


def imbalance(cu: list[int], n: int) -> float:
    """The busiest rank's work over the mean."""
    ranks = BalancedLayout().spans(cu, n)
    both = ([work(spans, exact) for spans in ranks] for exact in (True, False))
    return max(n * max(each) / sum(each) for each in both)


def log_normal(total: int, longest: float, rng: random.Random) -> list[int]:
    cu = [0]
    while cu[-1] < total:
        length = int(rng.lognormvariate(math.log(1500), 1.2)) + 16
        cu.append(int(min(total, cu[-1] + min(length, longest))))
    return cu


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("longest", [math.inf, 8192])
def test_balance_of_log_normal_documents(n: int, longest: float) -> None:
    rng = random.Random(0)
    found = [imbalance(log_normal(n * 16384, longest, rng), n) for _ in range(30)]
    assert sum(found) / 30 <= 1.05
    assert max(found) <= 1.12


def hard(n: int, rows: int) -> Iterator[list[int]]:
    """Lengths that greedy packing by length alone gets wrong."""
    for few in (1, 2, 3, n - 1, n, n + 1, 2 * n):
        long = few * (rows // 4 - 1)
        if 0 < long <= n * rows:
            yield [rows // 4 - 1] * few + [1] * (n * rows - long)
    for huge in (rows, n * rows // 2, n * rows - 4 * n):
        yield [huge] + [3] * ((n * rows - huge) // 3)
    for length in range(rows // 4 - 3, rows // 4 + 4):
        yield [length] * (n * rows // length)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_balance_of_hard_documents(n: int) -> None:
    rows = 1024
    for lengths in hard(n, rows):
        lengths.append(n * rows - sum(lengths))
        assert imbalance(cumulative(lengths).tolist(), n) <= 1.15, lengths[:20]
