"""Functions that layers share."""

from __future__ import annotations

import torch

__all__ = ["compute_dtype", "l2_normalize", "relative_error"]


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


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``want``; NaN if ``got`` has any."""
    want = want.detach().double()
    return ((got.detach().double() - want).norm() / want.norm().clamp_min(1e-300)).item()
