"""The Triton kernels behind :mod:`.op`: one pass over q and k forward, one backward.

One launch serves both tensors: programs below ``programs_q`` take tiles of q, the rest tiles of k.
A tile is a few tokens with all their heads, ``(tokens, heads, columns)`` in registers, cut into two
halves such that column ``c`` of one half rotates with column ``c`` of the other. So norm, weight
and rotation read each element once. Where k has fewer heads, its tiles hold more tokens.

Memory sets the pace. For q and k of ``n`` bytes together, forward moves ``2 n`` bytes and backward
``3 n``: tables and weights stay in L2.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.triton_driver import multiprocessors

_TILE = 2048  # elements a program holds at once: 16 a thread at 4 warps
_WARPS = 8
_BACKWARD_PROGRAMS_PER_SM = 4  # each keeps its share of the weights' gradients in registers
_STAGES = 3  # tiles whose loads are in flight at once in backward
_UNSPECIALISED = ["n_tokens", "seq", "stride_positions", "programs_q"]


@triton.jit
def _columns(DIM: tl.constexpr, ROTARY: tl.constexpr, PAD: tl.constexpr):
    """Columns of both halves. Those that do not rotate pair up behind those that do."""
    c = tl.arange(0, PAD)
    first, second = c, c + DIM // 2
    if ROTARY != DIM:
        first = tl.where(c < ROTARY // 2, c, c + ROTARY // 2)
        second = tl.where(c < ROTARY // 2, c + ROTARY // 2, c + DIM // 2)
    return first, second


@triton.jit
def _offsets(tokens, seq, stride_b, stride_t, stride_h, HEADS_PAD: tl.constexpr):
    """Of each head of each token. Strides are int32 where they fit, products of them may not be."""
    row = (tokens // seq).to(tl.int64) * stride_b + (tokens % seq).to(tl.int64) * stride_t
    return row[:, None, None] + (tl.arange(0, HEADS_PAD).to(tl.int64) * stride_h)[None, :, None]


@triton.jit
def _packed(tokens, HEADS: tl.constexpr, DIM: tl.constexpr, HEADS_PAD: tl.constexpr):
    """:func:`_offsets` where tokens are contiguous."""
    row = tokens.to(tl.int64) * (HEADS * DIM)
    return row[:, None, None] + (tl.arange(0, HEADS_PAD) * DIM)[None, :, None]


@triton.jit
def _angles(
    sin_ptr, cos_ptr, positions_ptr, tokens, live, seq, stride_table, stride_positions,
    ROTARY: tl.constexpr, PAD: tl.constexpr, POSITIONS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Sine and cosine, ``(tokens, 1, columns)``, from the first half of a table's rows."""
    at = (tokens % seq).to(tl.int64)
    if POSITIONS:
        where = (tokens // seq).to(tl.int64) * stride_positions + at
        at = tl.load(positions_ptr + where, mask=live, other=0).to(tl.int64)
    c = tl.arange(0, PAD)
    offset = (at * stride_table)[:, None, None] + c[None, None, :]
    keep = live[:, None, None] & (c < ROTARY // 2)[None, None, :]
    sin = tl.load(sin_ptr + offset, mask=keep, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + offset, mask=keep, other=1.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    return sin, cos


@triton.jit
def _weight(ptr, columns, DIM: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
            PER_HEAD: tl.constexpr):  # fmt: skip
    """``(1, heads, columns)``, or ``(1, 1, columns)`` where all heads share one weight."""
    keep = (tl.arange(0, columns.shape[0]) < DIM // 2)[None, None, :]
    offset = columns[None, None, :]
    if not PER_HEAD:
        heads = tl.arange(0, HEADS_PAD)
        offset += (heads * DIM)[None, :, None]
        keep = keep & (heads < HEADS)[None, :, None]
    return tl.load(ptr + offset, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _row_sum(x, PER_HEAD: tl.constexpr):
    """Sums over what one norm spans: ``(tokens, heads, 1)`` per head, else ``(tokens, 1, 1)``."""
    by_head = tl.sum(x, axis=2)
    if PER_HEAD:
        total = by_head[:, :, None]
    else:
        total = tl.sum(by_head, axis=1)[:, None, None]
    return total


@triton.jit
def _statistic_at(tokens, STATS: tl.constexpr, FIRST: tl.constexpr, HEADS_PAD: tl.constexpr,
                  PER_HEAD: tl.constexpr):  # fmt: skip
    at = (tokens.to(tl.int64) * STATS + FIRST)[:, None, None]
    if PER_HEAD:
        at += tl.arange(0, HEADS_PAD)[None, :, None]
    return at


@triton.jit
def _forward_tile(
    x_ptr, out_ptr, w_ptr, squares_ptr, rstd_ptr, sin_ptr, cos_ptr, positions_ptr, tile,
    n_tokens, seq, stride_b, stride_t, stride_h, stride_table, stride_positions, eps, width,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr,
    FIRST: tl.constexpr, STATS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PAD: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, GIVEN: tl.constexpr,
    ROPE: tl.constexpr, INVERSE: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    tokens = tile * BLOCK + tl.arange(0, BLOCK)
    live = tokens < n_tokens
    here = live[:, None, None] & (tl.arange(0, HEADS_PAD) < HEADS)[None, :, None]
    keep = here & (tl.arange(0, PAD) < DIM // 2)[None, None, :]
    first, second = _columns(DIM, ROTARY, PAD)
    row = _offsets(tokens, seq, stride_b, stride_t, stride_h, HEADS_PAD)
    x1 = tl.load(x_ptr + row + first[None, None, :], mask=keep, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + row + second[None, None, :], mask=keep, other=0.0).to(tl.float32)
    if ROPE:
        sin, cos = _angles(sin_ptr, cos_ptr, positions_ptr, tokens, live, seq, stride_table,
                           stride_positions, ROTARY, PAD, POSITIONS, INVERSE)  # fmt: skip
    if NORM:
        at = _statistic_at(tokens, STATS, FIRST, HEADS_PAD, PER_HEAD)
        kept = here if PER_HEAD else live[:, None, None]
        if GIVEN:
            squares = tl.load(squares_ptr + at, mask=kept, other=0.0)
        else:
            squares = _row_sum(x1 * x1 + x2 * x2, PER_HEAD)
        rstd = 1.0 / tl.sqrt(squares / width + eps)
        tl.store(rstd_ptr + at, rstd, mask=kept)
        x1 *= rstd
        x2 *= rstd
    if WEIGHT:
        x1 *= _weight(w_ptr, first, DIM, HEADS, HEADS_PAD, PER_HEAD)
        x2 *= _weight(w_ptr, second, DIM, HEADS, HEADS_PAD, PER_HEAD)
    y1, y2 = x1, x2
    if ROPE:
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    out = _packed(tokens, HEADS, DIM, HEADS_PAD)
    element = out_ptr.dtype.element_ty
    tl.store(out_ptr + out + first[None, None, :], y1.to(element), mask=keep)
    tl.store(out_ptr + out + second[None, None, :], y2.to(element), mask=keep)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, squares_ptr, rstd_ptr,
    sin_ptr, cos_ptr, positions_ptr, n_tokens, seq, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, stride_table, stride_positions, eps, width_q, width_k,
    programs_q,
    HEADS_Q: tl.constexpr, HEADS_Q_PAD: tl.constexpr, BLOCK_Q: tl.constexpr,
    HEADS_K: tl.constexpr, HEADS_K_PAD: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_Q: tl.constexpr, WEIGHT_K: tl.constexpr, FIRST_K: tl.constexpr, STATS: tl.constexpr,
    DIM: tl.constexpr, ROTARY: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr,
    PER_HEAD: tl.constexpr, GIVEN: tl.constexpr, ROPE: tl.constexpr, INVERSE: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs_q:
        _forward_tile(
            q_ptr, q_out_ptr, q_weight_ptr, squares_ptr, rstd_ptr, sin_ptr, cos_ptr, positions_ptr,
            program, n_tokens, seq, q_stride_b, q_stride_t, q_stride_h, stride_table,
            stride_positions, eps, width_q, HEADS_Q, HEADS_Q_PAD, BLOCK_Q, WEIGHT_Q, 0, STATS,
            DIM, ROTARY, PAD, NORM, PER_HEAD, GIVEN, ROPE, INVERSE, POSITIONS,
        )  # fmt: skip
    else:
        _forward_tile(
            k_ptr, k_out_ptr, k_weight_ptr, squares_ptr, rstd_ptr, sin_ptr, cos_ptr, positions_ptr,
            program - programs_q, n_tokens, seq, k_stride_b, k_stride_t, k_stride_h, stride_table,
            stride_positions, eps, width_k, HEADS_K, HEADS_K_PAD, BLOCK_K, WEIGHT_K, FIRST_K,
            STATS, DIM, ROTARY, PAD, NORM, PER_HEAD, GIVEN, ROPE, INVERSE, POSITIONS,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    dout_ptr, x_ptr, dx_ptr, w_ptr, dw_ptr, rstd_ptr, dsquares_ptr, sin_ptr, cos_ptr,
    positions_ptr, program, programs, n_tokens, seq, dout_stride_b, dout_stride_t, dout_stride_h,
    stride_b, stride_t, stride_h, stride_table, stride_positions, width,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr,
    FIRST: tl.constexpr, STATS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PAD: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr, GIVEN: tl.constexpr,
    ROPE: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, HEADS_PAD)
    inside = (tl.arange(0, PAD) < DIM // 2)[None, None, :]
    first, second = _columns(DIM, ROTARY, PAD)
    if WEIGHT:
        w1 = _weight(w_ptr, first, DIM, HEADS, HEADS_PAD, PER_HEAD)
        w2 = _weight(w_ptr, second, DIM, HEADS, HEADS_PAD, PER_HEAD)
        dw1 = tl.zeros((BLOCK, HEADS_PAD, PAD), tl.float32)
        dw2 = tl.zeros((BLOCK, HEADS_PAD, PAD), tl.float32)
    for tile in tl.range(program, tl.cdiv(n_tokens, BLOCK), programs, num_stages=STAGES):
        tokens = tile * BLOCK + tl.arange(0, BLOCK)
        live = tokens < n_tokens
        here = live[:, None, None] & (heads < HEADS)[None, :, None]
        keep = here & inside
        row = _offsets(tokens, seq, stride_b, stride_t, stride_h, HEADS_PAD)
        x1 = tl.load(x_ptr + row + first[None, None, :], mask=keep, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + row + second[None, None, :], mask=keep, other=0.0).to(tl.float32)
        row = _offsets(tokens, seq, dout_stride_b, dout_stride_t, dout_stride_h, HEADS_PAD)
        y1 = tl.load(dout_ptr + row + first[None, None, :], mask=keep, other=0.0).to(tl.float32)
        y2 = tl.load(dout_ptr + row + second[None, None, :], mask=keep, other=0.0).to(tl.float32)
        g1, g2 = y1, y2
        if ROPE:
            sin, cos = _angles(sin_ptr, cos_ptr, positions_ptr, tokens, live, seq, stride_table,
                               stride_positions, ROTARY, PAD, POSITIONS, False)  # fmt: skip
            g1 = y1 * cos + y2 * sin
            g2 = y2 * cos - y1 * sin
        if NORM:
            at = _statistic_at(tokens, STATS, FIRST, HEADS_PAD, PER_HEAD)
            kept = here if PER_HEAD else live[:, None, None]
            rstd = tl.load(rstd_ptr + at, mask=kept, other=0.0)
            x1 *= rstd
            x2 *= rstd
        if WEIGHT:
            dw1 += g1 * x1
            dw2 += g2 * x2
            g1 *= w1
            g2 *= w2
        if NORM:
            shared = _row_sum(g1 * x1 + g2 * x2, PER_HEAD) / width
            if GIVEN:
                tl.store(dsquares_ptr + at, -0.5 * shared * rstd * rstd, mask=kept)
                g1 *= rstd
                g2 *= rstd
            else:
                g1 = (g1 - x1 * shared) * rstd
                g2 = (g2 - x2 * shared) * rstd
        out = _packed(tokens, HEADS, DIM, HEADS_PAD)
        element = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + out + first[None, None, :], g1.to(element), mask=keep)
        tl.store(dx_ptr + out + second[None, None, :], g2.to(element), mask=keep)
    if WEIGHT:
        by_head1, by_head2 = tl.sum(dw1, axis=0), tl.sum(dw2, axis=0)
        if PER_HEAD:
            c = tl.arange(0, PAD) < DIM // 2
            row = dw_ptr + program * DIM
            tl.store(row + first, tl.sum(by_head1, axis=0), mask=c)
            tl.store(row + second, tl.sum(by_head2, axis=0), mask=c)
        else:
            at_head = dw_ptr + program * (HEADS * DIM) + (heads * DIM)[:, None]
            c = (heads < HEADS)[:, None] & (tl.arange(0, PAD) < DIM // 2)[None, :]
            tl.store(at_head + first[None, :], by_head1, mask=c)
            tl.store(at_head + second[None, :], by_head2, mask=c)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, dq_ptr, dk_ptr, q_weight_ptr, k_weight_ptr,
    dq_weight_ptr, dk_weight_ptr, rstd_ptr, dsquares_ptr, sin_ptr, cos_ptr, positions_ptr,
    n_tokens, seq, dq_stride_b, dq_stride_t, dq_stride_h, dk_stride_b, dk_stride_t, dk_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, stride_table,
    stride_positions, width_q, width_k, programs_q,
    HEADS_Q: tl.constexpr, HEADS_Q_PAD: tl.constexpr, BLOCK_Q: tl.constexpr,
    HEADS_K: tl.constexpr, HEADS_K_PAD: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_Q: tl.constexpr, WEIGHT_K: tl.constexpr, FIRST_K: tl.constexpr, STATS: tl.constexpr,
    DIM: tl.constexpr, ROTARY: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr,
    PER_HEAD: tl.constexpr, GIVEN: tl.constexpr, ROPE: tl.constexpr, POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs_q:
        _backward_tiles(
            dq_out_ptr, q_ptr, dq_ptr, q_weight_ptr, dq_weight_ptr, rstd_ptr, dsquares_ptr,
            sin_ptr, cos_ptr, positions_ptr, program, programs_q, n_tokens, seq,
            dq_stride_b, dq_stride_t, dq_stride_h, q_stride_b, q_stride_t, q_stride_h,
            stride_table, stride_positions, width_q, HEADS_Q, HEADS_Q_PAD, BLOCK_Q,
            WEIGHT_Q, 0, STATS, DIM, ROTARY, PAD, NORM, PER_HEAD, GIVEN, ROPE, POSITIONS, STAGES,
        )  # fmt: skip
    else:
        _backward_tiles(
            dk_out_ptr, k_ptr, dk_ptr, k_weight_ptr, dk_weight_ptr, rstd_ptr, dsquares_ptr,
            sin_ptr, cos_ptr, positions_ptr, program - programs_q, tl.num_programs(0) - programs_q,
            n_tokens, seq, dk_stride_b, dk_stride_t, dk_stride_h, k_stride_b, k_stride_t,
            k_stride_h, stride_table, stride_positions, width_k, HEADS_K, HEADS_K_PAD,
            BLOCK_K, WEIGHT_K, FIRST_K, STATS, DIM, ROTARY, PAD, NORM, PER_HEAD, GIVEN, ROPE,
            POSITIONS, STAGES,
        )  # fmt: skip


def launch_forward(
    tensors: Sequence[Any],
    *,
    rotary_dim: int,
    width_q: int = 1,
    width_k: int = 1,
    eps: float = 0.0,
    per_head: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise (and write ``rstd``) where ``rstd`` is given, weigh, rotate.

    :param tensors: q, k, q_weight, k_weight, sin, cos, positions, squares, rstd; all but q and k
        may be None.
    """
    q, k, q_weight, k_weight, sin, cos, positions, squares, rstd = tensors
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    n_tokens = q.shape[0] * q.shape[1]
    if n_tokens == 0:
        return q_out, k_out
    sizes, block_q, block_k = _sizes(*q.shape[2:], k.shape[2], rotary_dim, per_head)
    programs_q = triton.cdiv(n_tokens, block_q)
    _forward[(programs_q + triton.cdiv(n_tokens, block_k),)](
        q, k, q_out, k_out, q_weight, k_weight, squares, rstd, sin, cos, positions,
        n_tokens, q.shape[1], *q.stride()[:3], *k.stride()[:3], *_table_strides(sin, positions),
        eps, width_q, width_k, programs_q,
        WEIGHT_Q=q_weight is not None, WEIGHT_K=k_weight is not None, NORM=rstd is not None,
        GIVEN=squares is not None, ROPE=sin is not None, INVERSE=inverse,
        POSITIONS=positions is not None, **sizes,
    )  # fmt: skip
    return q_out, k_out


def launch_backward(
    tensors: Sequence[Any],
    *,
    given: bool,
    rotary_dim: int,
    width_q: int,
    width_k: int,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, both weights and, where the statistic was ``given``, of the statistic.

    :param tensors: dq_out, dk_out, q, k, q_weight, k_weight, sin, cos, positions, rstd; those from
        q_weight on may be None.
    """
    dq_out, dk_out, q, k, q_weight, k_weight, sin, cos, positions, rstd = tensors
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dsquares = torch.empty_like(rstd) if given and rstd is not None else None
    n_tokens = q.shape[0] * q.shape[1]
    sizes, block_q, block_k = _sizes(*q.shape[2:], k.shape[2], rotary_dim, per_head)
    programs_q, programs_k = triton.cdiv(n_tokens, block_q), triton.cdiv(n_tokens, block_k)
    if q_weight is not None or k_weight is not None:
        most = multiprocessors(q.device) * _BACKWARD_PROGRAMS_PER_SM
        most_q = max(1, most * programs_q // max(1, programs_q + programs_k))
        programs_q, programs_k = min(programs_q, most_q), min(programs_k, max(1, most - most_q))
    # A row of a weight's gradient for each program, and then their sum.
    dq_parts, dk_parts = (
        None if w is None else torch.empty(n, w.shape[0], dtype=torch.float32, device=q.device)
        for w, n in ((q_weight, programs_q), (k_weight, programs_k))
    )
    if n_tokens > 0:
        _backward[(programs_q + programs_k,)](
            dq_out, dk_out, q, k, dq, dk, q_weight, k_weight, dq_parts, dk_parts, rstd, dsquares,
            sin, cos, positions, n_tokens, q.shape[1], *dq_out.stride()[:3], *dk_out.stride()[:3],
            *q.stride()[:3], *k.stride()[:3], *_table_strides(sin, positions), width_q, width_k,
            programs_q,
            WEIGHT_Q=q_weight is not None, WEIGHT_K=k_weight is not None, NORM=rstd is not None,
            GIVEN=given, ROPE=sin is not None, POSITIONS=positions is not None, STAGES=_STAGES,
            **sizes,
        )  # fmt: skip
    dq_weight = None if dq_parts is None else dq_parts.sum(0).to(q_weight.dtype)
    dk_weight = None if dk_parts is None else dk_parts.sum(0).to(k_weight.dtype)
    return dq, dk, dq_weight, dk_weight, dsquares


@lru_cache(maxsize=64)
def _sizes(
    heads_q: int, dim: int, heads_k: int, rotary_dim: int, per_head: bool
) -> tuple[dict[str, int | bool], int, int]:
    """What a kernel is compiled for, and the tokens of a tile of q and of k."""
    pad = triton.next_power_of_2(dim // 2)
    pad_q, pad_k = triton.next_power_of_2(heads_q), triton.next_power_of_2(heads_k)
    block_q, block_k = (max(1, _TILE // (2 * pad * heads)) for heads in (pad_q, pad_k))
    sizes = {
        "HEADS_Q": heads_q, "HEADS_Q_PAD": pad_q, "BLOCK_Q": block_q,
        "HEADS_K": heads_k, "HEADS_K_PAD": pad_k, "BLOCK_K": block_k,
        "FIRST_K": heads_q if per_head else 1, "STATS": heads_q + heads_k if per_head else 2,
        "DIM": dim, "ROTARY": rotary_dim, "PAD": pad, "PER_HEAD": per_head,
        "num_warps": max(_WARPS, min(16, pad * max(pad_q, pad_k) * _WARPS * 2 // _TILE)),
    }  # fmt: skip
    return sizes, block_q, block_k


def _table_strides(sin: Tensor | None, positions: Tensor | None) -> tuple[int, int]:
    """From one row of the table to the next, and from one batch row of positions to the next."""
    by_row = 0 if positions is None or positions.dim() == 1 else positions.stride(0)
    return 0 if sin is None else sin.stride(0), by_row
