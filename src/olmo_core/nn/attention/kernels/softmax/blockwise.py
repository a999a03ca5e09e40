"""Attention as matrix products over blocks of queries: any device, any dtype, dropout included.

The torch backend uses it where no fused op fits (float64 on a GPU, dropout on a CPU, other
devices). Memory is one block of scores; time is the sum of the documents' squares, or T * W.

Reference: Dao, "FlashAttention-2" (2023), equations of sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.softmax.blocks import Block, blocks
from olmo_core.nn.attention.kernels.softmax.torch_ops import no_rng
from olmo_core.nn.attention.segments import Segments

_ROWS = 128


def forward(
    q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`Kernel.forward`."""
    rng = torch.randint(2**62, (2,)).to(q.device) if dropout_p else no_rng(q)
    acc = _accumulator(q.dtype)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=acc)
    for block, keep in _blocks(q, k, s, rng, dropout_p):
        scores = _scores(q, k, block, scale)
        rows_lse = torch.logsumexp(scores, dim=-1)
        weights = (scores - rows_lse[..., None]).exp_()
        if keep is not None:
            weights = weights * keep
        out[:, block.q0 : block.q1] = _unfold(weights @ _keys(v, block, acc), q).to(q.dtype)
        lse[..., block.q0 : block.q1] = rows_lse.unflatten(-1, (-1, block.q1 - block.q0)).flatten(
            1, 2
        )
    return out, lse, rng


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    s: Segments,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`Kernel.backward`."""
    acc = _accumulator(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (k, v))
    groups = k.shape[2]
    for block, keep in _blocks(q, k, s, rng, dropout_p):
        rows, keys = slice(block.q0, block.q1), slice(block.k0, block.k1)
        weights = (
            _scores(q, k, block, scale)
            - lse[..., rows].unflatten(1, (groups, -1)).flatten(2)[..., None]
        ).exp_()
        d_out, o = _fold(dout[:, rows], groups, acc), _fold(out[:, rows], groups, acc)
        d_weights = d_out @ _keys(v, block, acc).mT
        if keep is not None:
            d_weights = d_weights * keep
        d_scores = weights * (d_weights - (d_out * o).sum(-1, keepdim=True)) * scale
        if keep is not None:
            weights = weights * keep
        dq[:, rows] = _unfold(d_scores @ _keys(k, block, acc), q).to(q.dtype)
        dk[:, keys] += (d_scores.mT @ _fold(q[:, rows], groups, acc)).transpose(1, 2)
        dv[:, keys] += (weights.mT @ d_out).transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(
    q: Tensor, k: Tensor, s: Segments, rng: Tensor, dropout_p: float
) -> Iterator[tuple[Block, Tensor | None]]:
    """The problem's blocks, each with its dropout factors (0 or 1 / (1 - p))."""
    if not dropout_p:
        for block in blocks(s, q.shape[1], k.shape[1], rows=_ROWS, whole_squares=False):
            yield block, None
        return
    generator = torch.Generator(q.device).manual_seed(int(rng[0]))
    groups, rep = k.shape[2], q.shape[2] // k.shape[2]
    for block in blocks(s, q.shape[1], k.shape[1], rows=_ROWS, whole_squares=False):
        shape = (q.shape[0], groups, rep * (block.q1 - block.q0), block.k1 - block.k0)
        keep = torch.empty(shape, dtype=_accumulator(q.dtype), device=q.device)
        yield block, keep.bernoulli_(1 - dropout_p, generator=generator).div_(1 - dropout_p)


def _fold(x: Tensor, groups: int, acc: torch.dtype) -> Tensor:
    """``(b, n, h, d)`` to ``(b, g, (h / g) * n, d)``: the heads of a group become rows."""
    return x.to(acc).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of :func:`_fold`."""
    rep = q.shape[2] // x.shape[1]
    return x.unflatten(2, (rep, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _keys(x: Tensor, block: Block, acc: torch.dtype) -> Tensor:
    return x[:, block.k0 : block.k1].transpose(1, 2).to(acc)


def _scores(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """The block's masked scores, ``(b, g, (h / g) * n, m)``."""
    acc, groups = _accumulator(q.dtype), k.shape[2]
    scores = _fold(q[:, block.q0 : block.q1], groups, acc) @ _keys(k, block, acc).mT * scale
    if block.shape_key is not None:
        hidden = ~block.mask(q.device)
        scores.unflatten(2, (-1, block.q1 - block.q0)).masked_fill_(hidden, -math.inf)
    return scores
