"""Attention on a shard of the sequence: local, Ulysses, gather or ring, over one named kernel."""

from __future__ import annotations

from torch import Tensor

from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.gather import gather
from olmo_core.nn.attention.parallel.plan import WHOLE
from olmo_core.nn.attention.parallel.ring import ring
from olmo_core.nn.attention.parallel.ulysses import ulysses
from olmo_core.nn.attention.segments import Segments
from olmo_core.nn.dispatch import cast_for_autocast


def attend_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: ContextParallel,
    lengths: Tensor | None = None,
    *,
    local: bool = False,
    longest: int | None = None,
    window: int = -1,
    scale: float,
    dropout_p: float = 0.0,
    kernel: str,
    stream: int = 0,
) -> Tensor:
    """This rank's rows of causal attention over the whole sequence, differentiable once.

    All ranks must call it together, and backward through its result too, even where a loss does not
    depend on it.

    :param q: ``(b, t, h, d)``, this rank's rows in the layout of ``context``.
    :param k: ``(b, t, g, d)``, where g divides h; likewise ``v``.
    :param lengths: Cumulative lengths of the whole sequence, int32 on q's device; None for one
        document a row. They are of one row, but for Ulysses alone of the flattened batch.
    :param local: Whether ``lengths`` are the zig-zag shard's, the whole sequence's over the ring.
    :param longest: For Ulysses alone, an upper bound of the longest document.
    :param window: In keys, a query's own included; -1 for all.
    :param dropout_p: For Ulysses alone. Each rank draws its own, with equal seeds too.
    :param kernel: The name of a kernel, the same on all ranks.
    :param stream: Of dropout's random numbers: another one for other heads.
    :returns: Like ``q``.
    :raises ValueError: If lengths and shards do not fit, ranks differ, or Ulysses can't deal the
        heads.
    :raises RuntimeError: For dropout in a ring.
    """
    if context.layout != WHOLE:
        refuse_dropout(dropout_p)
    q, k, v = cast_for_autocast(q, k, v)
    shard = context.shard(lengths, local=local, window=window, scale=scale, kernel=kernel)
    within = (
        shard._replace(group=context.ring_group, everyone="") if context.ulysses_group else shard
    )

    def over_ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        op = ring if context.rotates(window) else gather
        out, _ = op(q, k, v, *within)
        return out

    def on_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, total = q.shape[1], q.shape[0] * q.shape[1]
        problem = Segments.dense(n, n, window=window)
        if lengths is not None:
            problem = Segments.documents(lengths, longest or total, window=window)
        return attend(
            q, k, v, problem, scale=scale, dropout_p=dropout_p, kernel=kernel,
            stream=1 + context.ulysses_rank + context.ulysses_degree * stream,
        )  # fmt: skip

    inner = on_whole if context.layout == WHOLE else over_ring
    if context.ulysses_group:
        return ulysses(q, k, v, inner, context.ulysses_degree, shard)
    return inner(q, k, v)


def refuse_dropout(dropout_p: float) -> None:
    """:raises RuntimeError: For dropout of attention weights over a ring."""
    if dropout_p:
        raise RuntimeError(
            "Attention dropout and a ring style do not go together: forward and backward see keys "
            "in another order on each rank, so the same weights could not be dropped. Set "
            "dropout=0.0, or use uly=UlyssesContextParallelStyle()."
        )
