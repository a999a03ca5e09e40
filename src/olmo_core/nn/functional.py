"""Functions that layers share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

__all__ = ["compute_dtype", "l2_normalize", "largest", "largest_row_error", "row_error"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which "full precision" computes: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def l2_normalize(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Scale ``x`` to unit Euclidean length along ``dim``; a zero vector stays zero.

    Computed in float32 (float64 for float64 inputs). No input without NaN gives NaN, and the
    gradient of a zero vector is finite: that of the identity. Works on a ``DTensor``, whose norm
    is that of the whole tensor.

    :param x: A floating-point tensor of any shape.
    :param dim: The dimension of the vectors.
    :returns: A tensor like ``x``, in its dtype.
    """
    y = x.to(compute_dtype(x.dtype))
    norm = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
    return (y / torch.where(norm > 0, norm, 1)).to(x.dtype)


def row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error of a row, over the root mean square of the rows' norms.

    A row is the last dimension: one token's, or one output unit's. So a single wrong token shows
    at its full size, however long the sequence is.
    """
    if got.shape != want.shape:
        return math.nan
    want = want.detach().cpu().double()
    difference = got.detach().cpu().double() - want
    if want.dim() == 0:
        want, difference = want[None], difference[None]
    if not want.numel():
        return 0.0
    scale = want.norm(dim=-1).square().mean().sqrt()
    return float(difference.norm(dim=-1).max() / scale.clamp_min(1e-300))


def largest_row_error(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> float:
    """The :func:`largest` :func:`row_error` of some results, an output and its gradients for
    example."""
    return largest(row_error(a, b) for a, b in zip(got, want, strict=True))


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is, which Python's max keeps or drops by where it stands."""
    every = list(errors)
    return math.nan if any(map(math.isnan, every)) else max(every)
