"""The layers by their definitions: dense, quadratic, one token after the other, and slow.

Nothing of the code under test is used: a layer here is a function of its config and its parameters
by name, and of the definitions that stand beside the kernels. In float64 the functions are the
truth that results are compared with; in a lower dtype they are the plain computation whose own
error bounds what is allowed (:mod:`.measures`).

N is all tokens of the flattened batch. ``document`` (N,) numbers each token's document; tokens of
one document are neighbours, and a negative number marks padding, whose output is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.attention.config import AttentionConfig, AttentionType, GateGranularity
from olmo_core.nn.attention.kernels.softmax.reference import dense_attention
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEType,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)

__all__ = ["attention_layer", "causal_mask", "positions"]

Params = Mapping[str, Tensor]


def positions(document: Tensor) -> Tensor:
    """The place of each token in its document: (N,), int64."""
    index = torch.arange(len(document), device=document.device)
    first = torch.ones_like(document, dtype=torch.bool)
    first[1:] = document[1:] != document[:-1]
    return index - torch.where(first, index, 0).cummax(0).values


def causal_mask(document: Tensor, window: int | None) -> Tensor:
    """(N, N) bool: token i sees token j of its own document, not after it, within the window."""
    index = torch.arange(len(document), device=document.device)
    back = index[:, None] - index[None]
    seen = (document[:, None] == document[None]) & (back >= 0)
    return seen if window is None else seen & (back < window)


def attention_layer(
    config: AttentionConfig, window: int | None, params: Params, x: Tensor, document: Tensor
) -> Tensor:
    """Any of the three softmax variants.

    :param x: (N, d_model).
    :returns: (N, d_model).
    """
    d_model, n_heads = x.shape[-1], config.n_heads
    n_kv_heads = config.n_kv_heads or n_heads
    head_dim = config.head_dim or d_model // n_heads
    normalized = config.name == AttentionType.normalized
    if config.name == AttentionType.fused:
        q, k, v = _linear(params, "w_qkv", x).chunk(3, dim=-1)
    else:
        q, k, v = (_linear(params, name, x) for name in ("w_q", "w_k", "w_v"))
    if config.clip_qkv is not None:
        q, k, v = (y.clamp(-config.clip_qkv, config.clip_qkv) for y in (q, k, v))

    if config.qk_norm is not None and not config.use_head_qk_norm:
        q = _norm(config.qk_norm, params, "q_norm", q)
        k = _norm(config.qk_norm, params, "k_norm", k)
    q, k, v = q.unflatten(-1, (n_heads, -1)), *(y.unflatten(-1, (n_kv_heads, -1)) for y in (k, v))
    if config.qk_norm is not None and config.use_head_qk_norm:
        q = _norm(config.qk_norm, params, "q_norm", q)
        k = _norm(config.qk_norm, params, "k_norm", k)
    if normalized:
        # The learned factor starts at d_model^-1/2 and stands for 1.
        q = q * (params["sq"] * math.sqrt(d_model)).to(q.dtype).view(n_heads, head_dim)
        k = k * (params["sk"] * math.sqrt(d_model)).to(k.dtype).view(n_kv_heads, head_dim)
    rope = config.rope
    if rope is not None and not (rope.no_global_rope and window is None):
        q, k = (rotate(rope, y, positions(document)) for y in (q, k))

    scale = math.sqrt(head_dim) if normalized else 1 / math.sqrt(head_dim)
    att = dense_attention(q[None], k[None], v[None], causal_mask(document, window), scale)[0][0]
    if config.gate is not None:
        gate = _linear(params, "w_g", x)
        headwise = config.gate.granularity == GateGranularity.headwise
        gate = gate[..., None] if headwise else gate.unflatten(-1, (n_heads, -1))
        if config.gate.full_precision:
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        att = (att * gate.sigmoid()).to(x.dtype)
    out = _linear(params, "w_out", att.flatten(1))
    return out.masked_fill((document < 0)[:, None], 0.0)


def rotate(config: RoPEConfig, x: Tensor, position: Tensor) -> Tensor:
    """RoPE: the i-th pair of a head's first dimensions turned by position times frequency i.

    :param x: (N, heads, head_dim).
    :param position: (N,).
    """
    size = int(x.shape[-1] * config.partial_rotary_factor)
    frequencies, factor = _frequencies(config, size)
    angle = position.double()[:, None] * frequencies.to(x.device)  # (N, size / 2)
    dtype = torch.promote_types(x.dtype, torch.float32) if config.full_precision else x.dtype
    cos, sin = ((factor * y).to(dtype)[:, None] for y in (angle.cos(), angle.sin()))
    y, rest = x[..., :size].to(dtype), x[..., size:]
    index = torch.arange(size // 2, device=x.device)
    if config.name == RoPEType.complex:
        first, second = 2 * index, 2 * index + 1
    else:
        first, second = index, index + size // 2
    a, b = y[..., first], y[..., second]
    turned = torch.empty_like(y)
    turned[..., first], turned[..., second] = a * cos - b * sin, a * sin + b * cos
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _frequencies(config: RoPEConfig, size: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, and the factor of rotated vectors."""
    scaling, theta = config.scaling, config.theta
    pair = torch.arange(size // 2, dtype=torch.float64)
    if isinstance(scaling, ABFRoPEScalingConfig):
        return scaling.new_theta ** (-2 * pair / size), 1.0
    base = theta ** (-2 * pair / size)
    if scaling is None:
        return base, 1.0
    if isinstance(scaling, PIRoPEScalingConfig):
        return base / scaling.factor, 1.0
    turns = scaling.old_context_len * base / (2 * math.pi)  # type: ignore[attr-defined]
    if isinstance(scaling, StepwiseRoPEScalingConfig):
        low = 1 / (1 - scaling.low_freq_proportion)
        high = 1 / scaling.high_freq_proportion
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * base + (1 - keep) * base / scaling.factor, 1.0
    assert isinstance(scaling, YaRNRoPEScalingConfig)

    def pair_that_turns(times: float) -> float:
        context = scaling.old_context_len
        return size / 2 * math.log(context / (2 * math.pi * times)) / math.log(theta)

    start = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    stop = min(math.ceil(pair_that_turns(scaling.beta_slow)), size - 1)
    slow = ((pair - start) / max(stop - start, 1e-3)).clamp(0, 1)
    return base * (1 - slow) + base / scaling.factor * slow, 0.1 * math.log(scaling.factor) + 1


def _linear(params: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def _norm(config: LayerNormConfig, params: Params, name: str, x: Tensor) -> Tensor:
    weight, bias = params.get(f"{name}.weight"), params.get(f"{name}.bias")
    eps = 1e-5 if config.eps is None else config.eps
    full_precision = config.full_precision is not False
    y = x.to(torch.promote_types(x.dtype, torch.float32)) if full_precision else x
    if config.name == LayerNormType.default:
        y = y - y.mean(-1, keepdim=True)
    if config.name == LayerNormType.l2_norm:
        y = y / y.square().sum(-1, keepdim=True).sqrt()
    else:
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    if config.name == LayerNormType.qwen_rms:
        y = y.to(x.dtype)
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype)
