"""A rank's place in a mesh as plain values, positions in a shard, merging, and errors in bf16."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gloo_ranks import errors_on_ranks, on_ranks
from nn.attention.parallel.schedules import (
    SCALE,
    context_of,
    dense,
    draw,
    forward_backward,
    int32,
    own_rows,
)
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.positions import shard_positions
from olmo_core.nn.attention.parallel.ring import merge_
from olmo_core.nn.attention.parallel.schedule import attend_sharded
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)
from olmo_core.nn.attention.parallel.ulysses import check_heads
from olmo_core.nn.attention.segments import Segments


def places(rank: int, n: int) -> None:
    world = dist.get_world_size
    of_ring, of_ulysses = context_of(n, "contiguous", head_stride=3), context_of(n)
    assert (of_ring.load_balancer, of_ring.layout, of_ring.head_stride) == (
        "llama3", "contiguous", 3,
    )  # fmt: skip
    assert (of_ring.ring_degree, of_ring.ring_rank, of_ring.ulysses_degree) == (n, rank, 1)
    assert of_ring.everyone == of_ring.ring_group and of_ring.ulysses_group == ""
    assert (of_ulysses.load_balancer, of_ulysses.layout) == ("ulysses", "whole")
    assert (of_ulysses.ulysses_degree, of_ulysses.ulysses_rank) == (n, rank)
    assert of_ulysses.ring_degree == 1 and of_ulysses.ring_group == ""

    both = context_of(n, "zig_zag", ulysses=2)
    assert (both.ring_degree, both.ulysses_degree, both.degree) == (n // 2, 2, n)
    assert (both.ring_rank, both.ulysses_rank) == divmod(rank, 2)
    groups = [both.ring_group, both.ulysses_group, both.everyone]
    sizes = [world(dist.distributed_c10d._resolve_process_group(name)) for name in groups]
    assert sizes == [n // 2, 2, n]
    assert both.rotates(-1) and not both.rotates(8) and not of_ring.rotates(-1)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    styles = RingContextParallelStyle(), UlyssesContextParallelStyle()
    first, second = (ContextParallel.from_mesh(mesh, *styles) for _ in range(2))
    assert first == second  # the flattened group is made once a mesh
    for context in (of_ring, of_ulysses, both):
        assert copy.deepcopy(context) == context == pickle.loads(pickle.dumps(context))


@pytest.mark.distributed
def test_places_in_a_mesh() -> None:
    on_ranks(4, places)


def bad_mesh(rank: int, n: int, case: str) -> None:
    ring, uly = RingContextParallelStyle(), UlyssesContextParallelStyle()
    mesh = init_device_mesh("cpu", (2,))
    if case == "no style":
        ContextParallel.from_mesh(mesh)
    if case == "two styles":
        ContextParallel.from_mesh(mesh, ring, uly)
    if case == "two dimensions":
        ContextParallel.from_mesh(init_device_mesh("cpu", (1, 2)), ring)
    if case == "no names":
        ContextParallel.from_mesh(init_device_mesh("cpu", (1, 2)), ring, uly)
    if case == "dropout":
        q = torch.zeros(1, 4, 2, 4)
        context = context_of(n, "zig_zag")
        attend_sharded(q, q, q, context, scale=SCALE, dropout_p=0.1, kernel="torch")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no style", "ValueError: Context parallelism needs a style"),
        ("two styles", "ValueError: A mesh for 2 styles has as many dimensions, got 1"),
        ("two dimensions", "ValueError: A mesh for 1 style has as many dimensions, got 2"),
        ("no names", "ValueError: A mesh of two dimensions needs names"),
        ("dropout", "RuntimeError: Attention dropout and a ring style do not go together"),
    ],
)
def test_what_is_refused(case: str, message: str) -> None:
    for error in errors_on_ranks(2, bad_mesh, case):
        assert error is not None and error.startswith(message)


@pytest.mark.parametrize(
    ("heads", "degree", "repeat"),
    [((8, 8), 4, 1), ((8, 2), 4, 2), ((8, 1), 4, 4), ((6, 2), 3, 3), ((12, 6), 4, 2)],
)
def test_kv_heads_are_repeated_until_ranks_can_share_them(
    heads: tuple[int, int], degree: int, repeat: int
) -> None:
    assert check_heads(*heads, degree) == repeat


@pytest.mark.parametrize(("heads", "degree"), [((8, 8), 3), ((6, 3), 4), ((4, 4), 8)])
def test_heads_that_ulysses_cannot_deal(heads: tuple[int, int], degree: int) -> None:
    with pytest.raises(ValueError, match=r"can't deal .* ring style, load_balancer='llama3'"):
        check_heads(*heads, degree)


def inside(cu: list[int]) -> Tensor:
    return torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])


def positions(layout: str, cu: list[int] | None, x: Tensor, place: tuple[int, ...]) -> Tensor:
    lengths = None if cu is None else int32(cu)
    return shard_positions(x, lengths, layout, False, *place)


def test_positions_in_a_shard() -> None:
    cu = [0, 8, 8, 32, 48]
    for layout in ("contiguous", "zig_zag", "balanced"):
        for rank in range(4):
            x = torch.zeros(1, 12, 3)
            want = inside(cu)[own_rows(layout, cu, rank, 4)]
            assert torch.equal(positions(layout, cu, x, (4, rank, 1, 0))[0], want)
            want = inside(cu)[own_rows(layout, cu, rank, 4, ulysses=2)]
            assert torch.equal(positions(layout, cu, x, (2, rank // 2, 2, rank % 2))[0], want)
            want = own_rows(layout, [0, 48], rank, 4)
            got = positions(layout, None, torch.zeros(2, 12, 3), (4, rank, 1, 0))
            assert torch.equal(got, want.expand(2, 12))
    local = shard_positions(torch.zeros(1, 12), int32([0, 4, 12]), "zig_zag", True, 2, 1, 1, 0)
    assert torch.equal(local[0], inside([0, 8, 24])[own_rows("zig_zag", [0, 8, 24], 1, 2)])


def test_positions_under_ulysses_alone() -> None:
    cu = [0, 5, 17, 24]  # a document crosses the two rows
    for part in range(3):
        got = positions("whole", cu, torch.zeros(2, 4, 3), (1, 0, 3, part))
        assert torch.equal(got, inside(cu).view(2, 12)[:, 4 * part : 4 * part + 4])
        got = positions("whole", None, torch.zeros(2, 4, 3), (1, 0, 3, part))
        assert torch.equal(got, torch.arange(12)[4 * part : 4 * part + 4].expand(2, 4))


def test_positions_of_another_batch_leave_the_error_to_attention() -> None:
    for cu in ([0, 7], [0, 5, 16], [0, 40], [3, 12]):
        for layout in ("contiguous", "zig_zag", "whole"):
            got = positions(layout, cu, torch.zeros(1, 6, 3), (2, 0, 1, 0))
            assert got.shape == (1, 6) and got.dtype == torch.int64


def test_merging_blocks_of_keys() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 5, 9, dtype=torch.float64)  # (heads, queries, keys)
    scores[0, 1, :4] = -math.inf  # a query that sees nothing of the first block,
    scores[1, 2, 4:] = -math.inf  # one that sees nothing of the second,
    scores[2, 3] = -math.inf  # and one that sees nothing
    values = torch.randn(3, 9, 4, dtype=torch.float64)

    def block(keys: slice) -> tuple[Tensor, Tensor]:
        part = scores[:, :, keys]
        weights = torch.where(part == -math.inf, 0.0, part.softmax(-1))
        return (weights @ values[:, keys]).transpose(0, 1)[None], part.logsumexp(-1)[None]

    (out, lse), (more, more_lse) = block(slice(0, 4)), block(slice(4, 9))
    merge_(out, lse, more, more_lse)
    want, want_lse = block(slice(0, 9))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert (out[0, 3, 2] == 0).all() and lse[0, 2, 3] == -math.inf


def squared_errors(rank: int, n: int, layout: str | None, cu: list[int]) -> list[float]:
    """Of out, dq, dk, dv in bf16 against float64: summed over this rank's rows."""
    whole = [x.bfloat16() for x in draw(1, cu[-1], (4, 2), 32)]
    rows = own_rows(layout, cu, rank, n)
    got = forward_backward(context_of(n, layout), whole, rows, lengths=int32(cu))
    want = dense(*(x.double() for x in whole), cu, -1)
    return [float((a.double() - b[:, rows]).square().sum()) for a, b in zip(got, want)]


def unsharded(cu: list[int]) -> list[float]:
    *qkv, dout = (x.bfloat16() for x in draw(1, cu[-1], (4, 2), 32))
    want = dense(*(x.double() for x in (*qkv, dout)), cu, -1)
    qkv = [x.requires_grad_() for x in qkv]
    segments = Segments.documents(int32(cu), cu[-1])
    out = attend(*qkv, segments, scale=SCALE, kernel="torch")
    got = [out, *torch.autograd.grad(out, qkv, dout)]
    return [float((a.detach().double() - b).square().sum()) for a, b in zip(got, want)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "bound"), [("contiguous", 1.1), ("balanced", 1.1), ("zig_zag", 1.5), (None, 1.1)]
)
def test_bf16_errs_like_one_rank(layout: str | None, bound: float) -> None:
    for cu in ([0, 512], [0, 32, 224, 512]):
        base = unsharded(cu)
        answers: list[Any] = on_ranks(4, squared_errors, layout, cu)
        for total, one in zip(map(sum, zip(*answers)), base, strict=True):
            assert math.sqrt(total / one) <= bound
