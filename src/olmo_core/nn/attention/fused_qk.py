"""qk-norm and RoPE of an attention layer as one kernel, where modules and tensors allow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from olmo_core.nn.attention.kernels.rope_qk_norm import qk_norm_rope, rope_only, unsupported
from olmo_core.nn.layer_norm import CuTeRMSNorm, FusedRMSNorm, LayerNorm, RMSNorm
from olmo_core.nn.rope import FusedRotaryEmbedding, RotaryEmbedding, RotaryEmbeddingBase

__all__ = ["fused_qk"]

_NORMS = (RMSNorm, FusedRMSNorm, CuTeRMSNorm)
_ROPES = (RotaryEmbedding, FusedRotaryEmbedding)


def fused_qk(
    q: Tensor,
    k: Tensor,
    *,
    q_norm: LayerNorm | None,
    k_norm: LayerNorm | None,
    per_head: bool,
    rope: RotaryEmbeddingBase | None,
    rope_inputs: dict[str, Any],
) -> tuple[Tensor, Tensor] | None:
    """What the norms and then ``rope`` give, by one kernel; None where that can't be had.

    The kernel rounds once where the modules round twice, see :mod:`.kernels.rope_qk_norm`.

    :param q: ``(B, T, H, D)``, neither normalised nor rotated.
    :param k: ``(B, T, Hkv, D)``.
    :param per_head: The norms normalise each head by itself.
    :param rope_inputs: The keywords of ``rope.forward``.
    """
    if not (q.is_cuda or k.is_cuda) or (q_norm is None and rope is None):
        return None
    if unsupported(q, k) is not None or not _norms_fit(q_norm, k_norm):
        return None
    sin = cos = positions = None
    rotary_dim = None
    if rope is not None:
        table = _table(q, rope, rope_inputs)
        if table is None:
            return None
        sin, cos, positions = table
        rotary_dim = rope.rotary_dim
    if q_norm is None or k_norm is None:
        assert sin is not None and cos is not None
        return rope_only(q, k, sin, cos, positions, rotary_dim=rotary_dim)
    return qk_norm_rope(
        q, k, q_weight=q_norm.weight, k_weight=k_norm.weight, eps=q_norm.eps, per_head=per_head,
        sin=sin, cos=cos, positions=positions, rotary_dim=rotary_dim,
    )  # fmt: skip


def _norms_fit(q_norm: LayerNorm | None, k_norm: LayerNorm | None) -> bool:
    """Whether both are the kernel's RMS norm. Hooks (FSDP's too) need the module to be called."""
    if q_norm is None or k_norm is None:
        return q_norm is k_norm
    return q_norm.eps == k_norm.eps and all(
        type(n) in _NORMS
        and n.full_precision
        and n.bias is None
        and (n.weight is None or type(n.weight) is nn.Parameter)  # no DTensor
        and not n._forward_hooks
        and not n._forward_pre_hooks
        for n in (q_norm, k_norm)
    )


def _table(
    q: Tensor, rope: RotaryEmbeddingBase, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Sines, cosines and positions, or None for what the module does, or refuses, itself."""
    if type(rope) not in _ROPES or not rope.full_precision:
        return None
    if rope._forward_hooks or rope._forward_pre_hooks:
        return None
    if "pos_sin" in inputs or "pos_cos" in inputs:
        sin, cos = inputs.get("pos_sin"), inputs.get("pos_cos")
        expected = (q.shape[1], rope.rotary_dim)
        if set(inputs) != {"pos_sin", "pos_cos"} or sin is None or cos is None:
            return None
        if not all(t.shape == expected and t.dtype == torch.float32 for t in (sin, cos)):
            return None
        return sin, cos, None
    if set(inputs) not in (set(), {"positions", "max_position"}):
        return None
    length = inputs.get("max_position", q.shape[1])
    sin, cos = rope.get_table(length, q.device)
    return sin, cos, inputs.get("positions")
