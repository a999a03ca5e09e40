"""
The gated delta rule's backward pass in Triton. Two launches after the factors:

* :func:`_scan`, for each row and block of V, from the last chunk to the first: dU, and the
  gradients of the outgoing states;
* :func:`_gradients`, for each chunk and key head: dX, and the gradients of all inputs.

Exponents get their gradients as ``torch_backward`` says, without the terms that are 0.
A factor f = scale * rsqrt(<x, x> + eps) of x needs no gradient of its own: with d the gradient of
f x, as if f were a constant, dx = d - rsqrt(<x, x> + eps)^2 x <x, d>.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import ChunkGrid
from .torch_forward import Saved
from .triton_shared import (
    BETA,
    KEY,
    NARROWEST,
    QUERY,
    READ,
    WRITE,
    compute_factors,
    decay_matrix,
    factor,
    load_rows,
    strides,
    token_rows,
    whole_decay,
)

__all__ = ["launch_backward"]


@triton.jit(do_not_specialize=["padding", "rows", "chunks"])
def _scan(
    dout_ptr, q_ptr, k_ptr, w_ptr, scores_ptr, factors_ptr, dfinal_ptr, du_ptr, dstates_ptr,
    dinitial_ptr, padding, rows, chunks, dout_stride_b, dout_stride_t, dout_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dU = P^T dO + (e^(c_C - c) K) dS'. W^T dU is (beta e^c K)^T dX."""
    block, row = tl.program_id(0), tl.program_id(1)
    i, k_columns = tl.arange(0, C), tl.arange(0, K_PAD)
    v_columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state_at = k_columns[:, None] * V + v_columns[None, :]
    state_keep = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    w_at, w_keep = i[:, None] * K + k_columns[None, :], (k_columns < K)[None, :]
    u_at, u_keep = i[:, None] * V + v_columns[None, :], (v_columns < V)[None, :]
    low = dstates_ptr.dtype.element_ty

    row_state = row.to(tl.int64) * (K * V)
    dstate = tl.zeros((K_PAD, BLOCK_V), tl.float32)
    if dfinal_ptr is not None:
        dstate += tl.load(dfinal_ptr + row_state + state_at, mask=state_keep, other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - step
        chunk_row = row + rows * tl.cast(n, tl.int64)
        at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
        q = load_rows(q_ptr, at, live, k_columns, K)
        at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
        k = load_rows(k_ptr, at, live, k_columns, K)
        at, live = token_rows(
            n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C
        )
        dout = load_rows(dout_ptr, at, live, v_columns, V)
        w = tl.load(w_ptr + chunk_row * (C * K) + w_at, mask=w_keep, other=0.0)
        scores = tl.load(scores_ptr + chunk_row * (C * C) + i[:, None] * C + i[None, :])
        key = factor(factors_ptr, KEY, chunk_row, C)
        write = factor(factors_ptr, WRITE, chunk_row, C)
        query = factor(factors_ptr, QUERY, chunk_row, C)
        read = factor(factors_ptr, READ, chunk_row, C)
        whole = whole_decay(factors_ptr, chunk_row, C)

        outgoing = dstate.to(low)
        tl.store(dstates_ptr + chunk_row * (K * V) + state_at, outgoing, mask=state_keep)
        scaled = dout.to(tl.float32) * query[:, None]
        du = tl.dot(k, outgoing) * (key * write)[:, None]
        total = tl.dot(tl.trans(scores), scaled.to(low), du)
        tl.store(du_ptr + chunk_row * (C * V) + u_at, total.to(low), mask=u_keep)
        reads = (scaled * read[:, None]).to(low)
        dstate = tl.dot(tl.trans(q), reads, dstate * whole)
        dstate = tl.dot(tl.trans(w), (-total).to(low), dstate)
    tl.store(dinitial_ptr + row_state + state_at, dstate, mask=state_keep)


@triton.jit(do_not_specialize=["padding", "rows"])
def _gradients(
    dout_ptr, q_ptr, k_ptr, v_ptr, factors_ptr, ids_ptr, inverses_ptr, states_ptr, updates_ptr,
    du_ptr, dstates_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, padding, rows, scale,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, dv_stride_b, dv_stride_t, dv_stride_h,
    dg_stride_b, dg_stride_t, dg_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program's rows are the GROUP value heads of one key head."""
    n, first_row = tl.program_id(0), tl.program_id(1) * GROUP
    i, columns = tl.arange(0, C), tl.arange(0, K_PAD)
    keep_k = (columns < K)[None, :]
    below = i[:, None] > i[None, :]
    q_at, live = token_rows(
        n, first_row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C
    )
    k_at, _ = token_rows(n, first_row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    dq_total = tl.zeros((C, K_PAD), tl.float32)
    dk_total = tl.zeros((C, K_PAD), tl.float32)

    for head in range(GROUP):
        row = first_row + head
        chunk_row = n.to(tl.int64) * rows + row
        square = chunk_row * (C * C) + i[:, None] * C + i[None, :]
        transposed = tl.trans(tl.load(inverses_ptr + square))
        beta = factor(factors_ptr, BETA, chunk_row, C)
        do_at, _ = token_rows(
            n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C
        )
        v_at, _ = token_rows(n, row, padding, v_stride_b, v_stride_t, v_stride_h, HEADS, 1, C)
        dv_at, _ = token_rows(n, row, padding, dv_stride_b, dv_stride_t, dv_stride_h, HEADS, 1, C)
        low = transposed.to(du_ptr.dtype.element_ty)
        rest = (transposed - low.to(tl.float32)).to(low.dtype)

        dqk, dkk = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        dq, erase = tl.zeros((C, K_PAD), tl.float32), tl.zeros((C, K_PAD), tl.float32)
        write = tl.zeros((C, K_PAD), tl.float32)
        dbeta = tl.zeros((C,), tl.float32)
        kept = tl.zeros((K_PAD,), tl.float32)
        for first in range(0, V, BLOCK_V):
            v_columns = first + tl.arange(0, BLOCK_V)
            keep = (v_columns < V)[None, :]
            u_at = chunk_row * (C * V) + i[:, None] * V + v_columns[None, :]
            state_at = chunk_row * (K * V) + columns[:, None] * V + v_columns[None, :]
            state_keep = (columns < K)[:, None] & keep
            du = tl.load(du_ptr + u_at, mask=keep, other=0.0)
            u = tl.load(updates_ptr + u_at, mask=keep, other=0.0)
            dout = load_rows(dout_ptr, do_at, live, v_columns, V)
            v = load_rows(v_ptr, v_at, live, v_columns, V)
            state = tl.load(states_ptr + state_at, mask=state_keep, other=0.0)
            dstate = tl.load(dstates_ptr + state_at, mask=state_keep, other=0.0)
            dx = tl.dot(low, du, tl.dot(rest, du))
            dbeta += tl.sum(dx * v.to(tl.float32), axis=1)
            dv = (dx * beta[:, None]).to(dv_ptr.dtype.element_ty)
            tl.store(dv_ptr + dv_at[:, None] + v_columns[None, :], dv, mask=live[:, None] & keep)
            dx = dx.to(low.dtype)
            dqk = tl.dot(dout, tl.trans(u), dqk)
            dkk = tl.dot(dx, tl.trans(u), dkk)
            dq = tl.dot(dout, tl.trans(state), dq)
            erase = tl.dot(dx, tl.trans(state), erase)
            write = tl.dot(u, tl.trans(dstate), write)
            kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)

        # What tokens of the chunk give each other. Sums are rows and columns of the same products,
        # so that what cancels between them does so.
        q = load_rows(q_ptr, q_at, live, columns, K)
        k = load_rows(k_ptr, k_at, live, columns, K)
        key = factor(factors_ptr, KEY, chunk_row, C)
        query = factor(factors_ptr, QUERY, chunk_row, C)
        gamma = decay_matrix(factors_ptr, ids_ptr, chunk_row, n, C, DOCUMENTS) * key[None, :]
        dqk = dqk * gamma * query[:, None]
        dkk = tl.where(below, -dkk * gamma * key[:, None], 0.0)
        read = tl.where(below, dqk * tl.dot(q, tl.trans(k)), 0.0)
        erased = dkk * tl.dot(k, tl.trans(k))
        erased_rows = tl.sum(erased, axis=1)
        columns_sum = tl.sum(read + erased * beta[:, None], axis=0)
        dlog = tl.sum(read, axis=1) + erased_rows * beta - columns_sum
        dbeta += erased_rows

        # What states give. The last token's write reaches the outgoing one with an exponent of 0.
        from_start = factor(factors_ptr, READ, chunk_row, C)
        k_wide = k.to(tl.float32)
        dq *= (from_start * query)[:, None]
        erase *= (-from_start * key)[:, None]
        write *= (factor(factors_ptr, WRITE, chunk_row, C) * key)[:, None]
        written = tl.where(i < C - 1, tl.sum(write * k_wide, axis=1), 0.0)
        erased = tl.sum(erase * k_wide, axis=1)
        dbeta += erased
        dlog += tl.sum(dq * q.to(tl.float32), axis=1) + erased * beta - written
        whole = tl.sum(written, axis=0) + tl.sum(kept, axis=0) * whole_decay(
            factors_ptr, chunk_row, C
        )
        dlog += tl.where(i == C - 1, whole, 0.0)
        # The logarithm of a decay is a running sum of g inside each chunk.
        dg = tl.cumsum(dlog, axis=0, reverse=True)
        at, _ = token_rows(n, row, padding, dg_stride_b, dg_stride_t, dg_stride_h, HEADS, 1, C)
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=live)
        tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=live)

        dqk_low, dkk_low = dqk.to(q.dtype), (dkk * beta[:, None]).to(q.dtype)
        dq_total = tl.dot(dqk_low, k, dq_total + dq)
        dk_total = tl.dot(dkk_low, k, dk_total + erase * beta[:, None] + write)
        dk_total = tl.dot(tl.trans(dkk_low), k, dk_total)
        dk_total = tl.dot(tl.trans(dqk_low), q, dk_total)

    if NORMALIZE:
        # All value heads of a key head have its factors.
        chunk_row = n.to(tl.int64) * rows + first_row
        q = load_rows(q_ptr, q_at, live, columns, K).to(tl.float32)
        query = factor(factors_ptr, QUERY, chunk_row, C) / scale
        dq_total -= q * (query * query * tl.sum(dq_total * q, axis=1))[:, None]
        k = load_rows(k_ptr, k_at, live, columns, K).to(tl.float32)
        key = factor(factors_ptr, KEY, chunk_row, C)
        dk_total -= k * (key * key * tl.sum(dk_total * k, axis=1))[:, None]
    out_at, _ = token_rows(
        n, first_row, padding, dq_stride_b, dq_stride_t, dq_stride_h, HEADS, GROUP, C
    )
    out = out_at[:, None] + columns[None, :]
    keep = live[:, None] & keep_k
    tl.store(dq_ptr + out, dq_total.to(dq_ptr.dtype.element_ty), mask=keep)
    tl.store(dk_ptr + out, dk_total.to(dk_ptr.dtype.element_ty), mask=keep)


def launch_backward(
    grid: ChunkGrid, dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    g: Tensor, beta: Tensor, ids: Tensor | None, saved: Saved, scale: float, normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, g, beta and the initial state. ``ids`` are the documents (N, C)."""
    N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    factors, sizes = compute_factors(grid, q, k, g, beta, ids, scale, normalize_qk)
    documents = sizes.pop("DOCUMENTS")
    wide = sizes["K_PAD"] > 128
    values = {"V": V, "BLOCK_V": NARROWEST}
    common = (grid.padding, R)

    du, dstates = q.new_empty(N, R, C, V), torch.empty_like(saved.states)
    dinitial = factors.new_empty(grid.batch, grid.value_heads, K, V)
    _scan[(triton.cdiv(V, NARROWEST), R)](
        dout, q, k, saved.erasers, saved.scores, factors,
        None if dfinal is None else dfinal.contiguous(), du, dstates, dinitial, *common, N,
        *strides(dout, q, k), **sizes, **values, STAGES=1 if wide else 2,
        num_warps=8 if wide else 4,
    )  # fmt: skip

    dq, dk, dv, dg, dbeta = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)
    )
    _gradients[(N, grid.key_rows)](
        dout, q, k, v, factors, ids, saved.inverses, saved.states, saved.updates, du, dstates,
        dq, dk, dv, dg, dbeta, *common, scale, *strides(dout, q, k, v, dq, dv, dg), **sizes,
        **values, DOCUMENTS=documents, NORMALIZE=normalize_qk,
        num_warps=16 if wide else 8, num_stages=1 if wide else 2,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial
