"""Attention by its definition: dense, quadratic, and differentiable by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    weight_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp. A query that sees no key gives 0 and -inf.

    :param q: (b, t_q, h, d).
    :param k: (b, t_k, g, d); query head i reads head i // (h // g) of keys and values.
    :param mask: (t_q, t_k), True where a query sees a key.
    :param weight_factor: (b, h, t_q, t_k), multiplies the weights: a dropout that was drawn.
    :returns: (b, t_q, h, d) and (b, h, t_q).
    """
    group = q.shape[2] // k.shape[2]
    heads = torch.arange(q.shape[2], device=q.device) // group
    q, k, v = q.transpose(1, 2), k[:, :, heads].transpose(1, 2), v[:, :, heads].transpose(1, 2)
    # As in every kernel, scores are float32 sums that are never rounded.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    sees = mask.any(-1)
    # A row of nothing but -inf has no softmax: it sees everything first, and is zeroed then.
    hidden = ~mask & sees[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1) * sees[:, None]
    weights = weights if weight_factor is None else weights * weight_factor
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse
