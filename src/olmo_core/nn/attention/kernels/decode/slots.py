"""Which slot of a cache holds which token, and writing new ones."""

from __future__ import annotations

import torch
from torch import Tensor


def store(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    seqlen: Tensor,
    leftpad: Tensor | None,
    *,
    is_ring: bool,
) -> None:
    """Write new tokens into their slots, cast to the cache's dtype; padding as zeros.

    The token of position ``p`` belongs into slot ``p``; in a ring of S slots into slot
    ``(p - leftpad[b]) % S``, where the last S tokens stay. Nothing is written before all that is
    written has been computed.

    :param k_cache: ``(B, S, Hkv, D)``.
    :param v_cache: Like ``k_cache``.
    :param k: ``(B, n, Hkv, D)``.
    :param v: Like ``k``.
    :param seqlen: The position of the first, int32 without dimensions, on the device.
    :param leftpad: ``(B,)``, int32, on the device; None if no row has any.
    """
    batch, slots = k_cache.shape[:2]
    n = k.shape[1]
    skipped = max(0, n - slots)
    k, v = (x[:, skipped:].to(k_cache.dtype) for x in (k, v))
    position = seqlen.view(1)
    if n > 1:
        position = seqlen + torch.arange(skipped, n, device=k.device, dtype=torch.int32)
    if leftpad is None:
        slot = (position % slots if is_ring else position).long()
        k_cache.index_copy_(1, slot, k)
        v_cache.index_copy_(1, slot, v)
        return
    real = position - leftpad[:, None]  # (B, n): a row's first token that is no padding is 0
    padding = (real < 0)[..., None, None]
    k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    slot = real % slots if is_ring else position.expand_as(real)
    rows = torch.arange(batch, device=k.device)[:, None]
    k_cache[rows, slot] = k
    v_cache[rows, slot] = v
