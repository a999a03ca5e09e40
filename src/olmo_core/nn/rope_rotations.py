"""The two layouts of RoPE's rotation: pairs of halves, and pairs of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate_halves", "rotate_pairs", "rotate_token"]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None = None) -> Tensor:
    """Rotate (x_i, x_{i + R/2}) by the i-th angle, in the dtype of ``cos``.

    :param x: (..., D).
    :param cos: (..., R / 2), or (..., R) with an angle for each half; broadcasts against ``x``.
    :param sin: As ``cos``.
    :param rotary_dim: R; D if not given. What lies behind is copied.
    """
    dim, rest = x.shape[-1] if rotary_dim is None else rotary_dim, ()
    y = x.to(cos.dtype)
    if dim == x.shape[-1]:
        first, second = y.chunk(2, dim=-1)
    else:
        first, second, *rest = y.split((dim // 2, dim // 2, x.shape[-1] - dim), dim=-1)
    if cos.shape[-1] == dim:
        (cos, cos2), (sin, sin2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    else:
        cos2, sin2 = cos, sin
    turned = (first * cos - second * sin, second * cos2 + first * sin2, *rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotate_token(
    q: Tensor, k: Tensor, cos: Tensor, signed_sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """:func:`rotate_halves` of queries and keys of one position, to the bit, in a third of the ops.

    :param q: (..., D), heads in dimension ``heads``.
    :param k: As ``q``.
    :param cos: (R / 2,).
    :param signed_sin: (2, R / 2): what multiplies the other half, for each half.
    """
    both = torch.cat((q, k), heads)
    dim, rest = signed_sin.numel(), None
    if dim < both.shape[-1]:
        both, rest = both.split((dim, both.shape[-1] - dim), -1)
    halves = both.to(cos.dtype).reshape(*both.shape[:-1], 2, dim // 2)
    turned = halves.flip(-2).mul_(signed_sin).add_(halves * cos).view(both.shape).to(q.dtype)
    if rest is not None:
        turned = torch.cat((turned, rest), -1)
    q_out, k_out = turned.split((q.shape[heads], k.shape[heads]), heads)
    return q_out, k_out


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None = None) -> Tensor:
    """Rotate (x_{2i}, x_{2i + 1}) by the i-th angle, in the dtype of ``cos``.

    :param x: (..., D).
    :param cos: (..., R / 2); broadcasts against ``x``'s pairs.
    :param sin: As ``cos``.
    :param rotary_dim: R; D if not given. What lies behind is copied.
    """
    y, dim = x.to(cos.dtype), x.shape[-1] if rotary_dim is None else rotary_dim
    real, imag = y[..., :dim].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2)
    if dim < x.shape[-1]:
        turned = torch.cat((turned, y[..., dim:]), dim=-1)
    return turned.to(x.dtype)
