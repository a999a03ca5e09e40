"""
The gated delta rule's backward pass in Triton. Five launches after the factors:

* :func:`_local`, for each chunk: W again, and P^T dO, the chunk's own part of dU;
* :func:`_scan`, for each row and block of V, from the last chunk to the first: dU, and the
  gradients of the outgoing states;
* :func:`_values`, for each chunk: dX, dV, and the gradients of Q K^T and K K^T;
* :func:`_keys`, for each chunk and block of K: the gradients of queries and keys as factors, for
  each value head;
* :func:`_finish`, for each chunk and key head: sums over value heads, and what is left of the
  gradients of queries, keys and gates.

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
    split_dot,
    strides,
    token_rows,
    whole_decay,
)

__all__ = ["launch_backward"]


@triton.jit(do_not_specialize=["padding", "rows"])
def _local(
    dout_ptr, q_ptr, k_ptr, factors_ptr, ids_ptr, inverses_ptr, w_ptr, du_ptr, padding, rows,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    n, row = tl.program_id(0), tl.program_id(1)
    chunk_row = n.to(tl.int64) * rows + row
    i, columns = tl.arange(0, C), tl.arange(0, K_PAD)
    at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
    q = load_rows(q_ptr, at, live, columns, K)
    at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    k = load_rows(k_ptr, at, live, columns, K)
    key = factor(factors_ptr, KEY, chunk_row, C)
    query = factor(factors_ptr, QUERY, chunk_row, C)
    gamma = decay_matrix(factors_ptr, ids_ptr, chunk_row, n, C, DOCUMENTS)
    scores = tl.dot(q, tl.trans(k)) * gamma * query[:, None] * key[None, :]
    scores = tl.trans(scores.to(q.dtype))

    at, live = token_rows(n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C)
    for first in range(0, V, BLOCK_V):
        v_columns = first + tl.arange(0, BLOCK_V)
        du = tl.dot(scores, load_rows(dout_ptr, at, live, v_columns, V))
        du_at = chunk_row * (C * V) + i[:, None] * V + v_columns[None, :]
        keep = (v_columns < V)[None, :]
        tl.store(du_ptr + du_at, du.to(du_ptr.dtype.element_ty), mask=keep)

    beta = factor(factors_ptr, BETA, chunk_row, C)
    read = factor(factors_ptr, READ, chunk_row, C)
    inverse = tl.load(inverses_ptr + chunk_row * (C * C) + i[:, None] * C + i[None, :])
    w = split_dot(inverse * (beta * key * read)[None, :], k)
    w_at = chunk_row * (C * K) + i[:, None] * K + columns[None, :]
    tl.store(w_ptr + w_at, w.to(w_ptr.dtype.element_ty), mask=(columns < K)[None, :])


@triton.jit(do_not_specialize=["padding", "rows", "chunks"])
def _scan(
    dout_ptr, q_ptr, k_ptr, w_ptr, factors_ptr, dfinal_ptr, du_ptr, dstates_ptr, dinitial_ptr,
    padding, rows, chunks, dout_stride_b, dout_stride_t, dout_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``du`` holds P^T dO and receives dU. W^T dU is (beta e^c K)^T dX."""
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
        du = tl.load(du_ptr + chunk_row * (C * V) + u_at, mask=u_keep, other=0.0)
        key = factor(factors_ptr, KEY, chunk_row, C)
        write = factor(factors_ptr, WRITE, chunk_row, C)
        query = factor(factors_ptr, QUERY, chunk_row, C)
        read = factor(factors_ptr, READ, chunk_row, C)
        whole = whole_decay(factors_ptr, chunk_row, C)

        outgoing = dstate.to(low)
        tl.store(dstates_ptr + chunk_row * (K * V) + state_at, outgoing, mask=state_keep)
        total = du.to(tl.float32) + tl.dot(k, outgoing) * (key * write)[:, None]
        tl.store(du_ptr + chunk_row * (C * V) + u_at, total.to(low), mask=u_keep)
        reads = (dout.to(tl.float32) * (query * read)[:, None]).to(low)
        dstate = tl.dot(tl.trans(q), reads, dstate * whole)
        dstate = tl.dot(tl.trans(w), (-total).to(low), dstate)
    tl.store(dinitial_ptr + row_state + state_at, dstate, mask=state_keep)


@triton.jit(do_not_specialize=["padding", "rows"])
def _values(
    dout_ptr, q_ptr, k_ptr, v_ptr, factors_ptr, ids_ptr, inverses_ptr, updates_ptr, du_ptr,
    dv_ptr, dqk_ptr, dkk_ptr, dlog_ptr, dbeta_ptr, padding, rows,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dv_stride_b, dv_stride_t, dv_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """``du`` receives dX. What tokens of the chunk give each other's gates is part 0."""
    n, row = tl.program_id(0), tl.program_id(1)
    chunk_row = n.to(tl.int64) * rows + row
    i, columns = tl.arange(0, C), tl.arange(0, K_PAD)
    square = chunk_row * (C * C) + i[:, None] * C + i[None, :]
    low = du_ptr.dtype.element_ty
    beta = factor(factors_ptr, BETA, chunk_row, C)
    transposed = tl.trans(tl.load(inverses_ptr + square))
    do_at, live = token_rows(
        n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C
    )
    v_at, _ = token_rows(n, row, padding, v_stride_b, v_stride_t, v_stride_h, HEADS, 1, C)
    dv_at, _ = token_rows(n, row, padding, dv_stride_b, dv_stride_t, dv_stride_h, HEADS, 1, C)

    dqk = tl.zeros((C, C), tl.float32)
    dkk = tl.zeros((C, C), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v_columns = first + tl.arange(0, BLOCK_V)
        u_at = chunk_row * (C * V) + i[:, None] * V + v_columns[None, :]
        keep = (v_columns < V)[None, :]
        du = tl.load(du_ptr + u_at, mask=keep, other=0.0)
        u = tl.trans(tl.load(updates_ptr + u_at, mask=keep, other=0.0))
        dout = load_rows(dout_ptr, do_at, live, v_columns, V)
        v = load_rows(v_ptr, v_at, live, v_columns, V)
        dx = split_dot(transposed, du)
        dbeta += tl.sum(dx * v.to(tl.float32), axis=1)
        dv = (dx * beta[:, None]).to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + dv_at[:, None] + v_columns[None, :], dv, mask=live[:, None] & keep)
        dx_low = dx.to(low)
        tl.store(du_ptr + u_at, dx_low, mask=keep)
        dqk = tl.dot(dout, u, dqk)
        dkk = tl.dot(dx_low, u, dkk)

    at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
    q = load_rows(q_ptr, at, live, columns, K)
    at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    k = load_rows(k_ptr, at, live, columns, K)
    key = factor(factors_ptr, KEY, chunk_row, C)
    query = factor(factors_ptr, QUERY, chunk_row, C)
    gamma = decay_matrix(factors_ptr, ids_ptr, chunk_row, n, C, DOCUMENTS) * key[None, :]
    below = i[:, None] > i[None, :]
    dqk = dqk * gamma * query[:, None]
    tl.store(dqk_ptr + square, dqk.to(low))
    read = tl.where(below, dqk * tl.dot(q, tl.trans(k)), 0.0)
    dkk = tl.where(below, -dkk * gamma * key[:, None], 0.0)
    tl.store(dkk_ptr + square, (dkk * beta[:, None]).to(low))
    erased = dkk * tl.dot(k, tl.trans(k))

    # Rows and columns of the same products, so that what cancels between them does so.
    erased_rows = tl.sum(erased, axis=1)
    columns_sum = tl.sum(read + erased * beta[:, None], axis=0)
    part = chunk_row * (PARTS * C) + i
    tl.store(dlog_ptr + part, tl.sum(read, axis=1) + erased_rows * beta - columns_sum)
    tl.store(dbeta_ptr + part, dbeta + erased_rows)


@triton.jit(do_not_specialize=["padding", "rows"])
def _keys(
    dout_ptr, q_ptr, k_ptr, factors_ptr, states_ptr, updates_ptr, dx_ptr, dstates_ptr,
    dqk_ptr, dkk_ptr, dq_ptr, dk_ptr, dlog_ptr, dbeta_ptr, padding, rows,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What states give the gates through a block of K is part 1 + block."""
    blocks: tl.constexpr = PARTS - 1
    n, block, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    chunk_row = n.to(tl.int64) * rows + row
    i = tl.arange(0, C)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    at, live = token_rows(n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C)
    dq = tl.zeros((C, BLOCK_K), tl.float32)
    erase = tl.zeros((C, BLOCK_K), tl.float32)
    write = tl.zeros((C, BLOCK_K), tl.float32)
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v_columns = first + tl.arange(0, BLOCK_V)
        keep = (v_columns < V)[None, :]
        u_at = chunk_row * (C * V) + i[:, None] * V + v_columns[None, :]
        state_at = chunk_row * (K * V) + columns[:, None] * V + v_columns[None, :]
        state_keep = (columns < K)[:, None] & keep
        state = tl.load(states_ptr + state_at, mask=state_keep, other=0.0)
        dstate = tl.load(dstates_ptr + state_at, mask=state_keep, other=0.0)
        dout = load_rows(dout_ptr, at, live, v_columns, V)
        dx = tl.load(dx_ptr + u_at, mask=keep, other=0.0)
        u = tl.load(updates_ptr + u_at, mask=keep, other=0.0)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
        dq = tl.dot(dout, tl.trans(state), dq)
        erase = tl.dot(dx, tl.trans(state), erase)
        write = tl.dot(u, tl.trans(dstate), write)

    at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
    q = load_rows(q_ptr, at, live, columns, K)
    at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    k = load_rows(k_ptr, at, live, columns, K)
    key = factor(factors_ptr, KEY, chunk_row, C)
    beta = factor(factors_ptr, BETA, chunk_row, C)
    from_start = factor(factors_ptr, READ, chunk_row, C)
    dq = dq * (from_start * factor(factors_ptr, QUERY, chunk_row, C))[:, None]
    erase = erase * (-from_start * key)[:, None]
    write = write * (factor(factors_ptr, WRITE, chunk_row, C) * key)[:, None]

    # The last token's write reaches the outgoing state with an exponent of 0.
    k_wide = k.to(tl.float32)
    written = tl.where(i < C - 1, tl.sum(write * k_wide, axis=1), 0.0)
    erased = tl.sum(erase * k_wide, axis=1)
    dlog = tl.sum(dq * q.to(tl.float32), axis=1) + erased * beta - written
    whole = tl.sum(written, axis=0) + tl.sum(kept, axis=0) * whole_decay(factors_ptr, chunk_row, C)
    part = chunk_row * (PARTS * C) + (1 + block) * C + i
    tl.store(dlog_ptr + part, dlog + tl.where(i == C - 1, whole, 0.0))
    tl.store(dbeta_ptr + part, erased)

    square = chunk_row * (C * C) + i[:, None] * C + i[None, :]
    dqk = tl.load(dqk_ptr + square)
    dkk = tl.load(dkk_ptr + square)
    dq = tl.dot(dqk, k, dq)
    dk = tl.dot(dkk, k, erase * beta[:, None] + write)
    dk = tl.dot(tl.trans(dkk), k, dk)
    dk = tl.dot(tl.trans(dqk), q, dk)
    out = chunk_row * (C * K) + i[:, None] * K + columns[None, :]
    tl.store(dq_ptr + out, dq, mask=(columns < K)[None, :])
    tl.store(dk_ptr + out, dk, mask=(columns < K)[None, :])


@triton.jit
def _through_length(x_ptr, dx_ptr, out_ptr, at, out_at, live, chunk_row, squares,
                    GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
                    NORMALIZE: tl.constexpr):  # fmt: skip
    """Sum a chunk's gradients over value heads and take them through the normalisation."""
    columns = tl.arange(0, K_PAD)
    keep = (columns < K)[None, :]
    parts = dx_ptr + chunk_row * (C * K) + tl.arange(0, C)[:, None] * K + columns[None, :]
    total = tl.load(parts, mask=keep, other=0.0)
    for head in range(1, GROUP):
        total += tl.load(parts + head * (C * K), mask=keep, other=0.0)
    if NORMALIZE:
        x = load_rows(x_ptr, at, live, columns, K).to(tl.float32)
        total -= x * (squares * tl.sum(total * x, axis=1))[:, None]
    out = out_ptr + out_at[:, None] + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & keep)


@triton.jit(do_not_specialize=["padding", "rows"])
def _finish(
    q_ptr, k_ptr, factors_ptr, dq_rows_ptr, dk_rows_ptr, dlog_ptr, dbeta_rows_ptr,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, padding, rows, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, dg_stride_b, dg_stride_t, dg_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, PARTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program's rows are the GROUP value heads of one key head."""
    n, row = tl.program_id(0), tl.program_id(1) * GROUP
    chunk_row = n.to(tl.int64) * rows + row
    i = tl.arange(0, C)
    query = factor(factors_ptr, QUERY, chunk_row, C) / scale
    key = factor(factors_ptr, KEY, chunk_row, C)
    out_at, live = token_rows(
        n, row, padding, dq_stride_b, dq_stride_t, dq_stride_h, HEADS, GROUP, C
    )
    at, _ = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
    _through_length(q_ptr, dq_rows_ptr, dq_ptr, at, out_at, live, chunk_row, query * query,
                    GROUP, C, K, K_PAD, NORMALIZE)  # fmt: skip
    at, _ = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    _through_length(k_ptr, dk_rows_ptr, dk_ptr, at, out_at, live, chunk_row, key * key,
                    GROUP, C, K, K_PAD, NORMALIZE)  # fmt: skip

    for head in range(GROUP):
        part = (chunk_row + head) * (PARTS * C) + i
        dlog = tl.load(dlog_ptr + part)
        dbeta = tl.load(dbeta_rows_ptr + part)
        for block in range(1, PARTS):
            dlog += tl.load(dlog_ptr + part + block * C)
            dbeta += tl.load(dbeta_rows_ptr + part + block * C)
        # The logarithm of a decay is a running sum of g inside each chunk.
        dg = tl.cumsum(dlog, axis=0, reverse=True)
        at, live = token_rows(
            n, row + head, padding, dg_stride_b, dg_stride_t, dg_stride_h, HEADS, 1, C
        )
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=live)
        tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=live)


def launch_backward(
    grid: ChunkGrid, dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    g: Tensor, beta: Tensor, ids: Tensor | None, saved: Saved, scale: float, normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, g, beta and the initial state. ``ids`` are the documents (N, C)."""
    N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    factors, sizes = compute_factors(grid, q, k, g, beta, ids, scale, normalize_qk)
    documents, k_pad = sizes.pop("DOCUMENTS"), sizes.pop("K_PAD")
    wide = k_pad > 128
    warps = 8 if wide else 4
    values = {"V": V, "BLOCK_V": NARROWEST}
    common = (grid.padding, R)

    w, du = q.new_empty(N, R, C, K), q.new_empty(N, R, C, V)
    _local[(N, R)](
        dout, q, k, factors, ids, saved.inverses, w, du, *common, *strides(dout, q, k),
        **sizes, K_PAD=k_pad, **values, DOCUMENTS=documents, num_warps=warps, num_stages=2,
    )  # fmt: skip

    dstates = torch.empty_like(saved.states)
    dinitial = factors.new_empty(grid.batch, grid.value_heads, K, V)
    _scan[(triton.cdiv(V, NARROWEST), R)](
        dout, q, k, w, factors, None if dfinal is None else dfinal.contiguous(), du, dstates,
        dinitial, *common, N, *strides(dout, q, k), **sizes, K_PAD=k_pad, **values,
        STAGES=1 if wide else 2, num_warps=warps,
    )  # fmt: skip

    parts = 1 + k_pad // NARROWEST
    dlog, dbeta_rows = (factors.new_empty(N, R, parts, C) for _ in range(2))
    dqk, dkk = (q.new_empty(N, R, C, C) for _ in range(2))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _values[(N, R)](
        dout, q, k, v, factors, ids, saved.inverses, saved.updates, du, dv, dqk, dkk, dlog,
        dbeta_rows, *common, *strides(dout, q, k, v, dv), **sizes, K_PAD=k_pad, **values,
        PARTS=parts, DOCUMENTS=documents, num_warps=warps, num_stages=2,
    )  # fmt: skip

    dq_rows, dk_rows = (factors.new_empty(N, R, C, K) for _ in range(2))
    _keys[(N * (parts - 1), R)](
        dout, q, k, factors, saved.states, saved.updates, du, dstates, dqk, dkk, dq_rows, dk_rows,
        dlog, dbeta_rows, *common, *strides(dout, q, k), **sizes, BLOCK_K=NARROWEST, **values,
        PARTS=parts, num_warps=4, num_stages=2,
    )  # fmt: skip

    dq, dk, dg, dbeta = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, g, beta)
    )
    _finish[(N, grid.key_rows)](
        q, k, factors, dq_rows, dk_rows, dlog, dbeta_rows, dq, dk, dg, dbeta, *common, scale,
        *strides(q, k, dq, dg), **sizes, K_PAD=k_pad, PARTS=parts, NORMALIZE=normalize_qk,
        num_warps=warps,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial
