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


@triton.jit
def _through_values(
    dout_ptr, v_ptr, states_ptr, updates_ptr, du_ptr, dstates_ptr, dv_ptr, do_at, v_at, dv_at,
    live, chunk_row, low, rest, beta, columns,
    C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Over all values, for a block of keys: what reading and writing states gives queries and keys,
    and the states' own product; with FIRST also dV, and the products of the chunk's tokens."""
    i = tl.arange(0, C)
    dqk, dkk = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    dq, erase = tl.zeros((C, BLOCK_K), tl.float32), tl.zeros((C, BLOCK_K), tl.float32)
    write = tl.zeros((C, BLOCK_K), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v_columns = first + tl.arange(0, BLOCK_V)
        keep = (v_columns < V)[None, :]
        u_at = chunk_row * (C * V) + i[:, None] * V + v_columns[None, :]
        state_at = chunk_row * (K * V) + columns[:, None] * V + v_columns[None, :]
        state_keep = (columns < K)[:, None] & keep
        du = tl.load(du_ptr + u_at, mask=keep, other=0.0)
        u = tl.load(updates_ptr + u_at, mask=keep, other=0.0)
        dout = load_rows(dout_ptr, do_at, live, v_columns, V)
        state = tl.load(states_ptr + state_at, mask=state_keep, other=0.0)
        dstate = tl.load(dstates_ptr + state_at, mask=state_keep, other=0.0)
        dx = tl.dot(low, du, tl.dot(rest, du))
        dx_low = dx.to(low.dtype)
        if FIRST:
            v = load_rows(v_ptr, v_at, live, v_columns, V)
            dbeta += tl.sum(dx * v.to(tl.float32), axis=1)
            dv = (dx * beta[:, None]).to(dv_ptr.dtype.element_ty)
            tl.store(dv_ptr + dv_at[:, None] + v_columns[None, :], dv, mask=live[:, None] & keep)
            dqk = tl.dot(dout, tl.trans(u), dqk)
            dkk = tl.dot(dx_low, tl.trans(u), dkk)
        dq = tl.dot(dout, tl.trans(state), dq)
        erase = tl.dot(dx_low, tl.trans(state), erase)
        write = tl.dot(u, tl.trans(dstate), write)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
    return dq, erase, write, kept, dqk, dkk, dbeta


@triton.jit
def _token_products(x_ptr, y_ptr, x_at, y_at, live, C: tl.constexpr, K: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """X Y^T (C, C) of a chunk's queries or keys."""
    products = tl.zeros((C, C), tl.float32)
    for block in tl.static_range(BLOCKS):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, x_at, live, columns, K)
        products = tl.dot(x, tl.trans(load_rows(y_ptr, y_at, live, columns, K)), products)
    return products


@triton.jit
def _along(x_ptr, x_at, live, columns, grad, K: tl.constexpr):
    """<grad, x> over a block of K, (C,)."""
    x = load_rows(x_ptr, x_at, live, columns, K)
    return tl.sum(grad * x.to(tl.float32), axis=1)


@triton.jit
def _store_gradient(out_ptr, out_at, x_ptr, x_at, live, columns, grad, along, K: tl.constexpr,
                    NORMALIZE: tl.constexpr):  # fmt: skip
    """Write a block of a gradient, taken through the normalisation by ``along`` (C,)."""
    if NORMALIZE:
        grad -= load_rows(x_ptr, x_at, live, columns, K).to(tl.float32) * along[:, None]
    out = out_ptr + out_at[:, None] + columns[None, :]
    keep = live[:, None] & (columns < K)[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["padding", "rows"])
def _gradients(
    dout_ptr, q_ptr, k_ptr, v_ptr, factors_ptr, ids_ptr, inverses_ptr, states_ptr, updates_ptr,
    du_ptr, dstates_ptr, sums_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, padding, rows, scale,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, dv_stride_b, dv_stride_t, dv_stride_h,
    dg_stride_b, dg_stride_t, dg_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK_K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program's rows are the GROUP value heads of one key head.

    Sums over those, and blocks of K beyond the first, wait in ``sums`` (N, B * H, 2, C, K_PAD),
    which this program alone touches; without either there is none.
    """
    BLOCKS: tl.constexpr = K_PAD // BLOCK_K
    n, key_row = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, C)
    below = i[:, None] > i[None, :]
    first_row = key_row * GROUP
    q_at, live = token_rows(
        n, first_row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C
    )
    k_at, _ = token_rows(n, first_row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    out_at, _ = token_rows(
        n, first_row, padding, dq_stride_b, dq_stride_t, dq_stride_h, HEADS, GROUP, C
    )
    # All value heads of a key head have its factors.
    first_chunk_row = n.to(tl.int64) * rows + first_row
    query = factor(factors_ptr, QUERY, first_chunk_row, C)
    key = factor(factors_ptr, KEY, first_chunk_row, C)

    for head in range(GROUP):
        row = first_row + head
        chunk_row = first_chunk_row + head
        transposed = tl.trans(
            tl.load(inverses_ptr + chunk_row * (C * C) + i[:, None] * C + i[None, :])
        )
        low = transposed.to(du_ptr.dtype.element_ty)
        rest = (transposed - low.to(tl.float32)).to(low.dtype)
        beta = factor(factors_ptr, BETA, chunk_row, C)
        from_start = factor(factors_ptr, READ, chunk_row, C)
        do_at, _ = token_rows(
            n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C
        )
        v_at, _ = token_rows(n, row, padding, v_stride_b, v_stride_t, v_stride_h, HEADS, 1, C)
        dv_at, _ = token_rows(n, row, padding, dv_stride_b, dv_stride_t, dv_stride_h, HEADS, 1, C)
        dqk_low, dkk_low = tl.zeros((C, C), low.dtype), tl.zeros((C, C), low.dtype)
        dlog, dbeta = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        whole = 0.0
        for block in tl.static_range(BLOCKS):
            columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
            dq, erase, write, kept, dqk, dkk, dbeta_v = _through_values(
                dout_ptr, v_ptr, states_ptr, updates_ptr, du_ptr, dstates_ptr, dv_ptr, do_at, v_at,
                dv_at, live, chunk_row, low, rest, beta, columns,
                C, K, BLOCK_K, V, BLOCK_V, block == 0,
            )  # fmt: skip
            if block == 0:
                # What tokens of the chunk give each other. Sums are rows and columns of the same
                # products, so that what cancels between them does so.
                gamma = decay_matrix(factors_ptr, ids_ptr, chunk_row, n, C, DOCUMENTS)
                dqk = dqk * gamma * query[:, None] * key[None, :]
                dkk = tl.where(below, -dkk * gamma * key[:, None] * key[None, :], 0.0)
                scores = _token_products(q_ptr, k_ptr, q_at, k_at, live, C, K, BLOCK_K, BLOCKS)
                read = tl.where(below, dqk * scores, 0.0)
                scores = _token_products(k_ptr, k_ptr, k_at, k_at, live, C, K, BLOCK_K, BLOCKS)
                erased = dkk * scores
                erased_rows = tl.sum(erased, axis=1)
                columns_sum = tl.sum(read + erased * beta[:, None], axis=0)
                dlog += tl.sum(read, axis=1) + erased_rows * beta - columns_sum
                dbeta += dbeta_v + erased_rows
                dqk_low, dkk_low = dqk.to(low.dtype), (dkk * beta[:, None]).to(low.dtype)

            # What states give. The last token's write reaches the outgoing one with an exponent
            # of 0.
            q = load_rows(q_ptr, q_at, live, columns, K)
            k = load_rows(k_ptr, k_at, live, columns, K)
            k_wide = k.to(tl.float32)
            dq *= (from_start * query)[:, None]
            erase *= (-from_start * key)[:, None]
            write *= (factor(factors_ptr, WRITE, chunk_row, C) * key)[:, None]
            written = tl.where(i < C - 1, tl.sum(write * k_wide, axis=1), 0.0)
            erased_k = tl.sum(erase * k_wide, axis=1)
            dbeta += erased_k
            dlog += tl.sum(dq * q.to(tl.float32), axis=1) + erased_k * beta - written
            decay = whole_decay(factors_ptr, chunk_row, C)
            whole += tl.sum(written, axis=0) + tl.sum(kept, axis=0) * decay

            dq = tl.dot(dqk_low, k, dq)
            dk = tl.dot(dkk_low, k, erase * beta[:, None] + write)
            dk = tl.dot(tl.trans(dkk_low), k, dk)
            dk = tl.dot(tl.trans(dqk_low), q, dk)
            if sums_ptr is None:
                along_q, along_k = query, key
                if NORMALIZE:
                    q_length = query / scale
                    along_q = q_length * q_length * tl.sum(dq * q.to(tl.float32), axis=1)
                    along_k = key * key * tl.sum(dk * k_wide, axis=1)
                _store_gradient(
                    dq_ptr, out_at, q_ptr, q_at, live, columns, dq, along_q, K, NORMALIZE
                )
                _store_gradient(
                    dk_ptr, out_at, k_ptr, k_at, live, columns, dk, along_k, K, NORMALIZE
                )
            else:
                at = (n.to(tl.int64) * (rows // GROUP) + key_row) * (2 * C * K_PAD)
                sums = sums_ptr + at + i[:, None] * K_PAD + columns[None, :]
                dq += tl.load(sums, mask=head > 0, other=0.0)
                dk += tl.load(sums + C * K_PAD, mask=head > 0, other=0.0)
                tl.debug_barrier()
                tl.store(sums, dq)
                tl.store(sums + C * K_PAD, dk)
                tl.debug_barrier()

        # The logarithm of a decay is a running sum of g inside each chunk.
        dg = tl.cumsum(dlog + tl.where(i == C - 1, whole, 0.0), axis=0, reverse=True)
        at, _ = token_rows(n, row, padding, dg_stride_b, dg_stride_t, dg_stride_h, HEADS, 1, C)
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=live)
        tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=live)

    if sums_ptr is not None:
        at = (n.to(tl.int64) * (rows // GROUP) + key_row) * (2 * C * K_PAD)
        along_q, along_k = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        if NORMALIZE:
            for block in tl.static_range(BLOCKS):
                columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
                sums = sums_ptr + at + i[:, None] * K_PAD + columns[None, :]
                along_q += _along(q_ptr, q_at, live, columns, tl.load(sums), K)
                along_k += _along(k_ptr, k_at, live, columns, tl.load(sums + C * K_PAD), K)
            q_length = query / scale
            along_q, along_k = along_q * q_length * q_length, along_k * key * key
        for block in tl.static_range(BLOCKS):
            columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
            sums = sums_ptr + at + i[:, None] * K_PAD + columns[None, :]
            dq, dk = tl.load(sums), tl.load(sums + C * K_PAD)
            _store_gradient(dq_ptr, out_at, q_ptr, q_at, live, columns, dq, along_q, K, NORMALIZE)
            _store_gradient(dk_ptr, out_at, k_ptr, k_at, live, columns, dk, along_k, K, NORMALIZE)


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
    k_pad = sizes["K_PAD"]
    sums = factors.new_empty(N, grid.key_rows, 2, C, k_pad) if wide or grid.group > 1 else None
    _gradients[(N, grid.key_rows)](
        dout, q, k, v, factors, ids, saved.inverses, saved.states, saved.updates, du, dstates,
        sums, dq, dk, dv, dg, dbeta, *common, scale, *strides(dout, q, k, v, dq, dv, dg), **sizes,
        **values, BLOCK_K=min(k_pad, 128), DOCUMENTS=documents, NORMALIZE=normalize_qk,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial
