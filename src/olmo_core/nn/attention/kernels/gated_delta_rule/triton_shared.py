"""
What the Triton kernels of the gated delta rule share. One program handles one chunk of one row, or
carries one row's state over its chunks. The legend of shapes is in ``chunks``.

Queries and keys enter all products as they are in memory, exactly. Their scale and the inverses of
their lengths are factors of single tokens and multiply the float32 results, or the other operand
before it is rounded.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch
from olmo_core.nn.attention.kernels.triton_driver import multiprocessors

from .chunks import QK_NORM_EPS, ChunkGrid, RuleInputs

__all__ = [
    "BETA", "KEY", "NARROWEST", "QUERY", "READ", "WRITE", "compute_factors", "decay_matrix",
    "factor", "last_start", "load_rows", "next_start", "pad", "span_of", "spans_for", "split_dot",
    "strides", "token_rows", "whole_decay",
]  # fmt: skip

_MOST_SPANS = 8  # of a sequence: what each reads again costs more than more of them save
NARROWEST = 64  # columns of a tile: see :func:`pad`

# The planes of the factors (N, R, PLANES, C).
LOG = tl.constexpr(0)  # sum of g from the chunk's start, rounded,
REST = tl.constexpr(1)  # and what the rounding took: differences of long sums are exponentiated
READ = tl.constexpr(2)  # decay of the incoming state at each token; 0 in another document
WRITE = tl.constexpr(3)  # decay of each token's write in the outgoing state
QUERY = tl.constexpr(4)  # scale, over the query's length where queries are normalised
KEY = tl.constexpr(5)  # 1, or 1 over the key's length
BETA = tl.constexpr(6)
_PLANES = tl.constexpr(7)


@triton.jit
def token_rows(n, row, padding, stride_b, stride_t, stride_h, HEADS: tl.constexpr,
               GROUP: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Offsets of a chunk's tokens in a (B, T, HEADS / GROUP, ...) tensor for value row ``row``,
    and which of them are no padding."""
    token = n * C + tl.arange(0, C) - padding
    head = (row % HEADS) // GROUP
    start = (row // HEADS).to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return start + token.to(tl.int64) * stride_t, token >= 0


@triton.jit
def load_rows(ptr, at, live, columns, WIDTH: tl.constexpr):
    """A tile of rows that start at ``at``; zeros where a row is not ``live`` or ends."""
    keep = live[:, None] & (columns < WIDTH)[None, :]
    return tl.load(ptr + at[:, None] + columns[None, :], mask=keep, other=0.0)


@triton.jit
def factor(ptr, which: tl.constexpr, chunk_row, C: tl.constexpr):
    """One plane's factors of a chunk, (C,) float32."""
    return tl.load(ptr + chunk_row * (_PLANES * C) + which * C + tl.arange(0, C))


@triton.jit
def whole_decay(ptr, chunk_row, C: tl.constexpr):
    """The decay of the incoming state in the outgoing one: that of the last token's read."""
    return tl.load(ptr + chunk_row * (_PLANES * C) + READ * C + C - 1)


@triton.jit
def decay_matrix(ptr, ids_ptr, chunk_row, n, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Gamma (C, C): the decay from token j to token i >= j at [i, j], else 0."""
    i = tl.arange(0, C)
    log, rest = factor(ptr, LOG, chunk_row, C), factor(ptr, REST, chunk_row, C)
    exponent = (log[:, None] - log[None, :]) + (rest[:, None] - rest[None, :])
    seen = i[:, None] >= i[None, :]
    if DOCUMENTS:
        ids = tl.load(ids_ptr + n * C + i)
        seen = seen & (ids[:, None] == ids[None, :])
    return tl.where(seen, tl.exp(tl.minimum(exponent, 0.0)), 0.0)


@triton.jit
def span_of(chunks):
    """The first and past-the-last chunk of this program's span."""
    span, spans = tl.program_id(2), tl.num_programs(2)
    return chunks * span // spans, chunks * (span + 1) // spans


@triton.jit
def _starts(ids_ptr, first, chunks, C: tl.constexpr):
    """64 chunks from ``first`` on, and in which of them a document starts that reaches the end:
    nothing of the incoming state is left after those."""
    n = first + tl.arange(0, 64)
    inside = (n > 0) & (n < chunks)
    last = tl.load(ids_ptr + n * C + (C - 1), mask=inside, other=0)
    before = tl.load(ids_ptr + n * C - 1, mask=inside, other=0)
    return n, inside & (last != before)


@triton.jit
def last_start(ids_ptr, stop, chunks, C: tl.constexpr):
    """The last chunk before ``stop`` that forgets its incoming state, or 0."""
    found = 0
    for first in range(0, stop, 64):
        n, forgets = _starts(ids_ptr, first, chunks, C)
        found = tl.maximum(found, tl.max(tl.where(forgets & (n < stop), n, 0), axis=0))
    return found


@triton.jit
def next_start(ids_ptr, stop, chunks, C: tl.constexpr):
    """One past the first chunk from ``stop`` on that forgets its incoming state, or the end."""
    found = chunks
    for first in range(stop, chunks, 64):
        n, forgets = _starts(ids_ptr, first, chunks, C)
        found = tl.minimum(found, tl.min(tl.where(forgets, n + 1, chunks), axis=0))
    return found


@triton.jit
def split_dot(a, b):
    """a @ b for a float32 ``a`` that rounding to b's dtype would spoil: as two of its parts."""
    high = a.to(b.dtype)
    low = (a - high.to(tl.float32)).to(b.dtype)
    return tl.dot(high, b, tl.dot(low, b))


@triton.jit
def _inverse_length(ptr, at, live, eps, K: tl.constexpr, K_PAD: tl.constexpr):
    x = load_rows(ptr, at, live, tl.arange(0, K_PAD), K).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, axis=1) + eps)


# Strides over the batch of what has no wide loads: other lengths compile nothing anew.
@triton.jit(do_not_specialize=["padding", "rows", "g_stride_b", "beta_stride_b"])
def _factors(
    q_ptr, k_ptr, g_ptr, beta_ptr, ids_ptr, out_ptr, padding, rows, scale, eps,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    n, row = tl.program_id(0), tl.program_id(1)
    at, live = token_rows(n, row, padding, g_stride_b, g_stride_t, g_stride_h, HEADS, 1, C)
    g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float64)
    log = tl.cumsum(g, axis=0)
    to_end = tl.sum(g, axis=0) - log
    read, write = tl.exp(log.to(tl.float32)), tl.exp(tl.minimum(to_end.to(tl.float32), 0.0))
    i = tl.arange(0, C)
    if DOCUMENTS:
        ids = tl.load(ids_ptr + n * C + i)
        before = tl.load(ids_ptr + n * C - 1, mask=n > 0, other=0)
        last = tl.load(ids_ptr + n * C + C - 1)
        read = tl.where(ids == before, read, 0.0)
        write = tl.where(ids == last, write, 0.0)
    out = out_ptr + (n.to(tl.int64) * rows + row) * (_PLANES * C) + i
    rounded = log.to(tl.float32)
    tl.store(out + LOG * C, rounded)
    tl.store(out + REST * C, (log - rounded.to(tl.float64)).to(tl.float32))
    tl.store(out + READ * C, read)
    tl.store(out + WRITE * C, write)

    at, live = token_rows(n, row, padding, beta_stride_b, beta_stride_t, beta_stride_h, HEADS, 1, C)
    tl.store(out + BETA * C, tl.load(beta_ptr + at, mask=live, other=0.0).to(tl.float32))

    query = tl.zeros((C,), tl.float32) + scale
    key = tl.zeros((C,), tl.float32) + 1.0
    if NORMALIZE:
        at, live = token_rows(n, row, padding, q_stride_b, q_stride_t, q_stride_h, HEADS, GROUP, C)
        query *= _inverse_length(q_ptr, at, live, eps, K, K_PAD)
        at, live = token_rows(n, row, padding, k_stride_b, k_stride_t, k_stride_h, HEADS, GROUP, C)
        key = _inverse_length(k_ptr, at, live, eps, K, K_PAD)
    tl.store(out + QUERY * C, query)
    tl.store(out + KEY * C, key)


def pad(size: int) -> int:
    """The power of two that holds ``size``, and at least 64.

    Narrower tiles of half precision are less than the 128 bytes of a row in shared memory. Triton
    3.6 multiplies those wrongly on Hopper where the other operand is transposed, or writes outside
    shared memory.
    """
    return max(NARROWEST, triton.next_power_of_2(size))


def spans_for(programs: int, chunks: int, x: Tensor) -> int:
    """Into how many spans to cut a sequence of documents for which there are few programs.

    A span begins at the last chunk before it where a document starts, and ends, going back, at the
    next one after it, so that it needs nothing of its neighbours: states do not cross documents.
    """
    return max(1, min(_MOST_SPANS, chunks // 2, multiprocessors(x.device) // programs))


def strides(*tensors: Tensor) -> list[int]:
    """The strides of tensors (B, T, heads, ...) over batch, tokens and heads, one after another."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def compute_factors(
    grid: ChunkGrid, x: RuleInputs, ids: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """The factors (N, R, PLANES, C) float32, and the sizes that all kernels are compiled for."""
    N, R, C = grid.chunks, grid.rows, grid.chunk
    q, k, _, g, beta = x.tensors
    factors = torch.empty(N, R, _PLANES.value, C, dtype=torch.float32, device=q.device)
    sizes = {
        "HEADS": grid.value_heads, "GROUP": grid.group, "C": C, "K": grid.key_dim,
        "K_PAD": pad(grid.key_dim), "DOCUMENTS": ids is not None,
    }  # fmt: skip
    launch(_factors, (N, R))(
        q, k, g, beta, ids, factors, grid.padding, R, x.scale, QK_NORM_EPS,
        *strides(q, k, g, beta), **sizes, NORMALIZE=x.normalize_qk, num_warps=4,
    )  # fmt: skip
    return factors, sizes
