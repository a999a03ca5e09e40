"""qk-norm and RoPE of a layer: one kernel where modules and tensors allow it, else one by one.

The kernel rounds once where the modules round twice, see :mod:`.kernels.rope_qk_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.rope_qk_norm import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rope_only,
    row_stat,
    unsupported,
)
from olmo_core.nn.dispatch import is_heard
from olmo_core.nn.layer_norm import CuTeRMSNorm, FusedRMSNorm, LayerNorm, RMSNorm
from olmo_core.nn.rope import FusedRotaryEmbedding, RotaryEmbedding, RotaryEmbeddingBase
from olmo_core.nn.sharded import local

__all__ = ["normalize_and_rotate", "rotate_packed"]

_NORMS = (RMSNorm, FusedRMSNorm, CuTeRMSNorm)
_ROPES = (RotaryEmbedding, FusedRotaryEmbedding)


def normalize_and_rotate(
    q: Tensor,
    k: Tensor,
    *,
    q_norm: LayerNorm | None = None,
    k_norm: LayerNorm | None = None,
    per_head: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
    rope: RotaryEmbeddingBase | None = None,
    share: Callable[[Tensor], Tensor] | None = None,
    **where: Any,
) -> tuple[Tensor, Tensor]:
    """Normalise q and k, scale them, rotate them; each step is optional.

    :param q: ``(B, T, H, D)``.
    :param k: ``(B, T, Hkv, D)``.
    :param q_norm: Over ``H * D``, or over each head where ``per_head``; together with ``k_norm``.
    :param k_norm: Over ``Hkv * D``, or over each head.
    :param scales: What multiplies q and k after their norms: ``(H * D,)`` and ``(Hkv * D,)``.
    :param share: Where heads are dealt to ranks: sums a statistic of norms that are not
        ``per_head`` over the ranks, differentiably. The norms' ``size`` is then the whole width,
        their weights are this rank's.
    :param where: Keywords of ``rope``: positions, the first one of consecutive ones, or buffers
        with a row for each of the T tokens.
    :raises ValueError: If buffers do not fit.
    """
    _check_buffers(q, where)
    stats = widths = None
    fit = q_norm is None or _norms_fit(q_norm, k_norm)
    if share is not None and fit and not per_head and q_norm is not None and k_norm is not None:
        stats, widths = share(row_stat(q, k)), (q_norm.size, k_norm.size)  # one message for both

    if fit and unsupported(q, k) is None:
        table = _table(q, rope, where)
        if table is not None:
            if q_norm is None and scales is None:
                return (q, k) if rope is None else rope_only(q, k, **table)
            return qk_norm_rope(
                q, k, **_weights(q_norm, k_norm, scales), **table, per_head=per_head,
                eps=None if q_norm is None else q_norm.eps, stats=stats, widths=widths,
            )  # fmt: skip

    if q_norm is not None and k_norm is not None:
        if stats is not None:
            q, k = qk_norm_rope_reference(
                q, k, **_weights(q_norm, k_norm, None), per_head=False, eps=q_norm.eps,
                stats=stats, widths=widths,
            )  # fmt: skip
        elif per_head:
            q, k = q_norm(q), k_norm(k)
        else:
            shared = {} if share is None else {"share": share}
            q, k = (
                norm(x.flatten(2), **shared).view(x.shape) for norm, x in ((q_norm, q), (k_norm, k))
            )
    if scales is not None:
        q_scale, k_scale = (s.view(x.shape[2:]).to(x.dtype) for s, x in zip(scales, (q, k)))
        q, k = q * q_scale, k * k_scale
    return (q, k) if rope is None else rope(q, k, False, **where)


def rotate_packed(
    qkv: Tensor, rope: RotaryEmbeddingBase, **where: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE of packed queries, keys and values, ``(B, T, 3, H, D)``.

    :param rope: A :class:`FusedRotaryEmbedding`.
    :param where: As for :func:`normalize_and_rotate`.
    :returns: Queries, keys and values, each ``(B, T, H, D)``.
    """
    q, k, v = qkv.unbind(2)
    _check_buffers(q, where)
    if unsupported(q, k) is None and (table := _table(q, rope, where)) is not None:
        return *rope_only(q, k, **table), v
    if is_heard(rope):
        q, k, v = rope(qkv, **where).unbind(2)
        return q, k, v
    return *rope.rotate(q, k, False, **where), v  # without a copy of the values


def _check_buffers(q: Tensor, where: dict[str, Any]) -> None:
    """A layer's buffers are its input's rows: of longer ones, nobody knows which rows."""
    if "positions" in where or "start_pos" in where:
        return
    for name, buffer in where.items():
        if buffer.dim() != 2 or buffer.shape[0] != q.shape[1]:
            raise ValueError(
                f"{name} must hold a RoPE row for each of the input's {q.shape[1]} positions, got "
                f"shape {tuple(buffer.shape)}. Shard it like the input, or cut it to its length."
            )


def _norms_fit(q_norm: LayerNorm | None, k_norm: LayerNorm | None) -> bool:
    """Whether both are the kernel's RMS norm, and nobody must see them called."""
    if q_norm is None or k_norm is None or q_norm.eps != k_norm.eps:
        return False
    return all(
        type(n) in _NORMS and n.full_precision and n.bias is None and not is_heard(n)
        for n in (q_norm, k_norm)
    )


def _weights(
    q_norm: LayerNorm | None, k_norm: LayerNorm | None, scales: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """Of the norms and scales together, as the kernel's keywords."""
    weights: list[Tensor | None] = [
        None if n is None else local(n.weight) for n in (q_norm, k_norm)
    ]
    if scales is not None:
        weights = [s if w is None else w * s for w, s in zip(weights, scales)]
    return {"q_weight": weights[0], "k_weight": weights[1]}


def _table(
    q: Tensor, rope: RotaryEmbeddingBase | None, where: dict[str, Any]
) -> dict[str, Any] | None:
    """RoPE as the kernel's keywords, or None for what the module does, or refuses, itself."""
    if rope is None:
        return {}
    if type(rope) not in _ROPES or not rope.full_precision or is_heard(rope):
        return None
    if set(where) == {"pos_sin", "pos_cos"}:
        sin, cos = where["pos_sin"], where["pos_cos"]
        if any(
            t.shape != (q.shape[1], rope.rotary_dim)
            or t.dtype != torch.float32
            or t.device != q.device
            for t in (sin, cos)
        ):
            return None
        return {"sin": sin, "cos": cos, "rotary_dim": rope.rotary_dim}
    if set(where) not in (set(), {"start_pos"}, {"positions", "max_position"}):
        return None
    first, positions = where.get("start_pos", 0), where.get("positions")
    sin, cos = rope.get_table(where.get("max_position", first + q.shape[1]), q.device)
    if first:
        sin, cos = (table.narrow(0, first, q.shape[1]) for table in (sin, cos))
    return {"sin": sin, "cos": cos, "positions": positions, "rotary_dim": rope.rotary_dim}
