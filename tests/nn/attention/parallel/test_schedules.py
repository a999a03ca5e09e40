"""Every schedule, layout, window and kind of heads: a shard's rows are the dense oracle's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from math import gcd
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import (
    dense,
    draw,
    forward_backward,
    own_rows,
    shard_of,
    worst,
)

pytestmark = pytest.mark.distributed

WINDOWS = (-1, 1, 5, 10**6)
HEADS = ((4, 4), (4, 2), (4, 1))


def documents(n: int) -> Iterator[tuple[str, list[int], tuple[str, ...]]]:
    """Names, lengths, and the layouts that can deal them to ``n`` ranks."""
    m, every = 2 * n, ("contiguous", "zig_zag", "balanced")
    yield "one", [0, 6 * m], every
    yield "many", [0, 2 * m, 2 * m, 3 * m, 7 * m, 8 * m], every
    yield "chunks of one token", [m * i for i in range(7)], every
    total = 11 * n + 30
    yield "ragged", [0, 1, 2, 3, 17, 20, 21, total + -total % n], ("contiguous", "balanced")


def matrix(rank: int, n: int, heads: tuple[int, int]) -> tuple[int, float]:
    """How many cases were compared, and the worst difference."""
    count, top = 0, 0.0
    for (name, cu, layouts), window, batch in product(documents(n), WINDOWS, (1, 2)):
        if batch == 2 and name != "one":
            continue
        whole = draw(batch, cu[-1], heads, 8)
        want = dense(*whole, cu, window)
        lengths = torch.tensor(cu, dtype=torch.int32) if batch == 1 else None
        for layout in layouts:
            rows = own_rows(layout, cu, rank, n)
            todo = [("gather", stride) for stride in sorted({1, heads[1]})]
            if window == -1 and layout == "zig_zag":
                todo.append(("ring", 1))
            if layout == "contiguous" and heads[0] % n == 0:
                todo.append(("ulysses", 1))
            for schedule, stride in todo:
                shard = shard_of(layout, lengths, window=window, head_stride=stride)
                got = forward_backward(schedule, whole, rows, shard)
                error = worst(got, [x[:, rows] for x in want])
                assert error < 1e-12, (schedule, stride, name, layout, window, batch, error)
                count, top = count + 1, max(top, error)
    return count, top


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}-{h[1]}")
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_schedule_is_exact(n: int, heads: tuple[int, int]) -> None:
    answers = on_ranks(n, matrix, heads)
    assert len({count for count, _ in answers}) == 1 and answers[0][0] >= 40


def hybrid(rank: int, n: int) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    inner, outer = mesh.get_group("ulysses").group_name, mesh.get_group("ring").group_name
    ring, part = mesh.get_coordinate()
    count = 0
    for (name, cu, layouts), heads, window, batch in product(documents(2), HEADS, (-1, 5), (1, 2)):
        if cu[-1] % 4 or (batch == 2 and name != "one"):
            continue
        whole = draw(batch, cu[-1], heads, 8)
        want = dense(*whole, cu, window)
        lengths = torch.tensor(cu, dtype=torch.int32) if batch == 1 else None
        for layout, schedule in product(layouts, ("gather", "ring")):
            if schedule == "ring" and (window > 0 or layout != "zig_zag"):
                continue
            rows = own_rows(layout, cu, ring, 2).chunk(2)[part]
            shard = shard_of(layout, lengths, window=window, group=inner)
            got = forward_backward(f"ulysses+{schedule}", whole, rows, shard, ring_group=outer)
            error = worst(got, [x[:, rows] for x in want])
            assert error < 1e-12, (schedule, name, layout, heads, window, batch, error)
            count += 1
    return count


def test_a_ring_with_ulysses_inside_is_exact() -> None:
    assert min(on_ranks(4, hybrid)) > 50


def random_cases(rank: int, n: int, cases: int) -> None:
    rng = random.Random(n)
    for case in range(cases):
        layout = rng.choice(("contiguous", "zig_zag", "balanced"))
        multiple = 2 * n if layout == "zig_zag" else 1
        cu = [0]
        for _ in range(rng.randint(1, 12)):
            cu.append(cu[-1] + multiple * rng.choice((0, 1, 1, 2, 3, 7, 20)))
        cu.append(cu[-1] + (-cu[-1] % (2 * n) or 2 * n))
        n_kv = rng.choice((1, 2, 3))
        heads = (n_kv * rng.choice((1, 2, 3)), n_kv)
        window, stride = rng.choice((-1, -1, 1, 2, 5, 30)), rng.randint(1, n_kv)
        whole = draw(1, cu[-1], heads, rng.choice((4, 8, 16)), seed=case)
        want = dense(*whole, cu, window)
        rows = own_rows(layout, cu, rank, n)
        todo = ["gather"]
        if window < 0 and layout == "zig_zag":
            todo.append("ring")
        if layout == "contiguous" and heads[0] % (n_kv * n // gcd(n_kv, n)) == 0:
            todo.append("ulysses")
        for schedule in todo:
            lengths = torch.tensor(cu, dtype=torch.int32)
            shard = shard_of(layout, lengths, window=window, head_stride=stride)
            got = forward_backward(schedule, whole, rows, shard)
            error = worst(got, [x[:, rows] for x in want])
            assert error < 1e-12, (case, schedule, layout, cu, heads, window, stride, error)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_random_cases_are_exact(n: int) -> None:
    on_ranks(n, random_cases, 60)


def documents_across_rows(rank: int, n: int) -> Any:
    """Under Ulysses lengths are about the flattened batch, so a document may cross a row."""
    cu = [0, 5, 17, 24]
    whole = draw(2, 12, (4, 2), 8)
    flat = [x.flatten(0, 1)[None] for x in whole]
    want = [x.view(2, 12, *x.shape[2:]) for x in dense(*flat, cu, 4)]
    rows = torch.arange(12).chunk(n)[rank]
    shard = shard_of("contiguous", torch.tensor(cu, dtype=torch.int32), window=4)
    got = forward_backward("ulysses", whole, rows, shard)
    return worst(got, [x[:, rows] for x in want])


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_takes_documents_that_cross_rows(n: int) -> None:
    assert max(on_ranks(n, documents_across_rows)) < 1e-12
