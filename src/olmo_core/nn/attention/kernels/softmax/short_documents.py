"""Many short documents on the CPU: those of one length become one batched call.

A flash call costs about as much as a document of 30 tokens, so for documents shorter than that on
average the calls, not the arithmetic, are what takes time.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.softmax.torch_ops import cpu_flash_backward, cpu_flash_forward
from olmo_core.nn.attention.segments import Segments

_SHORT = 24


class Order(NamedTuple):
    """Tokens sorted by the length of their document, and the groups of equal documents."""

    tokens: Tensor  # (t,) int64: the original index of each sorted token
    groups: list[tuple[int, int, int]]  # (first sorted token, documents, tokens of each)


def order(s: Segments, n_tokens: int) -> Order | None:
    """How to batch a problem, or None where that would not pay."""
    if s.cu_q is None or s.cu_q is not s.cu_k or not s.causal:
        return None
    cu, _ = s.host_lengths(n_tokens, n_tokens)
    documents = sorted((b - a, a) for a, b in pairwise(cu) if b > a)
    longest = documents[-1][0] if documents else 0
    if n_tokens >= _SHORT * len(documents) or 0 < s.window < longest:
        return None
    lengths = torch.tensor([n for n, _ in documents])
    starts = torch.tensor([a for _, a in documents])
    sorted_starts = lengths.cumsum(0) - lengths
    tokens = torch.arange(n_tokens) + torch.repeat_interleave(starts - sorted_starts, lengths)
    groups, at = [], 0
    for length, same in groupby(n for n, _ in documents):
        count = len(list(same))
        groups.append((at, count, length))
        at += count * length
    return Order(tokens, groups)


def forward(
    q: Tensor, k: Tensor, v: Tensor, by_length: Order, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of causal documents."""
    tokens, groups = by_length
    q, k, v = (x[0, tokens] for x in (q, k, v))
    out = q.new_empty((1, *q.shape))
    lse: Tensor | None = None
    for at, count, length in groups:
        part = slice(at, at + count * length)
        group_q, group_k, group_v = (x[part].unflatten(0, (count, length)) for x in (q, k, v))
        o, group_lse = cpu_flash_forward(
            group_q, group_k, group_v, is_causal=True, mask=None, scale=scale
        )
        if lse is None:
            lse = group_lse.new_empty((1, q.shape[1], q.shape[0]))
        out[0, tokens[part]] = o.flatten(0, 1)
        lse[0, :, tokens[part]] = group_lse.transpose(0, 1).flatten(1)
    assert lse is not None
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    by_length: Order,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`."""
    tokens, groups = by_length
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dout, q, k, v, out = (x[0, tokens] for x in (dout, q, k, v, out))
    lse = lse[0, :, tokens]
    for at, count, length in groups:
        part = slice(at, at + count * length)
        d, *rest = (x[part].unflatten(0, (count, length)) for x in (dout, q, k, v, out))
        parts = cpu_flash_backward(
            d, rest[0], rest[1], rest[2], rest[3],
            lse[:, part].unflatten(1, (count, length)).transpose(0, 1),
            is_causal=True, mask=None, scale=scale,
        )  # fmt: skip
        for grad, group_grad in zip(grads, parts):
            grad[0, tokens[part]] = group_grad.flatten(0, 1)
    return grads[0], grads[1], grads[2]
