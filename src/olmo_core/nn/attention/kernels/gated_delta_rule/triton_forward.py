"""
The gated delta rule's forward pass in Triton. Two launches after the factors:

* :func:`_prepare`, for each chunk: T, W = T (beta e^c K), T (beta V), and the scores;
* :func:`_scan`, for each row and block of V, over the chunks: the incoming states S, U and O.
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
    last_start,
    load_rows,
    span_of,
    spans_for,
    split_dot,
    strides,
    token_rows,
    whole_decay,
)


@triton.jit
def _halves_dot(a, b, LOW: tl.constexpr):
    """a @ b of float32 matrices, each as two parts of half precision: 16 bits of bfloat16."""
    a_high, b_high = a.to(LOW), b.to(LOW)
    a_low, b_low = (a - a_high.to(tl.float32)).to(LOW), (b - b_high.to(tl.float32)).to(LOW)
    return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit
def _invert(a, C: tl.constexpr, LEVELS: tl.constexpr, LOW: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular ``a`` (C, C), C = 2 ** LEVELS, float32.

    Diagonal blocks of twice the size at each level, [[P, 0], [L, Q]]^-1 = [[P', 0], [-Q' L P', Q']]
    for all at once: with D the inverses so far and L what couples two neighbours, D - D L D.
    """
    i = tl.arange(0, C)
    same = (i[:, None] // 2) == (i[None, :] // 2)
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    d = tl.where(same, eye - a, 0.0)
    for level in range(1, LEVELS):
        apart = (i[:, None] >> level) != (i[None, :] >> level)
        pair = (i[:, None] >> (level + 1)) == (i[None, :] >> (level + 1))
        coupling = tl.where(apart & pair, a, 0.0)
        d -= _halves_dot(d, _halves_dot(coupling, d, LOW), LOW)
    return d


@triton.jit(do_not_specialize=["padding", "rows"])
def _prepare(
    q_ptr, k_ptr, v_ptr, factors_ptr, ids_ptr, inverses_ptr, w_ptr, updates_ptr, scores_ptr,
    padding, rows, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    n, row = tl.program_id(0), tl.program_id(1)
    chunk_row = n.to(tl.int64) * rows + row
    i, columns = tl.arange(0, C), tl.arange(0, K_PAD)
    at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
    k = load_rows(k_ptr, at, live, columns, K)
    key = factor(factors_ptr, KEY, chunk_row, C)
    beta = factor(factors_ptr, BETA, chunk_row, C)
    gamma = decay_matrix(factors_ptr, ids_ptr, chunk_row, n, C, DOCUMENTS)
    system = tl.dot(k, tl.trans(k)) * gamma * (beta * key)[:, None] * key[None, :]
    square = chunk_row * (C * C) + i[:, None] * C + i[None, :]
    at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
    q = load_rows(q_ptr, at, live, columns, K)
    # The queries' factor comes last: in half precision it may be too small for the operand.
    scores = tl.dot(q, tl.trans(k)) * gamma * key[None, :]
    tl.store(scores_ptr + square, scores.to(scores_ptr.dtype.element_ty))
    low = k_ptr.dtype.element_ty
    inverse = _invert(tl.where(i[:, None] > i[None, :], system, 0.0), C, LEVELS, low)
    if inverses_ptr is not None:
        tl.store(inverses_ptr + square, inverse)

    read = factor(factors_ptr, READ, chunk_row, C)
    w = split_dot(inverse * (beta * key * read)[None, :], k)
    w_at = chunk_row * (C * K) + i[:, None] * K + columns[None, :]
    tl.store(w_ptr + w_at, w.to(w_ptr.dtype.element_ty), mask=(columns < K)[None, :])

    at, live = token_rows(n, row, padding, v_stride_b, v_stride_t, v_stride_h, HEADS, 1, C)
    by_beta = inverse * beta[None, :]
    for first in range(0, V, BLOCK_V):
        v_columns = first + tl.arange(0, BLOCK_V)
        u = split_dot(by_beta, load_rows(v_ptr, at, live, v_columns, V))
        u_at = chunk_row * (C * V) + i[:, None] * V + v_columns[None, :]
        v_keep = (v_columns < V)[None, :]
        tl.store(updates_ptr + u_at, u.to(updates_ptr.dtype.element_ty), mask=v_keep)


@triton.jit(do_not_specialize=["padding", "rows", "chunks"])
def _scan(
    q_ptr, k_ptr, w_ptr, scores_ptr, factors_ptr, ids_ptr, initial_ptr, values_ptr, updates_ptr,
    states_ptr, out_ptr, final_ptr, padding, rows, chunks, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, out_stride_b, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """``values`` is T (beta V). Where states are kept, so is U: in its place for a single span."""
    block, row = tl.program_id(0), tl.program_id(1)
    i, k_columns = tl.arange(0, C), tl.arange(0, K_PAD)
    v_columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state_at = k_columns[:, None] * V + v_columns[None, :]
    state_keep = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    w_at, w_keep = i[:, None] * K + k_columns[None, :], (k_columns < K)[None, :]
    u_at, u_keep = i[:, None] * V + v_columns[None, :], (v_columns < V)[None, :]
    low = updates_ptr.dtype.element_ty

    row_state = row.to(tl.int64) * (K * V)
    begin, first, stop = 0, 0, chunks
    if DOCUMENTS:
        first, stop = span_of(chunks)
        begin = last_start(ids_ptr, first, chunks, C)
    state = tl.zeros((K_PAD, BLOCK_V), tl.float32)
    if initial_ptr is not None:
        at_start = state_keep & (begin == 0)
        initial = tl.load(initial_ptr + row_state + state_at, mask=at_start, other=0.0)
        state += initial.to(tl.float32)
    for n in tl.range(begin, stop, num_stages=STAGES):
        mine = n >= first
        chunk_row = row + rows * tl.cast(n, tl.int64)
        at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
        q = load_rows(q_ptr, at, live, k_columns, K)
        at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
        k = load_rows(k_ptr, at, live, k_columns, K)
        w = tl.load(w_ptr + chunk_row * (C * K) + w_at, mask=w_keep, other=0.0)
        u = tl.load(values_ptr + chunk_row * (C * V) + u_at, mask=u_keep, other=0.0)
        scores = tl.load(scores_ptr + chunk_row * (C * C) + i[:, None] * C + i[None, :])
        key = factor(factors_ptr, KEY, chunk_row, C)
        query = factor(factors_ptr, QUERY, chunk_row, C)
        read = factor(factors_ptr, READ, chunk_row, C)
        write = factor(factors_ptr, WRITE, chunk_row, C)
        whole = whole_decay(factors_ptr, chunk_row, C)

        incoming = state.to(low)
        update = u.to(tl.float32) - tl.dot(w, incoming)
        written = (update * (key * write)[:, None]).to(low)
        state = tl.dot(tl.trans(k), written, state * whole)
        if states_ptr is not None:
            state_mine, u_mine = state_keep & mine, u_keep & mine
            tl.store(states_ptr + chunk_row * (K * V) + state_at, incoming, mask=state_mine)
            tl.store(updates_ptr + chunk_row * (C * V) + u_at, update.to(low), mask=u_mine)
        out = tl.dot(q, incoming) * read[:, None]
        out = tl.dot(scores, update.to(low), out) * query[:, None]
        at, live = token_rows(
            n, row, padding, out_stride_b, out_stride_t, out_stride_h, HEADS, 1, C
        )
        out_at = at[:, None] + v_columns[None, :]
        tl.store(out_ptr + out_at, out.to(low), mask=live[:, None] & u_keep & mine)
    tl.store(final_ptr + row_state + state_at, state, mask=state_keep & (stop == chunks))


def launch_forward(
    grid: ChunkGrid, x: RuleInputs, initial_state: Tensor | Callable[..., Tensor] | None,
    ids: Tensor | None, saved: Saved | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the final state; fills ``saved``. ``ids`` are the documents (N, C).

    The initial state may be a function of the factors, W and T (beta V).
    """
    N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    q, k, v = x.q, x.k, x.v
    factors, sizes = compute_factors(grid, x, ids)
    documents = sizes.pop("DOCUMENTS")
    scan = scan_blocks(sizes["K_PAD"], q.device)
    blocks = triton.cdiv(V, scan.columns)
    common = (grid.padding, R)
    states = inverses = None
    if saved is None:
        w, scores, updates = (q.new_empty(N, R, C, width) for width in (K, C, V))
    else:
        assert saved.erasers is not None and saved.scores is not None
        w, scores, updates = saved.erasers, saved.scores, saved.updates
        states, inverses = saved.states, saved.inverses
    spans = spans_for(blocks * R, N, q) if documents else 1
    # A span that warms up reads values in chunks whose updates another one writes.
    values = updates if spans == 1 else torch.empty_like(updates)
    launch(_prepare, (N, R))(
        q, k, v, factors, ids, inverses, w, values, scores, *common, *strides(q, k, v),
        **sizes, V=V, LEVELS=C.bit_length() - 1, BLOCK_V=NARROWEST, DOCUMENTS=documents,
        num_warps=scan.warps, num_stages=3,
    )  # fmt: skip

    if callable(initial_state):
        initial_state = initial_state(factors, w, values)
    final = factors.new_empty(grid.batch, grid.value_heads, K, V)
    initial = None if initial_state is None else initial_state.contiguous()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch(_scan, (blocks, R, spans))(
        q, k, w, scores, factors, ids, initial, values, updates, states, out, final, *common, N,
        *strides(q, k, out), **sizes, V=V, BLOCK_V=scan.columns, STAGES=scan.forward_stages,
        DOCUMENTS=documents, num_warps=scan.warps,
    )  # fmt: skip
    return out, final
