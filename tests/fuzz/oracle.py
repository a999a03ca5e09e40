"""Each mixer by its definition, for one sequence of tokens. Imports nothing of the library.

There are no documents, no padding, no batch and no cache here: each is a way to hand a layer
sequences that it must treat as if they came alone, so whoever calls this cuts them out and calls it
once for each.

In float64 the functions are the truth. In a lower dtype they are the plain computation, whose own
error says what a layer in that dtype may be off by: what the interface calls full precision is then
float32, and the rest is in the dtype of ``x``.

A mixer is described by the arguments of its constructor, as plain data (:mod:`fuzz.options`), and
by its parameters under the names of its state dict. What is not given has the interface's default.

Legend of shapes: n tokens, h query heads, g key heads, d head_dim, r rotated dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mix", "rotations"]

Spec = Mapping[str, Any]
Params = Mapping[str, Tensor]


def mix(spec: Spec, p: Params, x: Tensor, position: Tensor) -> Tensor:
    """The mixer's output (n, d_model).

    :param x: (n, d_model), all tokens of one sequence.
    :param position: (n,), where RoPE takes each token to be.
    """
    mixer = gated_delta_net if spec["mixer"] == "GatedDeltaNet" else attention
    return mixer(spec, p, x, position)


def attention(spec: Spec, p: Params, x: Tensor, position: Tensor) -> Tensor:
    """``Attention``, ``NormalizedAttention`` and ``FusedAttention``."""
    normalized = spec["mixer"] == "NormalizedAttention"
    h = spec["n_heads"]
    g = spec.get("n_kv_heads", h)
    d = spec.get("head_dim", x.shape[-1] // h)
    window = spec.get("window_size", math.inf)
    scale = spec.get("softmax_scale", math.sqrt(d) if normalized else 1 / math.sqrt(d))

    if spec["mixer"] == "FusedAttention":
        q, k, v = linear(p, "w_qkv", x).split(h * d, dim=-1)
    else:
        q, k, v = (linear(p, name, x) for name in ("w_q", "w_k", "w_v"))
    if "clip_qkv" in spec:
        q, k, v = (y.clamp(-spec["clip_qkv"], spec["clip_qkv"]) for y in (q, k, v))
    per_head = spec.get("use_head_qk_norm", False)
    if "qk_norm" in spec and not per_head:
        q, k = norm(spec["qk_norm"], p, "q_norm", q), norm(spec["qk_norm"], p, "k_norm", k)
    q, k, v = q.view(-1, h, d), k.view(-1, g, d), v.view(-1, g, d)
    if "qk_norm" in spec and per_head:
        q, k = norm(spec["qk_norm"], p, "q_norm", q), norm(spec["qk_norm"], p, "k_norm", k)
    if normalized:  # sq and sk stand for 1 where they start, at d_model^-1/2
        q = q * (p["sq"] * math.sqrt(x.shape[-1])).to(x.dtype).view(h, d)
        k = k * (p["sk"] * math.sqrt(x.shape[-1])).to(x.dtype).view(g, d)
    rope = spec.get("rope")
    if rope is not None and not (rope.get("no_global_rope", False) and window == math.inf):
        q, k = rotate(rope, q, position), rotate(rope, k, position)

    heads = [softmax_attention(q[:, i], k[:, i * g // h], v[:, i * g // h], scale, window)
             for i in range(h)]  # fmt: skip
    out = torch.stack(heads, dim=1)
    if "gate" in spec:
        values = linear(p, "w_g", x).view(len(x), h, -1)  # one for a head, or for each element
        if spec["gate"].get("full_precision", True):
            values = wide(values)
        out = (out * values.sigmoid()).to(x.dtype)
    return linear(p, "w_out", out.reshape(len(x), -1))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: float) -> Tensor:
    """One head, (n, d) each. A query sees the last ``window`` keys, its own included."""
    age = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = (age >= 0) & (age < window)
    scores = torch.where(seen, q @ k.T * scale, -math.inf)
    return scores.softmax(-1) @ v


def norm(spec: Spec, p: Params, name: str, x: Tensor) -> Tensor:
    """Over the last dimension, by the name of the norm."""
    kind, eps = spec["name"], spec.get("eps", 1e-5)
    y = wide(x) if spec.get("full_precision", True) else x
    if kind == "l2_norm":
        return (y / y.square().sum(-1, keepdim=True).sqrt()).to(x.dtype)
    if kind == "default":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    if kind == "qwen_rms":
        y = y.to(x.dtype)
    if f"{name}.weight" in p:
        y = y * p[f"{name}.weight"].to(y.dtype)
    if f"{name}.bias" in p:
        y = y + p[f"{name}.bias"].to(y.dtype)
    return y.to(x.dtype)


def rotate(spec: Spec, x: Tensor, position: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864) on the first dimensions of each head of x (n, heads, d)."""
    r = int(x.shape[-1] * spec.get("partial_rotary_factor", 1.0))
    y = x[..., :r]
    y = wide(y) if spec.get("full_precision", True) else y
    cos, sin = (t.to(y.dtype)[:, None] for t in rotations(spec, r, position))
    pairs = spec.get("name", "default") == "complex"
    a, b = (y[..., ::2], y[..., 1::2]) if pairs else y.chunk(2, dim=-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1 if pairs else -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), x[..., r:]), dim=-1)


def rotations(spec: Spec, r: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle, float64 (n, r / 2), with the scaling's factor."""
    frequency, factor = frequencies(spec, r)
    angle = position.double()[:, None] * frequency
    return factor * angle.cos(), factor * angle.sin()


def frequencies(spec: Spec, r: int) -> tuple[Tensor, float]:
    """Radians per position of each pair (r / 2,), and the factor of rotated vectors."""
    theta = spec.get("theta", 500_000)
    pair = torch.arange(r // 2, dtype=torch.float64)
    base = theta ** (-2 * pair / r)
    scaling = dict(spec.get("scaling") or {"type": "none"})
    kind, factor = scaling["type"], scaling.get("attention_rescale_factor", 1.0)
    if kind == "none":
        return base, 1.0
    if kind == "abf":  # arXiv:2309.16039
        return scaling.get("new_theta", 8e6) ** (-2 * pair / r), factor
    if kind == "pi":  # arXiv:2306.15595
        return base / scaling.get("factor", 2.0), factor
    context = scaling.get("old_context_len", 8192)
    if kind == "stepwise":  # Llama 3.1: by wavelength, blended in between
        wavelength = 2 * math.pi / base / context
        longest = 1 - scaling.get("low_freq_proportion", 0.0)
        shortest = scaling.get("high_freq_proportion", 0.25)
        keep = (1 / wavelength - 1 / longest) / (1 / shortest - 1 / longest)
        keep = torch.where(wavelength > longest, 0.0, keep)
        keep = torch.where(wavelength < shortest, 1.0, keep)
        return keep * base + (1 - keep) * base / scaling.get("factor", 32.0), factor
    assert kind == "yarn"  # arXiv:2309.00071, with the ramp of the authors' code
    by = scaling.get("factor", 8.0)

    def pair_with(turns: float) -> float:
        """The pair, as a real number, that makes so many turns within the old context."""
        return r * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))

    first = max(math.floor(pair_with(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(pair_with(scaling.get("beta_slow", 1))), r - 1)
    stretched = ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    return stretched * base / by + (1 - stretched) * base, 0.1 * math.log(by) + 1


def gated_delta_net(spec: Spec, p: Params, x: Tensor, position: Tensor) -> Tensor:
    """arXiv:2412.06464, one token after the other; it has no positions."""
    h = spec["n_heads"]
    hv = spec.get("n_v_heads", h)
    d = spec.get("head_dim", x.shape[-1] // h)
    conv = {s: convolve(p, f"{s}_conv1d", linear(p, f"w_{s}", x)) for s in "qkv"}
    q, k, v = (wide(conv[s]).unflatten(-1, (heads, -1)) for s, heads in zip("qkv", (h, h, hv)))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    q, k = (y.repeat_interleave(hv // h, dim=1) for y in (q / math.sqrt(d), k))
    beta = wide(linear(p, "w_b", x)).sigmoid() * (2 if spec.get("allow_neg_eigval", True) else 1)
    step = F.softplus(wide(linear(p, "w_a", x)) + p["dt_bias"].to(beta.dtype))
    decay = (-p["A_log"].to(beta.dtype).exp() * step).exp()

    state = torch.zeros(hv, d, v.shape[-1], dtype=v.dtype)
    outputs = []
    for t in range(len(x)):
        state = state * decay[t, :, None, None]
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * error)
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    o = wide(torch.stack(outputs).to(x.dtype))
    o = o / (o.square().mean(-1, keepdim=True) + spec.get("norm_eps", 1e-5)).sqrt()
    gate = wide(linear(p, "w_g", x)).view(o.shape)
    y = o * p["o_norm.weight"].to(o.dtype) * F.silu(gate)
    return linear(p, "w_out", y.to(x.dtype).flatten(1))


def convolve(p: Params, name: str, x: Tensor) -> Tensor:
    """SiLU of a causal depthwise convolution of x (n, channels); the last tap is its own token."""
    taps = wide(p[f"{name}.weight"].to(x.dtype))[:, 0].unbind(-1)
    y = sum(wide(F.pad(x, (0, 0, lag, 0))[: len(x)]) * tap for lag, tap in enumerate(taps[::-1]))
    if f"{name}.bias" in p:
        y = y + p[f"{name}.bias"].to(y.dtype)
    return F.silu(y).to(x.dtype)


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    bias = p.get(f"{name}.bias")
    return F.linear(x, p[f"{name}.weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
