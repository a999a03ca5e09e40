"""Convolutions and rule of a contiguous shard: over a ring by halos and states, over Ulysses by
heads.

Shapes as in ``layer``: B batch, T this rank's tokens, H key heads, HV value heads, K, V; U is the
Ulysses degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.gated_delta_net.sizes import GatedDeltaNetSizes
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.halo import sharded_causal_conv1d
from olmo_core.nn.attention.parallel.op import Shard
from olmo_core.nn.attention.parallel.plan import WHOLE
from olmo_core.nn.attention.parallel.state_exchange import sharded_gated_delta_rule
from olmo_core.nn.attention.parallel.ulysses import swap_heads
from olmo_core.nn.convolution import CausalConv1d, convolve_streams
from olmo_core.nn.dispatch import cast_for_autocast, is_heard
from olmo_core.nn.sharded import local


def check_value_heads(n_heads: int, n_v_heads: int, degree: int) -> None:
    """:raises ValueError: If ``degree`` Ulysses ranks can't share the heads."""
    # Value heads are a multiple of the key heads, and so of those repeated until they divide.
    if n_v_heads % degree:
        raise ValueError(
            f"Ulysses can't deal {n_v_heads} value heads and {n_heads} key heads to {degree} "
            "ranks: the degree must divide the value heads. Use a ring style, "
            "load_balancer='llama3' or 'zig_zag', which leaves the heads whole."
        )


def mix_shard(
    context: ContextParallel,
    shard: Shard,
    projected: Sequence[Tensor],
    g: Tensor,
    beta: Tensor,
    *,
    sizes: GatedDeltaNetSizes,
    convolutions: Sequence[CausalConv1d],
    choose_rule: Callable[[Tensor, Tensor], Any],
) -> Tensor:
    """What the rule gives for this rank's rows: (B, T, HV, V).

    All ranks must call it together, and backward through its result too.

    :param shard: What the ops are told, with the documents of the whole sequence.
    :param projected: The convolutions' inputs, for q, k (B, T, H * K) and v (B, T, HV * V).
    :param g: (B, T, HV); likewise ``beta``.
    :param choose_rule: From q and v to a choice whose ``run`` is like :func:`.gated_delta_rule`.
    """
    pairs = zip(convolutions, projected, strict=True)
    if any(is_heard(conv) and not _gathered(conv, x) for conv, x in pairs):
        raise RuntimeError(
            "Under context parallelism each rank convolves with a part of the weights, so hooks of "
            "q_conv1d, k_conv1d and v_conv1d would not run. Remove the hooks, or hook the "
            "whole layer."
        )
    weights: list[Any] = [local(conv.weight) for conv in convolutions]
    biases: list[Any] = [local(conv.bias) for conv in convolutions]
    silu = convolutions[0].activation == "silu"
    if context.ulysses_group:
        projected, g, beta, shard = _swapped(context, shard, projected, g, beta, sizes)
        weights, biases = (_own_channels(each, context, sizes) for each in (weights, biases))

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (y.unflatten(-1, (-1, sizes.head_k_dim)) for y in (q, k))
        return q, k, v.unflatten(-1, (-1, sizes.head_v_dim))

    if context.layout == WHOLE:
        cu = None if shard.lengths is None else shard.lengths.contiguous()
        streams = [(*s, None) for s in zip(projected, weights, biases, strict=True)]
        q, k, v = split(*convolve_streams(streams, cu, silu, checked=True))
        out, _ = choose_rule(q, v).run(
            q, k, v, g, beta, cu_doc_lens=cu, normalize_qk=True, checked=True
        )
    else:
        *convolved, _ = sharded_causal_conv1d(*projected, *weights, *biases, silu, *shard)
        q, k, v = cast_for_autocast(*split(*convolved))
        shard = shard._replace(everyone="")
        out = sharded_gated_delta_rule(q, k, v, g, beta, shard, normalize_qk=True)
    if not context.ulysses_group:
        return out
    blocks = out.unflatten(1, (context.ulysses_degree, -1)).movedim(1, 0)
    back = shard._replace(group=context.ulysses_group, everyone="")
    mine: Tensor = swap_heads(blocks, *back)
    return mine.movedim(0, 2).flatten(2, 3)


def _gathered(conv: CausalConv1d, x: Tensor) -> bool:
    """Whether the only hooks are FSDP2's, which has gathered the weights for ``x``.

    It gathers those of a group at once, and a mixer's policy puts projections beside convolutions.
    """
    names = {cls.__name__ for cls in type(conv).__mro__}
    alone = len(conv._forward_pre_hooks) == len(conv._forward_hooks) == 1
    return "FSDPModule" in names and alone and local(conv.weight).shape[0] == x.shape[-1]


def _swapped(
    context: ContextParallel,
    shard: Shard,
    projected: Sequence[Tensor],
    g: Tensor,
    beta: Tensor,
    sizes: GatedDeltaNetSizes,
) -> tuple[list[Tensor], Tensor, Tensor, Shard]:
    """This rank's heads of all rows of its Ulysses group, T * U."""
    degree, shard = context.ulysses_degree, shard._replace(group=context.ulysses_group)
    repeat = _repeat(context, sizes)
    q, k = (y.unflatten(-1, (sizes.n_heads, -1)) for y in projected[:2])
    if repeat > 1:
        q, k = (y.repeat_interleave(repeat, dim=2) for y in (q, k))
    parts = (q, k, projected[2].unflatten(-1, (sizes.n_v_heads, -1)))

    def whole(*parts: Tensor, everyone: str) -> list[Tensor]:
        """Of parts ``(b, t, heads, d)``: ``(b, t * degree, heads / degree * d)``."""
        by_receiver = [x.unflatten(2, (degree, -1)).movedim(2, 0).flatten(3) for x in parts]
        packed = torch.cat(by_receiver, dim=3).unsqueeze(3)
        rows = swap_heads(packed, *shard._replace(everyone=everyone)).squeeze(3)
        together = rows.movedim(0, 1).flatten(1, 2)
        return list(together.split([x.shape[3] for x in by_receiver], dim=2))

    swapped = whole(*parts, everyone=shard.everyone)
    g, beta = whole(g.unsqueeze(3), beta.unsqueeze(3), everyone="")
    return swapped, g, beta, shard._replace(group=context.ring_group, everyone="")


def _repeat(context: ContextParallel, sizes: GatedDeltaNetSizes) -> int:
    """How often key heads are repeated so that Ulysses ranks can share them."""
    return context.ulysses_degree // gcd(sizes.n_heads, context.ulysses_degree)


def _own_channels(
    parameters: Sequence[Tensor | None], context: ContextParallel, sizes: GatedDeltaNetSizes
) -> list[Tensor | None]:
    """The channels of this Ulysses rank's heads, of the convolutions of q, k and v."""
    repeat = _repeat(context, sizes)
    found: list[Tensor | None] = []
    for parameter, width, times in zip(
        parameters,
        (sizes.head_k_dim, sizes.head_k_dim, sizes.head_v_dim),
        (repeat, repeat, 1),
        strict=True,
    ):
        if parameter is None:
            found.append(None)
            continue
        heads = parameter.unflatten(0, (-1, width))
        if times > 1:
            heads = heads.repeat_interleave(times, dim=0)
        of_ranks = heads.unflatten(0, (context.ulysses_degree, -1))
        found.append(of_ranks[context.ulysses_rank].flatten(0, 1))
    return found
