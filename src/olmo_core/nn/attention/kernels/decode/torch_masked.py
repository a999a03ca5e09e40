"""One query a row over a cache, by torch's own attention: for every device and dtype.

With one query there is nothing to compute, only a cache to read, and each query head of a group
reads the same keys. So the heads of a group become the rows of one problem.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.attention.kernels.decode.slots import store
from olmo_core.nn.lengths import can_be_read


def unsupported(q: Tensor, k_cache: Tensor) -> str | None:
    """None: it serves all tensors."""
    return None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlen: Tensor,
    leftpad: Tensor,
    *,
    padded: bool,
    scale: float,
    window: int = -1,
    is_ring: bool = False,
) -> Tensor:
    """See :class:`.DecodeKernel`."""
    at_most = slots = k_cache.shape[1]
    if q.device.type == "cpu" and can_be_read(seqlen):  # it costs nothing there, a wait on a GPU
        position = int(seqlen)
        longest_pad = int(leftpad.max()) if padded else 0
        if position >= longest_pad and not (is_ring and longest_pad):
            # Each row's token belongs into the same slot, and the slots that it sees end alike.
            slot, stop = position, position + 1
            if is_ring:
                slot, stop = position % slots, min(stop, slots)
            first = max(0, stop - window) if window > 0 else 0
            k_cache.narrow(1, slot, 1).copy_(k)
            v_cache.narrow(1, slot, 1).copy_(v)
            mask = None
            if longest_pad > first:
                index = torch.arange(first, stop, device=q.device, dtype=leftpad.dtype)
                mask = (index >= leftpad[:, None])[:, None, None, :]
            keys, values = (x.narrow(1, first, stop - first) for x in (k_cache, v_cache))
            return _attend(q, keys, values, mask, scale)
        at_most = min(slots, position + 1)
    store(k_cache, v_cache, k, v, seqlen, leftpad if padded else None, is_ring=is_ring)
    starts, stops = leftpad, (seqlen + 1).expand_as(leftpad)
    if is_ring:
        starts, stops = torch.zeros_like(leftpad), (stops - leftpad).clamp(0, slots)
    elif window > 0:
        starts = torch.maximum(starts, stops - window)
    keys, values = k_cache[:, :at_most], v_cache[:, :at_most]
    return masked(q, keys, values, torch.minimum(starts, stops), stops, scale=scale)


def masked(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, stop: Tensor, *, scale: float
) -> Tensor:
    """Row ``b`` of ``q`` over slots ``[first[b], stop[b])`` of ``keys`` and ``values``.

    :param q: ``(B, 1, H, D)``.
    :param keys: ``(B, S, Hkv, D)``.
    :param values: Like ``keys``.
    :param first: ``(B,)``, int32.
    :param stop: Like ``first``.
    """
    first, stop = first[:, None], stop[:, None]
    slot = torch.arange(keys.shape[1], device=q.device, dtype=first.dtype)
    # A row without keys attends to slot 0, whose value is zero while the row is padding.
    seen = (slot >= first) & (slot < stop) | (slot < 1) & (first == stop)
    return _attend(q, keys, values, seen[:, None, None, :], scale)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, _, heads, dim = q.shape
    groups = keys.shape[2]
    rows = q.reshape(batch, groups, heads // groups, dim)
    out = F.scaled_dot_product_attention(
        rows, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.reshape(q.shape)
