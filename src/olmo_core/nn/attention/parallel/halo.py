"""The short causal convolution of contiguous shards: a rank's first rows see other ranks' last.

The halo is what the convolution takes for its state: the inputs before the shard, with zeros for
those of other documents. It is as small as the kernel, so it is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import olmo_core.nn.attention.kernels.convolution  # noqa: F401, it defines the op
from olmo_core.distributed.collectives import place_in
from olmo_core.nn.attention.parallel.exchange import Exchange, plan_exchange
from olmo_core.nn.attention.parallel.layout import ContiguousLayout, SpanTable
from olmo_core.nn.attention.parallel.op import (
    ARGUMENTS,
    LIBRARY,
    TAGS,
    Shard,
    agreed_documents,
    documents_of,
)
from olmo_core.nn.attention.parallel.plan import span_table
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable

_STREAMS = 3


@dataclass(frozen=True)
class HaloPlan:
    """One rank's part in a convolution of contiguous shards."""

    exchange: Exchange
    """Of the last rows of each shard, as many as the kernel reaches back."""
    seen: Tensor | None
    """How many earlier tokens each row may see, the halo's included: int32, ``(rows,)``; None for
    all, where the shard is of one document."""


def halo_plan(reading: Reading, ranks: int, rank: int, past: int) -> HaloPlan:
    """The rows before each shard that its first document has, at most ``past``.

    A halo reaches over several ranks where shards are shorter.
    """

    def compute() -> HaloPlan:
        rows = reading.values[-1] // ranks
        spans = span_table(reading, ContiguousLayout.name, ranks)
        last = torch.maximum(spans.start, (spans.rank + 1) * rows - past)
        held = _those(last < spans.stop, spans._replace(start=last))
        first = torch.maximum(spans.document, spans.start - past)
        wanted = _those(first < spans.start, spans._replace(start=first, stop=spans.start))
        own, seen = spans.of(rank), None
        if len(own.start) > 1:
            begins = own.start.clone()
            begins[0] -= past
            positions = own._replace(document=begins).positions()
            seen = positions.to(torch.int32).to(reading.device)
        return HaloPlan(plan_exchange(held, wanted, rank, ranks).to(reading.device), seen)

    return reading.derive(("halo", ranks, rank, past), compute)


def _those(wanted: Tensor, table: SpanTable) -> SpanTable:
    return SpanTable(*(column[wanted] for column in table))


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    xs, weights, biases, silu, shard = _parts(inputs)
    past, width = weights[0].shape[2] - 1, sum(x.shape[2] for x in xs)
    rank, ranks = place_in(shard.group)
    rows = xs[0].shape[1]
    reading = agreed_documents(shard, xs[0].unsqueeze(2), (1, width), ranks, rows)
    plan = halo_plan(reading, ranks, rank, past)
    last = torch.cat([x[:, rows - plan.exchange.held :] for x in xs], dim=2)
    fetched = plan.exchange.fetch(last, shard.group)()
    halo = F.pad(fetched, (0, 0, past - plan.exchange.wanted, 0)).contiguous()
    outs = torch.ops.olmo_core.short_convolution(
        *xs, *weights, *biases, *_states(halo, xs), plan.seen, silu, False
    )
    return *outs[:_STREAMS], halo


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    dys, halo = inputs[:_STREAMS], inputs[_STREAMS]
    xs, weights, biases, silu, shard = _parts(inputs[_STREAMS + 1 :])
    past, rows = halo.shape[1], xs[0].shape[1]
    rank, ranks = place_in(shard.group)
    plan = halo_plan(documents_of(shard, ranks, rows, halo.device), ranks, rank, past)
    *grads, a, b, c = torch.ops.olmo_core.short_convolution_backward(
        *dys, None, None, None, *xs, *weights, *biases, *_states(halo, xs), plan.seen, silu
    )
    if plan.exchange.moves:
        d_halo = torch.cat((a, b, c), dim=2)[:, past - plan.exchange.wanted :]
        back = plan.exchange.give_back(d_halo, shard.group)()
        for dx, d in zip(grads, back.split([x.shape[2] for x in xs], dim=2), strict=False):
            dx[:, rows - plan.exchange.held :] += d
    return tuple(grads)


def _parts(
    inputs: Sequence[Any],
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Any], bool, Shard]:
    xs, weights, biases = (inputs[i * _STREAMS : (i + 1) * _STREAMS] for i in range(3))
    silu, *arguments = inputs[3 * _STREAMS :]
    return xs, weights, biases, silu, Shard(*arguments)


def _states(halo: Tensor, xs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if halo.shape[1] == 0:
        return [None] * _STREAMS
    return halo.split([x.shape[2] for x in xs], dim=2)


def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    xs, weights, *_ = _parts(inputs)
    batch, past = xs[0].shape[0], weights[0].shape[2] - 1
    halo = xs[0].new_empty(batch, past, sum(x.shape[2] for x in xs))
    return *(x.new_empty(x.shape) for x in xs), halo


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    tensors = inputs[_STREAMS + 1 : 4 * _STREAMS + 1]
    empty = inputs[0].new_empty(0)
    return tuple(empty if x is None else x.new_empty(x.shape) for x in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu, lengths = inputs[: 3 * _STREAMS + 2]
    ctx.rest = inputs[3 * _STREAMS + 2 :]
    ctx.save_for_backward(output[-1], *tensors, lengths)
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    halo, *tensors, lengths = ctx.saved_tensors
    # Where no loss depends on this rank's rows the others still wait for it.
    dys = [
        torch.zeros_like(x) if dy is None else dy
        for x, dy in zip(tensors, grads[:_STREAMS], strict=False)
    ]
    found = _call_backward(*dys, halo, *tensors, ctx.silu, lengths, *ctx.rest)
    given = (None if x is None else d for x, d in zip(tensors, found, strict=True))
    return *given, *(None,) * (2 + len(ctx.rest))


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w_q, Tensor w_k, Tensor w_v, "
    f"Tensor? b_q, Tensor? b_k, Tensor? b_v, bool silu, {ARGUMENTS}"
)
LIBRARY.define(
    f"sharded_causal_conv1d({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    f"sharded_causal_conv1d_backward(Tensor d_q, Tensor d_k, Tensor d_v, Tensor halo, {_INPUTS}) "
    f"-> ({', '.join(['Tensor'] * 3 * _STREAMS)})",
    tags=TAGS,
)
_call_backward = register_differentiable(
    LIBRARY, "sharded_causal_conv1d_backward", _backward, _backward_fake, refuse_second_derivative(
        "sharded_causal_conv1d", "torch.nn.functional.conv1d with groups on one rank"
    ),
)  # fmt: skip
sharded_causal_conv1d = register_differentiable(
    LIBRARY, "sharded_causal_conv1d", _forward, _forward_fake, _differentiate, _save
)
"""The op ``sharded_causal_conv1d(q, k, v, w_q, w_k, w_v, b_q, b_k, b_v, silu, *shard) ->
(q, k, v, halo)``: see :class:`.Shard` and :func:`.causal_conv1d`.

Of three inputs ``(b, t, channels)``, this rank's rows of contiguous shards over the group, with
weights ``(channels, 1, kernel)`` and biases ``(channels,)`` or None. Gradients of weights are this
rank's part. What the convolutions saw of other ranks comes last, ``(b, kernel - 1, channels)``."""
