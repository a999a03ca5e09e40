"""Every schedule, layout, window and kind of heads: a shard's rows are the dense oracle's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from math import gcd

import pytest

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import (
    context_of,
    dense,
    draw,
    forward_backward,
    int32,
    own_rows,
    worst,
)

pytestmark = pytest.mark.distributed

WINDOWS = (-1, 1, 5, 10**6)
HEADS = ((4, 4), (4, 2), (4, 1))


def documents(n: int) -> Iterator[tuple[str, list[int], tuple[str | None, ...]]]:
    """Names, lengths, and the layouts that can deal them to ``n`` ranks; None is Ulysses alone."""
    m, every = 2 * n, ("contiguous", "zig_zag", "balanced", None)
    yield "one", [0, 6 * m], every
    yield "many", [0, 2 * m, 2 * m, 3 * m, 7 * m, 8 * m], every
    yield "chunks of one token", [m * i for i in range(7)], every
    total = 11 * n + 30
    yield "ragged", [0, 1, 2, 3, 17, 20, 21, total + -total % n], ("contiguous", "balanced", None)


def matrix(rank: int, n: int, heads: tuple[int, int], ulysses: int = 1) -> int:
    """How many cases were compared. A zig-zag without window goes round a ring; the rest gathers.

    :param ulysses: Its degree inside the ring.
    """
    count = 0
    for (name, cu, layouts), window, batch in product(documents(n), WINDOWS, (1, 2)):
        if batch == 2 and name != "one":
            continue
        whole = draw(batch, cu[-1], heads, 8)
        want = dense(*whole, cu, window)
        lengths = int32(cu) if batch == 1 else None
        for layout, stride in product(layouts, sorted({1, heads[1] // min(ulysses, heads[1])})):
            if layout is None and (heads[0] % n or stride > 1 or ulysses > 1):
                continue
            context = context_of(n, layout, ulysses=ulysses, head_stride=stride)
            rows = own_rows(layout, cu, rank, n, ulysses)
            got = forward_backward(context, whole, rows, lengths=lengths, window=window)
            error = worst(got, [x[:, rows] for x in want])
            assert error < 1e-12, (layout, stride, name, window, batch, error)
            count += 1
    return count


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}-{h[1]}")
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_schedule_is_exact(n: int, heads: tuple[int, int]) -> None:
    counts = on_ranks(n, matrix, heads)
    assert len(set(counts)) == 1 and counts[0] >= 56


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}-{h[1]}")
def test_a_ring_with_ulysses_inside_is_exact(heads: tuple[int, int]) -> None:
    assert min(on_ranks(4, matrix, heads, 2)) >= 56


def random_cases(rank: int, n: int, cases: int) -> int:
    rng, count = random.Random(n), 0
    for case in range(cases):
        layout = rng.choice(("contiguous", "zig_zag", "balanced", None))
        multiple = 2 * n if layout == "zig_zag" else 1
        cu = [0]
        for _ in range(rng.randint(1, 12)):
            cu.append(cu[-1] + multiple * rng.choice((0, 1, 1, 2, 3, 7, 20)))
        cu.append(cu[-1] + (-cu[-1] % (2 * n) or 2 * n))
        n_kv = rng.choice((1, 2, 3))
        heads = (n_kv * rng.choice((1, 2, 3)), n_kv)
        window, stride = rng.choice((-1, -1, 1, 2, 5, 30)), rng.randint(1, n_kv)
        if layout is None:
            heads = (n_kv * n // gcd(n_kv, n) * rng.choice((1, 2)), n_kv)
        whole = draw(1, cu[-1], heads, rng.choice((4, 8, 16)), seed=case)
        rows = own_rows(layout, cu, rank, n)
        context = context_of(n, layout, head_stride=stride)
        got = forward_backward(context, whole, rows, lengths=int32(cu), window=window)
        error = worst(got, [x[:, rows] for x in dense(*whole, cu, window)])
        assert error < 1e-12, (case, layout, cu, heads, window, stride, error)
        count += context.rotates(window)
    return count


@pytest.mark.parametrize("n", [2, 3, 4])
def test_random_cases_are_exact(n: int) -> None:
    assert min(on_ranks(n, random_cases, 60)) >= 3  # of them in a ring


def local_lengths(rank: int, n: int) -> float:
    """A zig-zag shard's own lengths say as much as the whole sequence's."""
    cu = [0, 4 * n, 10 * n, 12 * n]
    whole = draw(1, cu[-1], (2, 1), 4)
    rows = own_rows("zig_zag", cu, rank, n)
    local = int32([end // n for end in cu])
    got = forward_backward(
        context_of(n, "zig_zag"), whole, rows, lengths=local, local=True, window=-1
    )
    return worst(got, [x[:, rows] for x in dense(*whole, cu, -1)])


def test_a_zig_zag_shards_lengths_serve_too() -> None:
    assert max(on_ranks(2, local_lengths)) < 1e-12


def documents_across_rows(rank: int, n: int) -> float:
    """Under Ulysses lengths are about the flattened batch, so a document may cross a row."""
    cu = [0, 5, 17, 24]
    whole = draw(2, 12, (4, 2), 8)
    flat = [x.flatten(0, 1)[None] for x in whole]
    want = [x.view(2, 12, *x.shape[2:]) for x in dense(*flat, cu, 4)]
    rows = own_rows(None, [0, 12], rank, n)
    got = forward_backward(context_of(n), whole, rows, lengths=int32(cu), window=4)
    return worst(got, [x[:, rows] for x in want])


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_takes_documents_that_cross_rows(n: int) -> None:
    assert max(on_ranks(n, documents_across_rows)) < 1e-12
