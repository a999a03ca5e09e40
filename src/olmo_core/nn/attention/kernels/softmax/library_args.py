"""What kernels have in common: flattened shapes, windows, empty problems and rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_core.nn.attention.segments import Segments


def flat(s: Segments, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The libraries take problems with lengths as ``(tokens, heads, head_dim)``."""
    return tensors if s.cu_q is None else tuple(x.flatten(0, 1) for x in tensors)


def flat_lse(s: Segments, lse: Tensor) -> Tensor:
    """A log-sum-exp as the libraries take it where there are lengths: ``(heads, tokens)``."""
    return lse if s.cu_q is None else lse[0]


def batched(s: Segments, q: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """A library's answer in the shapes of :class:`Kernel`."""
    return (out, lse) if s.cu_q is None else (out.view(q.shape), lse[None])


def window_offsets(s: Segments, unlimited: int | None) -> tuple[int | None, int | None]:
    """A window as inclusive offsets left and right of a query's own position."""
    window = s.effective_window
    return (unlimited, unlimited) if window < 0 else (window - 1, 0)


def is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is no query or no key: the libraries launch empty grids, or refuse."""
    return not q.numel() or not k.numel()


def may_have_empty_rows(s: Segments) -> bool:
    """Whether a query may see no key. In self-attention each sees itself."""
    return s.cu_q is not s.cu_k or s.max_q != s.max_k


def sees_nothing(s: Segments, n_q: int) -> Tensor:
    """Which queries of a flattened problem see no key: ``(n_q,)`` bool, computed on the device."""
    assert s.cu_q is not None and s.cu_k is not None
    index = torch.arange(n_q, dtype=s.cu_q.dtype, device=s.cu_q.device)
    segment = torch.searchsorted(s.cu_q, index, right=True) - 1
    queries, keys = ((cu[1:] - cu[:-1])[segment] for cu in (s.cu_q, s.cu_k))
    if not s.causal:
        return keys == 0
    return index - s.cu_q[segment] < queries - keys


def without_queries(s: Segments, n_k: int) -> Tensor:
    """Which keys of a flattened problem are in a segment without queries: ``(n_k,)`` bool."""
    assert s.cu_q is not None and s.cu_k is not None
    index = torch.arange(n_k, dtype=s.cu_k.dtype, device=s.cu_k.device)
    segment = torch.searchsorted(s.cu_k, index, right=True) - 1
    return (s.cu_q[1:] - s.cu_q[:-1])[segment] == 0


def empty_forward(q: Tensor, s: Segments) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries that see no key."""
    b, t, h, _ = q.shape if s.cu_q is None else (1, q.shape[0] * q.shape[1], *q.shape[2:])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((b, h, t), -math.inf, dtype=dtype, device=q.device)
    return torch.zeros_like(q, memory_format=torch.contiguous_format), lse


def empty_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`empty_forward`."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv
