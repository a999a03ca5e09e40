"""The Triton kernels of :mod:`.triton_split_kv`."""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_WARPS = 4
_BLOCK_BYTES = 16384  # of keys, and of values, in one step
_STAGES = 3


@triton.jit
def _share(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, seqlen_ptr, leftpad_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    k_cache_stride_b, k_cache_stride_s, k_cache_stride_h,
    v_cache_stride_b, v_cache_stride_s, v_cache_stride_h, scale_log2, window, slots,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """One kv head over one share of the slots: row r is query head r of its group.

    The first share has the new token too, and may store it. A single share is the result and goes
    to ``out``. Otherwise ``out`` and ``lse`` (base 2) are float32 parts, ``(programs, rows, DIM)``
    and ``(programs, rows)``.
    """
    # Neighbours read neighbouring bytes of the cache. 64 bits: heads may be any stride apart.
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    r = tl.arange(0, ROWS_PAD)
    d = tl.arange(0, DIM_PAD)
    row_keep = r < GROUP
    d_keep = d < DIM
    q_at = batch * q_stride_b + (head * GROUP + r) * q_stride_h
    q = tl.load(
        q_ptr + q_at[:, None] + d[None, :], mask=row_keep[:, None] & d_keep[None, :], other=0.0
    )

    position, pad = tl.load(seqlen_ptr), tl.load(leftpad_ptr + batch)
    is_token = position >= pad
    if RING:
        new_slot = ((position - pad) % slots + slots) % slots  # as in Python: not negative
        start, end = 0, tl.minimum(position + 1 - pad, slots)
    else:
        new_slot = position
        start, end = pad, tl.minimum(position + 1, slots)
        if window > 0:
            start = tl.maximum(start, end - window)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), SPLITS), BLOCK) * BLOCK
    first = start + split * share
    last = tl.minimum(first + share, end)

    top = tl.full((ROWS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_PAD,), tl.float32)
    acc = tl.zeros((ROWS_PAD, DIM_PAD), tl.float32)
    k_cache_ptr += batch * k_cache_stride_b + head * k_cache_stride_h
    v_cache_ptr += batch * v_cache_stride_b + head * v_cache_stride_h
    if split == 0:
        fits = new_slot < slots
        token = d_keep & is_token & fits  # padding is stored as zeros
        k_new = tl.load(k_ptr + batch * k_stride_b + head * k_stride_h + d, mask=token, other=0.0)
        v_new = tl.load(v_ptr + batch * v_stride_b + head * v_stride_h + d, mask=token, other=0.0)
        if STORE:
            at = new_slot.to(tl.int64)
            tl.store(k_cache_ptr + at * k_cache_stride_s + d, k_new, mask=d_keep & fits)
            tl.store(v_cache_ptr + at * v_cache_stride_s + d, v_new, mask=d_keep & fits)
        if is_token:
            products = q.to(tl.float32) * k_new.to(tl.float32)[None, :]
            top = tl.sum(products, axis=1) * scale_log2
            total += 1.0
            acc += v_new.to(tl.float32)[None, :]
        if new_slot >= slots:  # a replayed graph that nobody counted the steps of
            acc += float("nan")
    for block in range(first, last, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        # The new slot is being written by the first share, or holds what was there before.
        old = (slot < last) & (slot != new_slot)
        keep = old[:, None] & d_keep[None, :]
        at = slot.to(tl.int64)
        # Masked slots read as zeros: a NaN that lies there would survive a weight of 0.
        k = tl.load(
            k_cache_ptr + (at * k_cache_stride_s)[:, None] + d[None, :], mask=keep, other=0.0
        )
        v = tl.load(
            v_cache_ptr + (at * v_cache_stride_s)[:, None] + d[None, :], mask=keep, other=0.0
        )
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        scores = tl.where(old[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    keep = row_keep[:, None] & d_keep[None, :]
    if SPLITS == 1:
        at = (batch * KV_HEADS + head) * GROUP + r
        value = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at * DIM)[:, None] + d[None, :], value, mask=keep)
    else:
        at = ((batch * KV_HEADS + head) * SPLITS + split) * GROUP + r
        tl.store(out_ptr + (at * DIM)[:, None] + d[None, :], out, mask=keep)
        lse = tl.where(total > 0, tl.log2(total) + top, float("-inf"))
        tl.store(lse_ptr + at, lse, mask=row_keep)


@triton.jit
def _merge(
    parts_ptr, lse_ptr, out_ptr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """One query head: the mean of its shares, weighted by their sums of exponentials."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    split, d = tl.arange(0, SPLITS_PAD), tl.arange(0, DIM_PAD)
    at = ((batch * KV_HEADS + head) * SPLITS + split) * GROUP + row
    lse = tl.load(lse_ptr + at, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)
    keep = (split < SPLITS)[:, None] & (d < DIM)[None, :]
    parts = tl.load(parts_ptr + (at * DIM)[:, None] + d[None, :], mask=keep, other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0)
    out_at = (batch * KV_HEADS + head) * GROUP + row
    tl.store(out_ptr + out_at * DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)


def launch(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlen: Tensor,
    leftpad: Tensor, scale: float, window: int, is_ring: bool, store: bool, splits: int,
) -> Tensor:  # fmt: skip
    """See :func:`.triton_split_kv.split_kv`; ``splits`` is the number of shares."""
    batch, _, heads, dim = q.shape
    slots, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, lse = out, out
    if splits > 1:
        shape = (batch, kv_heads, splits, group)
        parts = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    sizes, only_share = _sizes(group, kv_heads, dim, q.element_size())
    strides = (x.stride(i) for x in (q, k, v) for i in (0, 2))
    _share[(kv_heads, splits, batch)](
        q, k, v, k_cache, v_cache, seqlen, leftpad, parts, lse, *strides,
        *k_cache.stride()[:3], *v_cache.stride()[:3], scale * _LOG2_E, window, slots,
        SPLITS=splits, RING=is_ring, STORE=store, **sizes, **only_share,
    )  # fmt: skip
    if splits > 1:
        _merge[(group, kv_heads, batch)](
            parts, lse, out, **sizes, SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits),
            num_warps=1 if splits <= 4 else 4,
        )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _sizes(
    group: int, kv_heads: int, dim: int, element_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """What both kernels are compiled for, and what the first alone is."""
    dim_pad = max(16, triton.next_power_of_2(dim))
    sizes = {"GROUP": group, "KV_HEADS": kv_heads, "DIM": dim, "DIM_PAD": dim_pad}
    only_share = {
        "ROWS_PAD": max(16, triton.next_power_of_2(group)),
        "BLOCK": max(16, _BLOCK_BYTES // (dim_pad * element_size)),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }
    return sizes, only_share
