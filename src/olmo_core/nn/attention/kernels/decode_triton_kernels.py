"""The Triton kernels of :mod:`.decode_triton`."""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

_LOG2_E = 1.4426950408889634
_WARPS = 4
_BLOCK_BYTES = 16384  # of keys, and of values, in one step
_STAGES = 3


@triton.jit
def _share(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, scale_log2, window,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, ROWS_PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One kv head over one share of the slots: row r is query r // GROUP, head r % GROUP.

    A single share is the result and goes to ``out``. Otherwise ``out`` and ``lse`` (base 2) are
    float32 parts, ``(programs, rows, DIM)`` and ``(programs, rows)``.
    """
    head = tl.program_id(0)  # neighbours read neighbouring bytes of the cache
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    r = tl.arange(0, ROWS_PAD)
    d = tl.arange(0, DIM_PAD)
    query = r // GROUP
    row_keep = r < QUERIES * GROUP
    d_keep = d < DIM
    q_at = batch * q_stride_b + query * q_stride_t + (head * GROUP + r % GROUP) * q_stride_h
    q = tl.load(
        q_ptr + q_at[:, None] + d[None, :], mask=row_keep[:, None] & d_keep[None, :], other=0.0
    )

    start, end = tl.load(starts_ptr + batch).to(tl.int32), tl.load(ends_ptr + batch).to(tl.int32)
    row_end = end - (QUERIES - 1) + query
    row_start = tl.zeros_like(row_end) + start
    if window > 0:
        start = tl.maximum(start, end - (QUERIES - 1) - window)
        row_start = tl.maximum(row_start, row_end - window)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), SPLITS), BLOCK) * BLOCK
    first = start + split * share
    last = tl.minimum(first + share, end)

    top = tl.full((ROWS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_PAD,), tl.float32)
    acc = tl.zeros((ROWS_PAD, DIM_PAD), tl.float32)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    for block in range(first, last, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        keep = (slot < last)[:, None] & d_keep[None, :]
        at = slot.to(tl.int64)
        # Masked slots read as zeros: a NaN that lies there would survive a weight of 0.
        k = tl.load(k_ptr + (at * k_stride_s)[:, None] + d[None, :], mask=keep, other=0.0)
        v = tl.load(v_ptr + (at * v_stride_s)[:, None] + d[None, :], mask=keep, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        seen = (slot[None, :] < tl.minimum(row_end, last)[:, None]) & (
            slot[None, :] >= row_start[:, None]
        )
        scores = tl.where(seen, scores, float("-inf"))
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
        at = (batch * QUERIES + query) * (KV_HEADS * GROUP) + head * GROUP + r % GROUP
        value = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at * DIM)[:, None] + d[None, :], value, mask=keep)
    else:
        at = ((batch * KV_HEADS + head) * SPLITS + split) * (QUERIES * GROUP) + r
        tl.store(out_ptr + (at * DIM)[:, None] + d[None, :], out, mask=keep)
        lse = tl.where(total > 0, tl.log2(total) + top, float("-inf"))
        tl.store(lse_ptr + at, lse, mask=row_keep)


@triton.jit
def _merge(
    parts_ptr, lse_ptr, out_ptr,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """One query of one head: the mean of its shares, weighted by their sums of exponentials."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    split, d = tl.arange(0, SPLITS_PAD), tl.arange(0, DIM_PAD)
    at = ((batch * KV_HEADS + head) * SPLITS + split) * (QUERIES * GROUP) + row
    lse = tl.load(lse_ptr + at, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)
    keep = (split < SPLITS)[:, None] & (d < DIM)[None, :]
    parts = tl.load(parts_ptr + (at * DIM)[:, None] + d[None, :], mask=keep, other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0)
    out_at = (batch * QUERIES + row // GROUP) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP
    tl.store(out_ptr + out_at * DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)


def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, ends: Tensor, scale: float,
    window: int, splits: int,
) -> Tensor:  # fmt: skip
    """See :func:`.decode_triton.decode`; ``splits`` is the number of shares."""
    batch, queries, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    rows = queries * group
    dim_pad = max(16, triton.next_power_of_2(dim))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    parts, lse = out, out
    if splits > 1:
        shape = (batch, kv_heads, splits, rows)
        parts = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    sizes = {
        "QUERIES": queries,
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "DIM_PAD": dim_pad,
    }
    _share[(kv_heads, splits, batch)](
        q, k_cache, v_cache, starts, ends, parts, lse, *q.stride()[:3], *k_cache.stride()[:3],
        *v_cache.stride()[:3], scale * _LOG2_E, window, **sizes,
        ROWS_PAD=max(16, triton.next_power_of_2(rows)), SPLITS=splits,
        BLOCK=max(16, _BLOCK_BYTES // (dim_pad * q.element_size())),
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    if splits > 1:
        _merge[(rows, kv_heads, batch)](
            parts, lse, out, **sizes, SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits),
            num_warps=1 if splits <= 4 else 4,
        )  # fmt: skip
    return out
