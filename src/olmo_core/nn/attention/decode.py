"""One query a row over a cache: the step of token-by-token generation.

All backends share it: with one query there is nothing to compute, only a cache to read, and each
query head of a group reads the same keys. So the heads of a group become the rows of one problem.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels import decode_triton
from olmo_core.nn.attention.kv_cache import KVCacheManager
from olmo_core.nn.dispatch import is_observed

__all__ = ["decode"]


def decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCacheManager, *, scale: float) -> Tensor:
    """Store the next token of each row and attend to all that it sees.

    :param q: ``(batch, 1, n_heads, head_dim)``, in the cache's dtype.
    :param k: ``(batch, 1, n_kv_heads, head_dim)``.
    :param v: Like ``k``.
    :param cache: Is one token longer afterwards.
    :returns: Like ``q``. A row that is still padding gives 0.
    """
    if decode_triton.unsupported(q, cache.k_cache) is None:
        k, v = k.to(cache.dtype), v.to(cache.dtype)
        store = not is_observed((q, k, v))
        out = decode_triton.decode(
            q, k, v, cache.k_cache, cache.v_cache, cache.cache_seqlens, cache.cache_leftpad,
            scale=scale, window=-1 if cache.is_ring else cache.window, is_ring=cache.is_ring,
            store=store,
        )  # fmt: skip
        if not store:
            cache.append(k, v)
        cache.update_seqlen(1)
        return out
    cache.append(k, v)
    cache.update_seqlen(1)
    first, stop, at_most = cache.visible_slots()
    keys, values = cache.k_cache[:, :at_most], cache.v_cache[:, :at_most]
    return masked(q, keys, values, first, stop, scale=scale)


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
