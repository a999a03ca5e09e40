"""Ulysses: each rank has all tokens of a part of the heads while it attends.

Two even all-to-alls, around any attention over the whole sequence (or, inside a ring, over the
ring's shard).
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor

from olmo_core.distributed.collectives import place_in, swap
from olmo_core.nn.attention.parallel.op import ARGUMENTS, LIBRARY, TAGS, Shard, agreed_documents
from olmo_core.nn.dispatch import register_differentiable


def check_heads(n_heads: int, n_kv_heads: int, degree: int) -> int:
    """How often kv heads must be repeated so that ``degree`` ranks can share the heads.

    Query heads are a multiple of the kv heads, so if the degree divides them, they are also a
    multiple of the repeated ones.

    :raises ValueError: If they can't.
    """
    if n_heads % degree:
        raise ValueError(
            f"Ulysses can't deal {n_heads} query heads and {n_kv_heads} kv heads to {degree} "
            "ranks: the degree must divide the query heads. Use a ring style, "
            "load_balancer='llama3' or 'zig_zag', which leaves the heads whole."
        )
    return degree // gcd(n_kv_heads, degree)


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner: Callable[[Tensor, Tensor, Tensor], Tensor],
    degree: int,
    shard: Shard,
) -> Tensor:
    """Attend with a part of the heads to all rows that the ranks of a group hold together.

    :param q: ``(b, t, h, d)``; this rank's rows.
    :param k: ``(b, t, g, d)``; likewise ``v``.
    :param inner: Attention over ``(b, t * degree, h / degree, d)``.
    :param degree: The group's size.
    :param shard: With the group, and what all ranks must agree on first.
    :returns: Like ``q``.
    """
    repeat = check_heads(q.shape[2], k.shape[2], degree)
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    # Laid out by receiver: (degree, b, t, heads, d).
    parts = [x.unflatten(2, (degree, -1)).movedim(2, 0) for x in (q, k, v)]
    packed = swap_heads(torch.cat(parts, dim=3), *shard)
    whole = packed.movedim(0, 1).flatten(1, 2)
    out = inner(*whole.split([x.shape[3] for x in parts], dim=2))
    back = swap_heads(out.unflatten(1, (degree, -1)).movedim(1, 0), *shard._replace(everyone=""))
    return back.movedim(0, 2).flatten(2, 3)


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    shard = Shard(*arguments)
    if shard.everyone:
        degree, _, rows, heads, _ = x.shape
        ranks = place_in(shard.everyone)[1] // degree
        agreed_documents(shard, x[0], (degree * heads,), ranks, rows * degree)
    return swap(x.contiguous(), shard.group)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.rest, _ = inputs


def _differentiate(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    return swap_heads(d, None, *ctx.rest, ""), *(None,) * (2 + len(ctx.rest))


LIBRARY.define(f"swap_heads(Tensor x, {ARGUMENTS}) -> Tensor", tags=TAGS)
swap_heads = register_differentiable(LIBRARY, "swap_heads", _forward, _fake, _differentiate, _save)
"""The op ``swap_heads(x, *shard) -> Tensor``: block ``i`` of ``x``, ``(ranks, b, t, h, d)``, goes
to rank ``i``, whose block for this rank comes in its place. It is its own gradient."""
