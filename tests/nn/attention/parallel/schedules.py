"""What the tests of the schedules share: a dense oracle, and every schedule by name on a shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.nn.attention.ops import attend
from olmo_core.nn.attention.parallel.gather import gather
from olmo_core.nn.attention.parallel.layout import LAYOUTS
from olmo_core.nn.attention.parallel.op import Shard
from olmo_core.nn.attention.parallel.plan import WHOLE
from olmo_core.nn.attention.parallel.ring import ring
from olmo_core.nn.attention.parallel.ulysses import ulysses
from olmo_core.nn.attention.segments import Segments

SCALE = 0.3


def dense(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu: Sequence[int], window: int
) -> list[Tensor]:
    """``[out, dq, dk, dv]`` by masks, softmax and autograd."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    at = torch.arange(q.shape[1])
    document = torch.searchsorted(torch.tensor(cu), at, right=True)
    mask = (document[:, None] == document) & (at[None] <= at[:, None])
    if window > 0:
        mask &= at[None] > at[:, None] - window
    repeat = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * SCALE
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def draw(
    batch: int, total: int, heads: tuple[int, int], dim: int, seed: int = 1
) -> tuple[Tensor, ...]:
    """``q, k, v, dout`` in float64, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k = heads
    return tuple(
        torch.randn(batch, total, n, dim, generator=generator, dtype=torch.float64)
        for n in (n_q, n_k, n_k, n_q)
    )


def world() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def shard_of(layout: str, lengths: Tensor | None, **changed: Any) -> Shard:
    """A shard over all ranks."""
    shard = Shard(
        lengths=lengths, layout=layout, local=False, window=-1, head_stride=1, scale=SCALE,
        kernel="torch", group=world(), everyone=world(),
    )  # fmt: skip
    return shard._replace(**changed)


def run(
    schedule: str, q: Tensor, k: Tensor, v: Tensor, shard: Shard, *, ring_group: str = ""
) -> Tensor:
    """A schedule's output.

    :param schedule: ``ring``, ``gather`` or ``ulysses``, or one of the first two with ``ulysses+``
        before it: ``shard.group`` is then the inner group, and ``ring_group`` the outer one.
    """
    if schedule == "ring":
        return ring(q, k, v, *shard)[0]
    if schedule == "gather":
        return gather(q, k, v, *shard)[0]
    degree = dist.get_world_size(dist.distributed_c10d._resolve_process_group(shard.group))
    if schedule == "ulysses":
        lengths, shard = shard.lengths, shard._replace(layout=WHOLE)

        def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if lengths is None:
                problem = Segments.dense(q.shape[1], k.shape[1], window=shard.window)
            else:
                total = q.shape[0] * q.shape[1]
                problem = Segments.documents(lengths, total, window=shard.window)
            return attend(q, k, v, problem, scale=SCALE, kernel=shard.kernel)

    else:
        of_ring = shard._replace(group=ring_group, everyone="")

        def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run(schedule.removeprefix("ulysses+"), q, k, v, of_ring)

    return ulysses(q, k, v, inner, degree, shard)


def own_rows(layout: str, cu: Sequence[int], rank: int, n: int) -> Tensor:
    return LAYOUTS[layout].table(cu, n).of(rank).tokens()


def forward_backward(
    schedule: str, whole: Sequence[Tensor], rows: Tensor, shard: Shard, **more: Any
) -> list[Tensor]:
    """``[out, dq, dk, dv]`` of one rank's rows."""
    *qkv, dout = (x[:, rows] for x in whole)
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = run(schedule, *qkv, shard, **more)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
