"""One query a row over a cache: the step of token-by-token generation.

All backends share it: with one query there is nothing to compute, only a cache to read, and each
query head of a group reads the same keys. So the heads of a group become the rows of one problem.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.attention.kv_cache import KVCacheManager

__all__ = ["decode"]


def decode(q: Tensor, cache: KVCacheManager, *, scale: float) -> Tensor:
    """Attend to all that the last stored token sees.

    :param q: ``(batch, 1, n_heads, head_dim)``, in the cache's dtype.
    :param cache: After its ``append`` and ``update_seqlen``.
    :returns: Like ``q``. A row that is still padding gives 0.
    """
    first, stop, at_most = cache.visible_slots()
    keys, values = cache.k_cache[:, :at_most], cache.v_cache[:, :at_most]
    if _has_triton_kernel(q):
        from olmo_core.nn.attention.kernels.decode_triton import decode as split_kv

        return split_kv(q, keys, values, first, stop, scale=scale)
    return masked(q, keys, values, first, stop, scale=scale)


def _has_triton_kernel(q: Tensor) -> bool:
    half_or_single = q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return q.device.type == "cuda" and half_or_single and triton_refusal(q) is None


def masked(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, stop: Tensor, *, scale: float
) -> Tensor:
    """Row ``b`` of ``q`` over slots ``[first[b], stop[b])`` of ``keys`` and ``values``.

    :param q: ``(batch, 1, n_heads, head_dim)``.
    :param keys: ``(batch, slots, n_kv_heads, head_dim)``.
    """
    groups = keys.shape[2]
    rows = q[:, 0].unflatten(1, (groups, -1))  # (batch, groups, heads of a group, head_dim)
    slot = torch.arange(keys.shape[1], device=q.device, dtype=first.dtype)
    hidden = (slot < first[:, None]) | (slot >= stop[:, None])
    # A row without keys attends to slot 0, whose value is zero while the row is padding.
    hidden = hidden & ~((first == stop)[:, None] & (slot == 0))
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(hidden, -math.inf)[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.flatten(1, 2)[:, None]
