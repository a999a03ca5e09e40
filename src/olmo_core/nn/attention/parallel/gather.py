"""Attention over gathered keys: the schedule for any layout, window and documents.

One exchange brings just the keys that a rank's queries see, from wherever they lie. What remains is
one varlen problem, a segment for each span, so the kernel computes what it would compute on one
rank, and rounds as often. Only the own keys are saved; backward gathers the others again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from olmo_core.distributed.collectives import place_in
from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.softmax import get_kernel
from olmo_core.nn.attention.parallel.op import (
    Shard,
    agreed_documents,
    documents_of,
    register_attention,
)
from olmo_core.nn.attention.parallel.plan import GatherPlan, gather_plan
from olmo_core.nn.attention.parallel.readings import Reading


def _forward(q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    _, ranks = place_in(shard.group)
    heads = (q.shape[2], k.shape[2])
    plan = _plan(q, shard, agreed_documents(shard, q, heads, ranks, q.shape[1]))
    kernel = get_kernel(shard.kernel)
    b, t, h, _ = q.shape
    out = lse = None
    for hq, keys, values in _gathered(q, k, v, plan, shard):
        queries, keys, values = rows(q[:, :, hq], keys, values)
        part, part_lse, _ = kernel.forward(queries, keys, values, plan.segments, scale=shard.scale)
        del keys, values
        if part.shape == q.shape:
            return part, part_lse
        if out is None or lse is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            lse = q.new_empty((1, h, b * t), dtype=part_lse.dtype)
        out[:, :, hq], lse[:, hq] = part, part_lse
    assert out is not None and lse is not None
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    _, ranks = place_in(shard.group)
    plan = _plan(q, shard, documents_of(shard, ranks, q.shape[1], q.device))
    kernel, rng = get_kernel(shard.kernel), q.new_empty(0, dtype=torch.int64)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    store = None
    for hq, keys, values in _gathered(q, k, v, plan, shard):
        hk = slice(hq.start * k.shape[2] // q.shape[2], hq.stop * k.shape[2] // q.shape[2])
        queries, keys, values = rows(q[:, :, hq], keys, values)
        dout_part, out_part = (x[:, :, hq].contiguous() for x in (dout, out))
        part, *d_gathered = kernel.backward(
            dout_part, queries, keys, values, out_part, lse[:, hq].contiguous(), rng,
            plan.segments, scale=shard.scale,
        )  # fmt: skip
        del keys, values
        if part.shape == q.shape:
            dq = part.contiguous()
        else:
            dq[:, :, hq] = part
        if store is not None:
            store()
        store = _give_back(d_gathered, plan, shard, dk[:, :, hk], dv[:, :, hk])
    if store is not None:
        store()
    return dq, dk, dv


def _plan(q: Tensor, shard: Shard, reading: Reading) -> GatherPlan:
    rank, ranks = place_in(shard.group)
    plan = gather_plan(reading, shard.layout, ranks, rank, shard.window, q.shape[0])
    assert plan.exchange.held == q.shape[1]
    return plan


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, plan: GatherPlan, shard: Shard
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Query heads with the keys and values that they see, group after group.

    The next group is packed and on its way before the caller computes, and no more than these two
    are alive.
    """
    if not plan.exchange.moves:
        yield slice(0, q.shape[2]), k, v
        return
    n, d, per_head = k.shape[2], k.shape[3], q.shape[2] // k.shape[2]
    groups = [slice(i, min(i + shard.head_stride, n)) for i in range(0, n, shard.head_stride)]

    def start(heads: slice) -> Callable[[], Tensor]:
        packed = torch.cat((k[:, :, heads], v[:, :, heads]), dim=-1)
        return plan.exchange.fetch(packed, shard.group)

    wait = start(groups[0])
    for i, heads in enumerate(groups):
        keys_values = wait()
        if i + 1 < len(groups):
            wait = start(groups[i + 1])
        hq = slice(heads.start * per_head, heads.stop * per_head)
        yield hq, keys_values[..., :d], keys_values[..., d:]
        del keys_values


def _give_back(
    gradients: list[Tensor], plan: GatherPlan, shard: Shard, dk: Tensor, dv: Tensor
) -> Callable[[], None]:
    """Start sending the gradients of gathered keys home; the result stores what came home."""
    if not plan.exchange.moves:
        dk.copy_(gradients[0])
        dv.copy_(gradients[1])
        return lambda: None
    wait = plan.exchange.give_back(torch.cat(gradients, dim=-1), shard.group)

    def store() -> None:
        total = wait()
        dk.copy_(total[..., : dk.shape[-1]])
        dv.copy_(total[..., dk.shape[-1] :])

    return store


gather = register_attention("gather", _forward, _backward)
"""The op ``gather(q, k, v, *shard) -> (out, lse)``: see :class:`.Shard`.

``q`` is ``(b, t, h, d)``, this rank's rows in its layout; ``k`` and ``v`` are ``(b, t, g, d)``. A
batch of more than one row has no lengths."""
