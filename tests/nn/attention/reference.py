"""Attention by its definition: dense masks, float64, loops. Shares no code with the library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def document_mask(cu: Sequence[int], window: int | None) -> Tensor:
    """``(t, t)`` bool: token i sees token j of its document, at or before it, within the window."""
    total = cu[-1]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for start, stop in pairwise(cu):
        for i in range(start, stop):
            first = start if window is None else max(start, i - window + 1)
            mask[i, first : i + 1] = True
    return mask


def row_lengths(batch: int, seq_len: int) -> list[int]:
    """Without documents each row is one."""
    return [row * seq_len for row in range(batch + 1)]


def positions(cu: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Queries ``(t, h, d)``, keys and values ``(t, g, d)``, mask ``(t, t)``; empty rows give 0."""
    rep = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // rep].T * scale
        weights = torch.where(mask, scores, -math.inf).softmax(-1)
        weights = torch.where(mask, weights, 0.0)
        heads.append(weights @ v[:, h // rep])
    return torch.stack(heads, dim=1)


def rotate(x: Tensor, pos: Tensor, theta: float, rotary_dim: int, pairs: bool) -> Tensor:
    """RoPE on the first ``rotary_dim`` dimensions of ``(t, h, d)``, as 2 x 2 rotations."""
    half = rotary_dim // 2
    frequency = theta ** (-2.0 * torch.arange(half, dtype=torch.float64) / rotary_dim)
    angle = (pos[:, None] * frequency)[:, None]  # (t, 1, half)
    out = x.clone()
    first = slice(0, rotary_dim, 2) if pairs else slice(0, half)
    second = slice(1, rotary_dim, 2) if pairs else slice(half, rotary_dim)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * angle.cos() - b * angle.sin()
    out[..., second] = b * angle.cos() + a * angle.sin()
    return out


def rms(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def attention_layer(
    p: Mapping[str, Tensor],
    x: Tensor,
    *,
    head_dim: int,
    cu: Sequence[int],
    window: int | None = None,
    theta: float | None = None,
    rotary_dim: int | None = None,
    pairs: bool = False,
    per_head_norm: bool = False,
    clip: float | None = None,
    eps: float = 1e-5,
    normalized: bool = False,
    pos: Tensor | None = None,
) -> Tensor:
    """A layer from its parameters ``p``, named as in its state dict. ``x`` is ``(B, T, d)``."""
    flat = x.flatten(0, 1)

    def linear(name: str, inp: Tensor) -> Tensor:
        out = inp @ p[f"{name}.weight"].T
        return out + p[f"{name}.bias"] if f"{name}.bias" in p else out

    def norm(name: str, inp: Tensor) -> Tensor:
        return rms(inp, p[f"{name}.weight"], p[f"{name}.bias"], eps)

    if "w_qkv.weight" in p:
        q, k, v = linear("w_qkv", flat).chunk(3, dim=-1)
    else:
        q, k, v = (linear(name, flat) for name in ("w_q", "w_k", "w_v"))
    if clip is not None:
        q, k, v = (y.clamp(-clip, clip) for y in (q, k, v))
    if "q_norm.weight" in p and not per_head_norm:
        q, k = norm("q_norm", q), norm("k_norm", k)
    q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in (q, k, v))
    if "q_norm.weight" in p and per_head_norm:
        q, k = norm("q_norm", q), norm("k_norm", k)
    scale = head_dim**-0.5
    if normalized:
        up = x.shape[-1] ** 0.5
        q = q * (p["sq"] * up).view(-1, head_dim)
        k = k * (p["sk"] * up).view(-1, head_dim)
        scale = head_dim**0.5
    if theta is not None:
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        pos = positions(cu) if pos is None else pos
        q, k = (rotate(y, pos, theta, rotary_dim, pairs) for y in (q, k))
    att = softmax_attention(q, k, v, document_mask(cu, window), scale).flatten(1)
    if "w_g.weight" in p:
        gate = linear("w_g", flat).sigmoid()
        att = att * (gate if gate.shape == att.shape else gate.repeat_interleave(head_dim, dim=-1))
    return linear("w_out", att).view(x.shape)


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of ``want``."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()
