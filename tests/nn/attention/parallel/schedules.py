"""What the tests of the schedules share: a dense oracle, places in a mesh, and shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.layout import LAYOUTS
from olmo_core.nn.attention.parallel.schedule import attend_sharded
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)

SCALE = 0.3
STYLES = {"contiguous": "llama3", "zig_zag": "zig_zag", "balanced": "balanced"}
"""The load balancer of each layout."""
_CONTEXTS: dict[Any, ContextParallel] = {}


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


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def context_of(
    n: int, layout: str | None = None, *, ulysses: int = 1, head_stride: int = 1
) -> ContextParallel:
    """This rank's place among ``n``.

    :param layout: Of the ring; None for Ulysses alone.
    :param ulysses: The Ulysses degree inside the ring.
    """
    key = (n, layout, ulysses, head_stride)
    if key not in _CONTEXTS:
        both = layout is not None and ulysses > 1
        shape = (n // ulysses, ulysses) if both else (n,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses")[: len(shape)])
        ring = uly = None
        if layout is not None:
            ring = RingContextParallelStyle(STYLES[layout], head_stride=head_stride)
        if both or ring is None:
            uly = UlyssesContextParallelStyle()
        _CONTEXTS[key] = ContextParallel.from_mesh(mesh, ring, uly)
    return _CONTEXTS[key]


def own_rows(layout: str | None, cu: Sequence[int], rank: int, n: int, ulysses: int = 1) -> Tensor:
    """The tokens of a rank's rows."""
    if layout is None:
        return torch.arange(cu[-1]).chunk(n)[rank]
    ring, part = divmod(rank, ulysses)
    return LAYOUTS[layout].table(cu, n // ulysses).of(ring).tokens().chunk(ulysses)[part]


def attend_on(
    context: ContextParallel, *qkv: Tensor, lengths: Tensor | None, **more: Any
) -> Tensor:
    return attend_sharded(*qkv, context, lengths, scale=SCALE, **{"kernel": "torch", **more})


def forward_backward(
    context: ContextParallel, whole: Sequence[Tensor], rows: Tensor, **more: Any
) -> list[Tensor]:
    """``[out, dq, dk, dv]`` of one rank's rows."""
    *qkv, dout = (x[:, rows] for x in whole)
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = attend_on(context, *qkv, **more)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
