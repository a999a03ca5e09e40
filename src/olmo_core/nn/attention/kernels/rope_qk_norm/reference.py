"""The readable form of :func:`.qk_norm_rope`, and the checks of their common signature.

Any device, any dtype, differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None,
    per_head: bool,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
    positions: Tensor | None = None,
    rotary_dim: int | None = None,
    stats: Tensor | None = None,
    widths: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`qk_norm_rope` in torch: float64 stays float64, all else is computed in float32."""
    rotary_dim = table_width(q, sin, rotary_dim)
    check_arguments(
        q, k, q_weight, k_weight, eps, per_head, sin, cos, positions, rotary_dim, stats, widths
    )
    outs = []
    for i, (x, weight) in enumerate(((q, q_weight), (k, k_weight))):
        y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if eps is not None:
            if stats is not None and widths is not None:
                mean = stats[..., i, None, None] / widths[i]
            else:
                mean = y.square().mean(-1 if per_head else (-2, -1), keepdim=True)
            y = y * torch.rsqrt(mean + eps)
        if weight is not None:
            y = y * (weight if per_head else weight.view(x.shape[2:])).to(y.dtype)
        if sin is not None and cos is not None:
            y = _rotate(y, sin, cos, positions, rotary_dim)
        outs.append(y.to(x.dtype).contiguous())
    return outs[0], outs[1]


def _rotate(
    x: Tensor, sin: Tensor, cos: Tensor, positions: Tensor | None, rotary_dim: int
) -> Tensor:
    half = rotary_dim // 2
    rows = slice(x.shape[1]) if positions is None else positions.long()
    s, c = (table[rows][..., None, :half].to(x.dtype) for table in (sin, cos))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)


def table_width(q: Tensor, sin: Tensor | None, rotary_dim: int | None) -> int:
    if sin is None:
        return q.shape[3]
    return sin.shape[-1] if rotary_dim is None else rotary_dim


def norm_widths(
    q: Tensor, k: Tensor, per_head: bool, widths: tuple[int, int] | None
) -> tuple[int, int]:
    if widths is not None:
        return widths
    dim = q.shape[3]
    return (dim, dim) if per_head else (q.shape[2] * dim, k.shape[2] * dim)


def check_arguments(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float | None,
    per_head: bool, sin: Tensor | None, cos: Tensor | None, positions: Tensor | None,
    rotary_dim: int, stats: Tensor | None, widths: tuple[int, int] | None,
) -> None:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "Expected q (B, T, H, D) and k (B, T, Hkv, D) that agree in B, T and D, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    for name, x, weight in (("q_weight", q, q_weight), ("k_weight", k, k_weight)):
        size = x.shape[3] if per_head else x.shape[2] * x.shape[3]
        if weight is not None and weight.shape != (size,):
            raise ValueError(
                f"{name} must have shape ({size},) with per_head={per_head}, got "
                f"{tuple(weight.shape)}."
            )
    if (sin is None) != (cos is None) or (sin is None and positions is not None):
        raise ValueError("sin and cos come together, and positions need both.")
    if sin is not None and cos is not None:
        batch, tokens = q.shape[:2]
        if rotary_dim % 2 or not 0 < rotary_dim <= q.shape[3]:
            raise ValueError(f"rotary_dim must be even and at most {q.shape[3]}, got {rotary_dim}.")
        wide = sin.dim() == 2 and sin.shape[1] in (rotary_dim, rotary_dim // 2)
        if not wide or sin.shape != cos.shape:
            raise ValueError(
                f"sin and cos must be tables (L, {rotary_dim}) or (L, {rotary_dim // 2}), got "
                f"{tuple(sin.shape)} and {tuple(cos.shape)}."
            )
        if positions is None and sin.shape[0] < tokens:
            raise ValueError(
                f"The table has {sin.shape[0]} rows for {tokens} tokens: make it longer."
            )
        if positions is not None and positions.shape not in ((tokens,), (batch, tokens)):
            raise ValueError(
                f"positions must be ({tokens},) or ({batch}, {tokens}), got "
                f"{tuple(positions.shape)}."
            )
    if stats is not None and (eps is None or per_head or widths is None):
        raise ValueError(
            "stats replace the sums over a token's whole width: they need eps, widths and "
            "per_head=False. A norm per head needs no other rank."
        )
