"""
The gated delta rule's backward pass in Triton. Two launches after the factors, or three:

* :func:`_scan`, for each row and block of V, from the last chunk to the first: dU, and the
  gradients of the outgoing states;
* :func:`_gradients`, for each chunk and value head: dX, and the gradients of all inputs;
* :func:`_finish`, for each chunk and key head that has several value heads, or more keys than a
  program holds: their sums, and what normalising changes.

Exponents get their gradients as ``torch_backward`` says, without the terms that are 0.
A factor f = scale * rsqrt(<x, x> + eps) of x needs no gradient of its own: with d the gradient of
f x, as if f were a constant, dx = d - rsqrt(<x, x> + eps)^2 x <x, d>.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch

from .blocks import scan_blocks
from .chunks import ChunkGrid, RuleInputs
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
    next_start,
    span_of,
    spans_for,
    strides,
    token_rows,
    whole_decay,
)

_MOST_KEYS = 128  # whose gradients a program holds in registers


@triton.jit(do_not_specialize=["padding", "rows", "chunks"])
def _scan(
    dout_ptr, q_ptr, k_ptr, w_ptr, scores_ptr, factors_ptr, ids_ptr, dfinal_ptr, du_ptr,
    dstates_ptr, dinitial_ptr, padding, rows, chunks, dout_stride_b, dout_stride_t, dout_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """dU = P^T dO + (e^(c_C - c) K) dS'. W^T dU is (beta e^c K)^T dX. Keeps dU and dS' if asked."""
    block, row = tl.program_id(0), tl.program_id(1)
    i, k_columns = tl.arange(0, C), tl.arange(0, K_PAD)
    v_columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state_at = k_columns[:, None] * V + v_columns[None, :]
    state_keep = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    w_at, w_keep = i[:, None] * K + k_columns[None, :], (k_columns < K)[None, :]
    u_at, u_keep = i[:, None] * V + v_columns[None, :], (v_columns < V)[None, :]
    low = w_ptr.dtype.element_ty

    row_state = row.to(tl.int64) * (K * V)
    first, stop, last = 0, chunks, chunks
    if DOCUMENTS:
        first, stop = span_of(chunks)
        last = next_start(ids_ptr, stop, chunks, C)
    dstate = tl.zeros((K_PAD, BLOCK_V), tl.float32)
    if dfinal_ptr is not None:
        at_end = state_keep & (last == chunks)
        dstate += tl.load(dfinal_ptr + row_state + state_at, mask=at_end, other=0.0)
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        mine = n < stop
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
        if dstates_ptr is not None:
            kept_at = chunk_row * (K * V) + state_at
            tl.store(dstates_ptr + kept_at, outgoing, mask=state_keep & mine)
        scaled = dout.to(tl.float32) * query[:, None]
        du = tl.dot(k, outgoing) * (key * write)[:, None]
        total = tl.dot(tl.trans(scores), scaled.to(low), du)
        if du_ptr is not None:
            tl.store(du_ptr + chunk_row * (C * V) + u_at, total.to(low), mask=u_keep & mine)
        reads = (scaled * read[:, None]).to(low)
        dstate = tl.dot(tl.trans(q), reads, dstate * whole)
        dstate = tl.dot(tl.trans(w), (-total).to(low), dstate)
    tl.store(dinitial_ptr + row_state + state_at, dstate, mask=state_keep & (first == 0))


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


@triton.jit(do_not_specialize=["padding", "rows", "dg_stride_b"])
def _gradients(
    dout_ptr, q_ptr, k_ptr, v_ptr, factors_ptr, ids_ptr, inverses_ptr, states_ptr, updates_ptr,
    du_ptr, dstates_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, padding, rows, scale,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, dv_stride_b, dv_stride_t, dv_stride_h,
    dg_stride_b, dg_stride_t, dg_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK_K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """DIRECT: dq and dk are those of the inputs. Otherwise they are parts (N, R, C, K) float32 of
    each value head, before the normalisation."""
    BLOCKS: tl.constexpr = K_PAD // BLOCK_K
    n, row = tl.program_id(0), tl.program_id(1)
    chunk_row = n.to(tl.int64) * rows + row
    i = tl.arange(0, C)
    square = chunk_row * (C * C) + i[:, None] * C + i[None, :]
    transposed = tl.trans(tl.load(inverses_ptr + square))
    low = transposed.to(du_ptr.dtype.element_ty)
    rest = (transposed - low.to(tl.float32)).to(low.dtype)
    beta = factor(factors_ptr, BETA, chunk_row, C)
    do_at, live = token_rows(
        n, row, padding, dout_stride_b, dout_stride_t, dout_stride_h, HEADS, 1, C
    )
    v_at, _ = token_rows(n, row, padding, v_stride_b, v_stride_t, v_stride_h, HEADS, 1, C)
    dv_at, _ = token_rows(n, row, padding, dv_stride_b, dv_stride_t, dv_stride_h, HEADS, 1, C)
    dqk_low, dkk_low = tl.zeros((C, C), low.dtype), tl.zeros((C, C), low.dtype)
    dlog, dbeta = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for block in tl.static_range(BLOCKS):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        dq, erase, write, kept, dqk, dkk, dbeta_v = _through_values(
            dout_ptr, v_ptr, states_ptr, updates_ptr, du_ptr, dstates_ptr, dv_ptr, do_at, v_at,
            dv_at, live, chunk_row, low, rest, beta, columns,
            C, K, BLOCK_K, V, BLOCK_V, block == 0,
        )  # fmt: skip
        q_at, _ = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
        k_at, _ = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
        query = factor(factors_ptr, QUERY, chunk_row, C)
        key = factor(factors_ptr, KEY, chunk_row, C)
        if block == 0:
            # What tokens of the chunk give each other. Sums are rows and columns of the same
            # products, so that what cancels between them does so.
            below = i[:, None] > i[None, :]
            gamma = decay_matrix(factors_ptr, ids_ptr, chunk_row, n, C, DOCUMENTS) * key[None, :]
            dqk = dqk * gamma * query[:, None]
            scores = _token_products(q_ptr, k_ptr, q_at, k_at, live, C, K, BLOCK_K, BLOCKS)
            read = tl.where(below, dqk * scores, 0.0)
            dkk = tl.where(below, -dkk * gamma * key[:, None], 0.0)
            erased = dkk * _token_products(k_ptr, k_ptr, k_at, k_at, live, C, K, BLOCK_K, BLOCKS)
            erased_rows = tl.sum(erased, axis=1)
            columns_sum = tl.sum(read + erased * beta[:, None], axis=0)
            dlog += tl.sum(read, axis=1) + erased_rows * beta - columns_sum
            dbeta += dbeta_v + erased_rows
            dqk_low, dkk_low = dqk.to(low.dtype), (dkk * beta[:, None]).to(low.dtype)

        # What states give. The last token's write reaches the outgoing one with an exponent of 0.
        q = load_rows(q_ptr, q_at, live, columns, K)
        k = load_rows(k_ptr, k_at, live, columns, K)
        k_wide = k.to(tl.float32)
        from_start = factor(factors_ptr, READ, chunk_row, C)
        dq *= (from_start * query)[:, None]
        erase *= (-from_start * key)[:, None]
        write *= (factor(factors_ptr, WRITE, chunk_row, C) * key)[:, None]
        written = tl.where(i < C - 1, tl.sum(write * k_wide, axis=1), 0.0)
        erased_k = tl.sum(erase * k_wide, axis=1)
        dbeta += erased_k
        dlog += tl.sum(dq * q.to(tl.float32), axis=1) + erased_k * beta - written
        decay = whole_decay(factors_ptr, chunk_row, C)
        whole = tl.sum(written[None, :], axis=1) + tl.sum(kept[None, :], axis=1) * decay
        dlog += tl.where(i == C - 1, whole, 0.0)

        dq = tl.dot(dqk_low, k, dq)
        dk = tl.dot(dkk_low, k, erase * beta[:, None] + write)
        dk = tl.dot(tl.trans(dkk_low), k, dk)
        dk = tl.dot(tl.trans(dqk_low), q, dk)
        keep = live[:, None] & (columns < K)[None, :]
        if DIRECT:
            if NORMALIZE:
                q_wide, length = q.to(tl.float32), query / scale
                dq -= q_wide * (length * length * tl.sum(dq * q_wide, axis=1))[:, None]
                dk -= k_wide * (key * key * tl.sum(dk * k_wide, axis=1))[:, None]
            out, _ = token_rows(
                n, row, padding, dq_stride_b, dq_stride_t, dq_stride_h, HEADS, GROUP, C
            )
        else:
            out = chunk_row * (C * K) + i * K
        out = out[:, None] + columns[None, :]
        tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=keep)
        tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=keep)

    # The logarithm of a decay is a running sum of g inside each chunk.
    dg = tl.cumsum(dlog, axis=0, reverse=True)
    at, _ = token_rows(n, row, padding, dg_stride_b, dg_stride_t, dg_stride_h, HEADS, 1, C)
    tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=live)
    tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=live)


@triton.jit
def _through_length(x_ptr, parts_ptr, out_ptr, at, out_at, live, chunk_row, squares,
                    GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
                    NORMALIZE: tl.constexpr):  # fmt: skip
    """Sum a chunk's gradients over value heads and take them through the normalisation."""
    columns = tl.arange(0, K_PAD)
    keep = live[:, None] & (columns < K)[None, :]
    parts = parts_ptr + chunk_row * (C * K) + tl.arange(0, C)[:, None] * K + columns[None, :]
    total = tl.load(parts, mask=keep, other=0.0)
    for head in range(1, GROUP):
        total += tl.load(parts + head * (C * K), mask=keep, other=0.0)
    if NORMALIZE:
        x = load_rows(x_ptr, at, live, columns, K).to(tl.float32)
        total -= x * (squares * tl.sum(total * x, axis=1))[:, None]
    out = out_ptr + out_at[:, None] + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["padding", "rows"])
def _finish(
    q_ptr, k_ptr, factors_ptr, dq_parts_ptr, dk_parts_ptr, dq_ptr, dk_ptr, padding, rows, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program's rows are the GROUP value heads of one key head, which share its factors."""
    n, row = tl.program_id(0), tl.program_id(1) * GROUP
    chunk_row = n.to(tl.int64) * rows + row
    query = factor(factors_ptr, QUERY, chunk_row, C) / scale
    key = factor(factors_ptr, KEY, chunk_row, C)
    out_at, live = token_rows(
        n, row, padding, dq_stride_b, dq_stride_t, dq_stride_h, HEADS, GROUP, C
    )
    at, _ = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
    _through_length(q_ptr, dq_parts_ptr, dq_ptr, at, out_at, live, chunk_row, query * query,
                    GROUP, C, K, K_PAD, NORMALIZE)  # fmt: skip
    at, _ = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    _through_length(k_ptr, dk_parts_ptr, dk_ptr, at, out_at, live, chunk_row, key * key,
                    GROUP, C, K, K_PAD, NORMALIZE)  # fmt: skip


def launch_backward(
    grid: ChunkGrid, dout: Tensor, dfinal: Tensor | Callable[[Tensor], Tensor] | None,
    x: RuleInputs, ids: Tensor | None, saved: Saved, reach: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, g, beta and the initial state. ``ids`` are the documents (N, C).

    dfinal may be a function of the initial state's gradient, as the first ``reach`` chunks give it
    without dfinal.
    """
    N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    q, k, v, scale = x.q, x.k, x.v, x.scale
    factors, sizes = compute_factors(grid, x, ids)
    documents = sizes.pop("DOCUMENTS")
    wide = sizes["K_PAD"] > _MOST_KEYS
    scan = scan_blocks(sizes["K_PAD"], q.device)
    blocks = triton.cdiv(V, scan.columns)
    common = (grid.padding, R)

    def carry(
        dfinal: Tensor | None, du: Tensor | None, dstates: Tensor | None, chunks: int, spans: int
    ) -> Tensor:
        dinitial = factors.new_empty(grid.batch, grid.value_heads, K, V)
        launch(_scan, (blocks, R, spans))(
            dout, q, k, saved.erasers, saved.scores, factors, ids,
            None if dfinal is None else dfinal.contiguous(), du, dstates, dinitial, *common, chunks,
            *strides(dout, q, k), **sizes, V=V, BLOCK_V=scan.columns, STAGES=scan.backward_stages,
            DOCUMENTS=documents, num_warps=scan.warps,
        )  # fmt: skip
        return dinitial

    if callable(dfinal):
        dfinal = dfinal(carry(None, None, None, reach, 1))
    du, dstates = q.new_empty(N, R, C, V), torch.empty_like(saved.states)
    spans = spans_for(blocks * R, N, q) if documents else 1
    dinitial = carry(dfinal, du, dstates, N, spans)

    dq, dk, dv, dg, dbeta = (
        torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in x.tensors
    )
    direct = grid.group == 1 and not wide
    parts = [dq, dk] if direct else [factors.new_empty(N, R, C, K) for _ in range(2)]
    launch(_gradients, (N, R))(
        dout, q, k, v, factors, ids, saved.inverses, saved.states, saved.updates, du, dstates,
        *parts, dv, dg, dbeta, *common, scale, *strides(dout, q, k, v, dq, dv, dg), **sizes,
        V=V, BLOCK_V=NARROWEST, BLOCK_K=min(sizes["K_PAD"], _MOST_KEYS), DOCUMENTS=documents,
        NORMALIZE=x.normalize_qk, DIRECT=direct, num_warps=8, num_stages=2,
    )  # fmt: skip
    if not direct:
        launch(_finish, (N, grid.key_rows))(
            q, k, factors, *parts, dq, dk, *common, scale, *strides(q, k, dq), **sizes,
            NORMALIZE=x.normalize_qk, num_warps=scan.warps,
        )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial
