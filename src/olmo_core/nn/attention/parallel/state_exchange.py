"""The gated delta rule of contiguous shards: ranks exchange states, whatever their tokens.

A shard is an affine map of its incoming state: with T tokens S_out = M S_in + N. All ranks' maps
are gathered, composed from the rank on where a document starts, and the rule runs from the result.
Backward is the same with M transposed, from the rank on where a document ends. No gradient goes
through maps.

A rank that no document reaches or leaves, and one that is the first or last of its documents, needs
no map: one pass each way gives what it sends. K x (K + V) numbers a head are sent.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_core.distributed.collectives import all_gather, place_in
from olmo_core.nn.attention.kernels.gated_delta_rule.chunks import RuleInputs, accumulation_dtype
from olmo_core.nn.attention.kernels.gated_delta_rule.op import SAVED
from olmo_core.nn.attention.kernels.gated_delta_rule.span import span_backward, span_forward
from olmo_core.nn.attention.parallel.op import ARGUMENTS, LIBRARY, TAGS, Shard, documents_of
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable


@dataclass(frozen=True)
class StatePlan:
    """Where one rank's incoming state is from, and where its outgoing one is used."""

    before: Sequence[int]
    """The ranks, first to last, that hold earlier tokens of the document of its first row."""
    after: Sequence[int]
    """Those that hold later tokens of the document of its last row."""
    first_stop: int
    """One past the last row of the first document, or of what is here of it."""
    last_start: int
    """The row at which the last document starts, or goes on from ``before``."""
    documents: Tensor | None
    """Cumulative lengths of its pieces of documents, int32; None if it is one piece."""
    moves: bool
    """Whether any document lies on more than one rank: the same answer on all ranks."""


def state_plan(reading: Reading, ranks: int, rank: int) -> StatePlan:
    """The plan of ``rank`` of ``ranks`` contiguous shards."""

    def compute() -> StatePlan:
        ends = sorted(set(reading.values))
        rows = ends[-1] // ranks
        first, stop = rank * rows, (rank + 1) * rows
        inner = [end for end in ends if first < end < stop]
        starts_at = ends[bisect_right(ends, first) - 1]
        ends_at = ends[bisect_right(ends, stop - 1)]
        documents = None
        if inner:
            pieces = [0, *(end - first for end in inner), rows]
            documents = torch.tensor(pieces, dtype=torch.int32, device=reading.device)
        return StatePlan(
            before=range(starts_at // rows, rank),
            after=range(rank + 1, (ends_at - 1) // rows + 1),
            first_stop=inner[0] - first if inner else rows,
            last_start=inner[-1] - first if inner else 0,
            documents=documents,
            moves=any(i * rows not in ends for i in range(1, ranks)),
        )

    return reading.derive(("states", ranks, rank), compute)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    normalize_qk: bool,
    save: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    shard, plan = _plan(q, arguments)
    inputs = (q, k, v, g, beta)

    def incoming(n: Tensor, m: Tensor) -> Tensor:
        maps = _gathered(n, m, shard)
        return _composed(maps, plan.before, v.shape[3], transposed=False)

    if plan.before and plan.after:
        x = RuleInputs.of(inputs, plan.documents, shard.scale, normalize_qk)
        return span_forward(x, incoming, plan.last_start, save=save)
    n, m = _empty_map(q, v)
    options = (plan.documents, shard.scale, normalize_qk, save)
    if plan.before:
        out, _, *saved = _rule(*inputs, incoming(n, m), *options)
        return out, m, *saved
    out, n, *saved = _rule(*inputs, None, *options)
    if plan.moves:
        _gathered(n, m, shard)
    return out, m, *saved


def _composed(maps: Tensor, ranks: Sequence[int], value_dim: int, *, transposed: bool) -> Tensor:
    """The state that leaves the last of ``ranks``, of those that a document passes in this order.

    The first one's M is not read: the document starts there, and 0 * NaN would bring in another's.

    :param maps: ``(all ranks, b, heads, k, v + k)``, [N | M].
    """
    state, *_ = maps[ranks[0]].split((value_dim, maps.shape[3]), -1)
    with torch.autocast(maps.device.type, enabled=False):
        for rank in ranks[1:]:
            n, m = maps[rank].split((value_dim, maps.shape[3]), -1)
            state = n + (m.mT if transposed else m) @ state
    return state.contiguous()


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    m: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    saved, (normalize_qk, *arguments) = rest[:SAVED], rest[SAVED:]
    shard, plan = _plan(q, arguments)

    inputs = (q, k, v, g, beta)

    def outgoing(dstate: Tensor) -> Tensor:
        maps = _gathered(dstate, m, shard)
        return _composed(maps, plan.after[::-1], v.shape[3], transposed=True)

    if plan.before and plan.after:
        x = RuleInputs.of(inputs, plan.documents, shard.scale, normalize_qk)
        return span_backward(dout, x, tuple(saved), outgoing, plan.first_stop)
    dstate, _ = _empty_map(q, v)
    dfinal = outgoing(dstate) if plan.after else None
    found: tuple[Tensor, ...] = torch.ops.olmo_core.gated_delta_rule_backward(
        dout, dfinal, *inputs, *saved, plan.documents, shard.scale, normalize_qk
    )
    if plan.moves and not plan.after:
        _gathered(found[5] if plan.before else dstate, m, shard)
    return found[:5]


def _gathered(n: Tensor, m: Tensor, shard: Shard) -> Tensor:
    """[N | M] of all ranks, ``(all ranks, b, heads, k, v + k)``."""
    return all_gather(torch.cat((n, m), -1), shard.group).wait()


def _plan(q: Tensor, arguments: Sequence[Any]) -> tuple[Shard, StatePlan]:
    shard = Shard(*arguments)
    rank, ranks = place_in(shard.group)
    return shard, state_plan(documents_of(shard, ranks, q.shape[1], q.device), ranks, rank)


def _rule(*inputs: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.olmo_core.gated_delta_rule(*inputs)
    return found


def _empty_map(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = (q.shape[0], v.shape[2], q.shape[3]), accumulation_dtype(q.dtype)
    n = q.new_zeros((*shape, v.shape[3]), dtype=dtype)
    return n, q.new_zeros((*shape, q.shape[3]), dtype=dtype)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    normalize_qk: bool,
    save: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    scale = Shard(*arguments).scale
    out, _, *saved = _rule(q, k, v, g, beta, None, None, scale, normalize_qk, save)
    return out, _empty_map(q, v)[1], *saved


def _backward_fake(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize_qk, _, lengths = inputs[:8]
    ctx.rest = inputs[8:]
    ctx.save_for_backward(*tensors, *output[1:], lengths)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, lengths = ctx.saved_tensors
    if dout is None:  # the other ranks wait for this one's part of theirs
        dout = torch.zeros_like(tensors[2])
    grads = _call_backward(dout, *tensors, ctx.normalize_qk, lengths, *ctx.rest)
    return *grads, *(None,) * (3 + len(ctx.rest))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"
_KEPT = "Tensor m, Tensor states, Tensor updates, Tensor inverses, Tensor scores, Tensor erasers"
LIBRARY.define(
    f"sharded_gated_delta_rule({_INPUTS}, bool normalize_qk, bool save, {ARGUMENTS}) "
    f"-> ({', '.join(['Tensor'] * (2 + SAVED))})",
    tags=TAGS,
)
LIBRARY.define(
    f"sharded_gated_delta_rule_backward(Tensor dout, {_INPUTS}, {_KEPT}, bool normalize_qk, "
    f"{ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
_call_backward = register_differentiable(
    LIBRARY, "sharded_gated_delta_rule_backward", _backward, _backward_fake,
    refuse_second_derivative("sharded_gated_delta_rule", "gated_delta_rule_reference on one rank"),
)  # fmt: skip
_call = register_differentiable(
    LIBRARY, "sharded_gated_delta_rule", _forward, _forward_fake, _differentiate, _save
)


def sharded_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, shard: Shard, *, normalize_qk: bool
) -> Tensor:
    """:func:`.gated_delta_rule` of this rank's rows of contiguous shards over a group.

    :param q: ``(b, t, h, k)``; likewise ``k``.
    :param v: ``(b, t, hv, v)``.
    :param g: ``(b, t, hv)``; likewise ``beta``.
    :param shard: With the documents of the whole sequence, on which the ranks agreed.
    :returns: Like ``v``.
    """
    wants_gradient = any(x.requires_grad for x in (q, k, v, g, beta))
    save = torch.is_grad_enabled() and wants_gradient
    out: Tensor = _call(q, k, v, g, beta, normalize_qk, save, *shard)[0]
    return out
