"""Ring attention in zig-zag: for long documents whose gathered keys would not fit.

Keys go round, and each rank merges what each shard adds. A rank holds at most two shards: the one
that it computes with, and the next, on its way. Every step is one of three varlen problems, of
equal work on all ranks (:class:`.RingPlan`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_core.distributed.collectives import Pending, place_in, rotate
from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.softmax import get_kernel
from olmo_core.nn.attention.parallel.exchange import accumulator
from olmo_core.nn.attention.parallel.op import (
    Shard,
    agreed_documents,
    documents_of,
    register_attention,
)
from olmo_core.nn.attention.parallel.plan import RingPlan, ring_plan
from olmo_core.nn.attention.segments import Segments


class Step(NamedTuple):
    """One shard of keys: which queries see which of them, and how."""

    queries: Tensor | None
    """The rows of the queries; None for all."""
    keys: Tensor | None
    segments: Segments


def _pick(x: Tensor, index: Tensor | None, dim: int = 1) -> Tensor:
    return x if index is None else x.index_select(dim, index)


def _one_row(x: Tensor) -> Tensor:
    """The flattened batch as its only row."""
    return x if x.shape[0] == 1 else x.flatten(0, 1)[None]


def ring_steps(plan: RingPlan, rank: int, ranks: int) -> list[Step]:
    """What ``rank`` computes. In step ``i`` it has the keys of the rank ``i`` before it."""
    earlier = Step(None, plan.early, plan.from_earlier)
    later = Step(plan.late, None, plan.from_later)
    own = Step(None, None, plan.own)
    return [own, *(earlier if i <= rank else later for i in range(1, ranks))]


def _rounds(k: Tensor, v: Tensor, plan: RingPlan, group: str) -> Iterator[tuple[Step, Tensor]]:
    """The steps with the keys and values that are here, ``(1, b * t, g, 2 * d)``.

    The next shard is on its way before the caller computes.
    """
    rank, ranks = place_in(group)
    here = _one_row(torch.cat((k, v), dim=-1).contiguous())
    for i, step in enumerate(ring_steps(plan, rank, ranks)):
        coming = rotate(here[0], group) if i + 1 < ranks else None
        yield step, here
        if coming is not None:
            here = coming.wait()[None]


def merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add a block of keys to an attention output, in place.

    :param out: ``(1, t, h, d)``, float32 or wider.
    :param lse: ``(1, h, t)``.
    :param more: The output over the new keys alone.
    :param more_lse: Its log-sum-exp; -inf where a query sees none of them.
    """
    total = torch.logaddexp(lse, more_lse)
    finite = torch.where(total == -math.inf, 0.0, total)  # rows without any key: weights of 0
    old, new = (torch.exp(x - finite).transpose(1, 2)[..., None] for x in (lse, more_lse))
    out.mul_(old).addcmul_(more.to(out.dtype), new)
    lse.copy_(total)


def _forward(q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    _, ranks = place_in(shard.group)
    heads = (q.shape[2], k.shape[2])
    reading = agreed_documents(shard, q, heads, ranks, q.shape[1])
    plan = ring_plan(reading, ranks, q.shape[0])
    kernel, d = get_kernel(shard.kernel), q.shape[3]
    (q1,) = rows(_one_row(q))
    late = q1.index_select(1, plan.late) if ranks > 1 else q1
    out = lse = None
    for step, keys_values in _rounds(k, v, plan, shard.group):
        keys_values = _pick(keys_values, step.keys)
        queries = q1 if step.queries is None else late
        more, more_lse, _ = kernel.forward(
            queries, keys_values[..., :d], keys_values[..., d:], step.segments, scale=shard.scale
        )
        del keys_values  # or this shard would live on while the one after the next arrives
        if out is None or lse is None:
            out, lse = more.to(accumulator(q.dtype)), more_lse
        elif step.queries is None:
            merge_(out, lse, more, more_lse)
        else:
            part, part_lse = _pick(out, step.queries), _pick(lse, step.queries, dim=2)
            merge_(part, part_lse, more, more_lse)
            out.index_copy_(1, step.queries, part)
            lse.index_copy_(2, step.queries, part_lse)
    assert out is not None and lse is not None
    return out.to(q.dtype).view(q.shape), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    _, ranks = place_in(shard.group)
    plan = ring_plan(documents_of(shard, ranks, q.shape[1], q.device), ranks, q.shape[0])
    kernel, rng, d = get_kernel(shard.kernel), q.new_empty(0, dtype=torch.int64), q.shape[3]
    (q1,) = rows(_one_row(q))
    whole = (dout.contiguous().view(q1.shape), q1, out.view(q1.shape))
    late = tuple(x.index_select(1, plan.late) for x in whole) if ranks > 1 else whole
    late_lse = lse.index_select(2, plan.late) if ranks > 1 else lse

    acc = accumulator(q.dtype)
    dq: Tensor | None = None
    home = torch.empty(0)
    coming: Pending | None = None
    for step, keys_values in _rounds(k, v, plan, shard.group):
        keys_values = _pick(keys_values, step.keys)
        do, qs, o = whole if step.queries is None else late
        part, *d_keys_values = kernel.backward(
            do, qs, keys_values[..., :d], keys_values[..., d:], o,
            lse if step.queries is None else late_lse, rng, step.segments, scale=shard.scale,
        )  # fmt: skip
        del keys_values
        gradient = torch.cat(d_keys_values, dim=-1).to(acc)
        if dq is None:
            dq, home = part.to(acc), gradient
            continue
        # The gradient of a shard follows it from rank to rank, a step behind, and then goes home.
        travelling = torch.zeros_like(home) if coming is None else coming.wait()[None]
        if step.keys is not None:
            dq += part
            travelling.index_add_(1, step.keys, gradient)
        elif step.queries is not None:
            dq.index_add_(1, step.queries, part.to(acc))
            travelling += gradient
        coming = rotate(travelling[0], shard.group)
    assert dq is not None
    if coming is not None:
        home += coming.wait()[None]
    home = home.to(k.dtype).view(*k.shape[:3], 2 * d)
    return dq.to(q.dtype).view(q.shape), home[..., :d].contiguous(), home[..., d:].contiguous()


ring = register_attention("ring", _forward, _backward)
"""The op ``ring(q, k, v, *shard) -> (out, lse)``: see :class:`.Shard`; the layout is zig-zag and
there is no window.

``q`` is ``(b, t, h, d)``, this rank's rows; ``k`` and ``v`` are ``(b, t, g, d)``. A batch of more
than one row has no lengths."""
