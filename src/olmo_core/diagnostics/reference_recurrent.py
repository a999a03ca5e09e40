"""The gated delta net by its definition: one token after the other. See :mod:`.reference`.

Gated Delta Networks, https://arxiv.org/abs/2412.06464, equation 10, the decay before the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.diagnostics.reference import Params, positions

if TYPE_CHECKING:
    from olmo_core.nn.attention.gated_delta_net import GatedDeltaNetConfig

__all__ = ["gated_delta_net_layer"]


def gated_delta_net_layer(
    config: GatedDeltaNetConfig, params: Params, x: Tensor, document: Tensor
) -> Tensor:
    """Projections and convolutions in ``x``'s dtype, the rest in float32 at least.

    :param x: (N, d_model).
    :returns: (N, d_model).
    """
    n_heads = config.n_heads
    n_v_heads = config.n_v_heads or n_heads
    head_dim = config.head_dim or x.shape[-1] // n_heads
    wide = torch.promote_types(x.dtype, torch.float32)
    place = positions(document)
    padding = document < 0
    x = x.masked_fill(padding[:, None], 0.0)

    projected = ((name, x @ params[f"w_{name}.weight"].T) for name in "qkv")
    q, k, v = (
        F.silu(_short_convolution(params, f"{name}_conv1d", y, place)) for name, y in projected
    )
    q, k = (_unit(y.to(wide).unflatten(-1, (n_heads, head_dim))) for y in (q, k))
    v = v.to(wide).unflatten(-1, (n_v_heads, -1))
    head = torch.arange(n_v_heads, device=x.device) // (n_v_heads // n_heads)
    q, k = q[:, head] * head_dim**-0.5, k[:, head]
    beta = (x @ params["w_b.weight"].T).to(wide).sigmoid() * (2 if config.allow_neg_eigval else 1)
    a = (x @ params["w_a.weight"].T).to(wide) + params["dt_bias"].to(wide)
    decay = (-params["A_log"].to(wide).exp() * F.softplus(a)).exp()

    out = []
    state = torch.zeros(n_v_heads, head_dim, v.shape[-1], dtype=wide, device=x.device)
    starts = (place == 0).tolist()
    for t, start in enumerate(starts):
        state = torch.zeros_like(state) if start else state * decay[t, :, None, None]
        error = v[t] - (k[t, :, :, None] * state).sum(1)
        state = state + k[t, :, :, None] * (beta[t, :, None] * error)[:, None]
        out.append((q[t, :, :, None] * state).sum(1))
    o = torch.stack(out)
    o = o / (o.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    o = o * params["o_norm.weight"].to(wide)
    gate = F.silu((x @ params["w_g.weight"].T).to(wide)).unflatten(-1, (n_v_heads, -1))
    y = (o * gate).to(x.dtype).flatten(1) @ params["w_out.weight"].T
    return y.masked_fill(padding[:, None], 0.0)


def _short_convolution(params: Params, name: str, x: Tensor, place: Tensor) -> Tensor:
    """Token t is a weighted sum of itself and its last tokens, those of its own document."""
    weight = params[f"{name}.weight"][:, 0].to(x.dtype)  # (C, kernel), the token itself last
    out = torch.zeros_like(x)
    for back in range(weight.shape[1]):
        past = F.pad(x, (0, 0, back, 0))[: len(x)]
        past = past.masked_fill((place < back)[:, None], 0.0)
        out = out + past * weight[:, weight.shape[1] - 1 - back]
    bias = params.get(f"{name}.bias")
    return out if bias is None else out + bias.to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
