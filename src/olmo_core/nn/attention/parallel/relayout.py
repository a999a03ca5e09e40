"""The same rows on other ranks: from a load balancer's layout to contiguous shards, and back.

Linear attention needs no balance, and a shard that is one stretch of the sequence has one incoming
state. Every rank holds as many rows before as after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmo_core.distributed.collectives import place_in
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.exchange import Exchange, plan_exchange
from olmo_core.nn.attention.parallel.layout import ContiguousLayout
from olmo_core.nn.attention.parallel.op import ARGUMENTS, LIBRARY, TAGS, Shard, agreed_documents
from olmo_core.nn.attention.parallel.plan import WHOLE, span_table
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.dispatch import register_differentiable


def to_contiguous(x: Tensor, context: ContextParallel, shard: Shard) -> tuple[Tensor, Shard]:
    """This rank's rows of contiguous shards, and what later ops are told.

    :param x: ``(b, t, d)``, its rows in the layout of ``context``.
    """
    if context.layout in (WHOLE, ContiguousLayout.name):
        return x, shard
    shard = shard._replace(group=context.everyone)
    x = relayout(x, False, context.ulysses_degree, *shard)
    return x, shard._replace(everyone="")


def from_contiguous(x: Tensor, context: ContextParallel, shard: Shard) -> Tensor:
    """The way back."""
    if context.layout in (WHOLE, ContiguousLayout.name):
        return x
    shard = shard._replace(group=context.everyone, everyone="")
    out: Tensor = relayout(x, True, context.ulysses_degree, *shard)
    return out


def relayout_plan(
    reading: Reading, layout: str, ranks: int, parts: int, rank: int, back: bool
) -> Exchange:
    """The rows that ``rank`` of ``ranks * parts`` sends and receives.

    :param ranks: How many the layout deals to.
    :param parts: How many share each of its shards.
    :param back: From contiguous shards to the layout's.
    """

    def compute() -> Exchange:
        rows = reading.values[-1] // (ranks * parts)
        dealt = span_table(reading, layout, ranks).cut(rows)
        contiguous = span_table(reading, ContiguousLayout.name, ranks * parts)
        held, wanted = (contiguous, dealt) if back else (dealt, contiguous)
        return plan_exchange(held, wanted, rank, ranks * parts).to(reading.device)

    return reading.derive(("relayout", layout, ranks, parts, rank, back), compute)


def _forward(x: Tensor, back: bool, parts: int, *arguments: Any) -> Tensor:
    shard = Shard(*arguments)
    rank, size = place_in(shard.group)
    ranks, rows = size // parts, x.shape[1] * parts
    reading = agreed_documents(shard, x.unsqueeze(2), (1,), ranks, rows)
    plan = relayout_plan(reading, shard.layout, ranks, parts, rank, back)
    return plan.fetch(x, shard.group)().contiguous()


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.back, ctx.parts, lengths, *ctx.rest, _ = inputs
    ctx.save_for_backward(lengths)


def _differentiate(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    (lengths,) = ctx.saved_tensors
    back = relayout(d, not ctx.back, ctx.parts, lengths, *ctx.rest, "")
    return back, *(None,) * (4 + len(ctx.rest))


LIBRARY.define(
    f"relayout(Tensor x, bool back, SymInt parts, {ARGUMENTS}) -> Tensor",
    tags=TAGS,
)
relayout = register_differentiable(LIBRARY, "relayout", _forward, _fake, _differentiate, _save)
"""The op ``relayout(x, back, parts, *shard) -> Tensor``: see :class:`.Shard`.

``x`` is ``(b, t, d)``, and so is what it gives: this rank's rows of contiguous shards over the
group, for its rows in the shard's layout, of whose shards each is cut in ``parts``; or, ``back``,
the other way. Its gradient goes the way back."""
