"""
The map of a span in Triton, by the recurrence of ``torch_span``: one launch after the forward
pass's chunks are prepared, :func:`_map`. The legend of shapes is in ``chunks``.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch
from olmo_core.nn.attention.kernels.triton_driver import multiprocessors

from .blocks import scan_blocks
from .chunks import ChunkGrid
from .triton_shared import (
    KEY,
    NARROWEST,
    WRITE,
    factor,
    load_rows,
    pad,
    strides,
    token_rows,
    whole_decay,
)


@triton.jit(do_not_specialize=["padding", "rows", "chunks", "first"])
def _map(
    k_ptr, w_ptr, values_ptr, factors_ptr, n_ptr, m_ptr, padding, rows, chunks, first,
    k_stride_b, k_stride_t, k_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK_K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_K rows of D, which no other rows need, and of a block of N's columns.

    D is the left operand of its products, so it goes from one to the next in registers.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    block, row = tl.program_id(0), tl.program_id(1)
    i, k_columns = tl.arange(0, C), tl.arange(0, K_PAD)
    d_rows = (block // blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    v_columns = (block % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    w_at, w_keep = i[:, None] * K + k_columns[None, :], (k_columns < K)[None, :]
    u_at, u_keep = i[:, None] * V + v_columns[None, :], (v_columns < V)[None, :]
    low = values_ptr.dtype.element_ty

    d = tl.where(d_rows[:, None] == k_columns[None, :], 1.0, 0.0)
    total = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for step in tl.range(0, chunks - first, num_stages=STAGES):
        n = chunks - 1 - step
        chunk_row = row + rows * tl.cast(n, tl.int64)
        at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
        k = load_rows(k_ptr, at, live, k_columns, K)
        w = tl.load(w_ptr + chunk_row * (C * K) + w_at, mask=w_keep, other=0.0)
        values = tl.load(values_ptr + chunk_row * (C * V) + u_at, mask=u_keep, other=0.0)
        key = factor(factors_ptr, KEY, chunk_row, C)
        write = factor(factors_ptr, WRITE, chunk_row, C)
        whole = whole_decay(factors_ptr, chunk_row, C)

        x = tl.dot(d.to(low), tl.trans(k)) * (key * write)[None, :]
        total = tl.dot(x.to(low), values, total)
        d = tl.dot((-x).to(low), w, d * whole)
    row_state = row.to(tl.int64) * K
    keep = (d_rows < K)[:, None]
    n_at = (row_state + d_rows[:, None]) * V + v_columns[None, :]
    tl.store(n_ptr + n_at, total, mask=keep & u_keep)
    if block % blocks == 0:
        m_at = (row_state + d_rows[:, None]) * K + k_columns[None, :]
        tl.store(m_ptr + m_at, d, mask=keep & w_keep)


def launch_map(
    grid: ChunkGrid, k: Tensor, factors: Tensor, w: Tensor, values: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """N (B, HV, K, V) and M (B, HV, K, K), float32, of the chunks from ``first`` on.

    :param factors: Of the whole span, as are W (N, R, C, K) and ``values``, which are T (beta V).
    """
    R, K, V = grid.rows, grid.key_dim, grid.value_dim
    n, m = (factors.new_empty(grid.batch, grid.value_heads, K, width) for width in (V, K))
    wide = pad(K) > 128
    # Programs repeat D for each block of values: that is free while there are few of them.
    few = triton.cdiv(K, NARROWEST) * triton.cdiv(V, NARROWEST) * R <= multiprocessors(k.device)
    width = NARROWEST if few or wide else min(pad(V), 2 * NARROWEST)
    launch(_map, (triton.cdiv(K, NARROWEST) * triton.cdiv(V, width), R))(
        k, w, values, factors, n, m, grid.padding, R, grid.chunks, first, *strides(k),
        HEADS=grid.value_heads, GROUP=grid.group, C=grid.chunk, K=K, K_PAD=pad(K),
        BLOCK_K=NARROWEST, V=V, BLOCK_V=width, STAGES=scan_blocks(pad(K), k.device).forward_stages,
        num_warps=8 if wide or width > NARROWEST else 4,
    )  # fmt: skip
    return n, m
