"""The gated delta net by its definition: one token after the other. See :mod:`.reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.diagnostics.reference import Params, positions
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

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
    q, k = (y.to(wide).unflatten(-1, (n_heads, head_dim)) for y in (q, k))
    v = v.to(wide).unflatten(-1, (n_v_heads, -1))
    beta = (x @ params["w_b.weight"].T).to(wide).sigmoid() * (2 if config.allow_neg_eigval else 1)
    a = (x @ params["w_a.weight"].T).to(wide) + params["dt_bias"].to(wide)
    g = -params["A_log"].to(wide).exp() * F.softplus(a)

    ends = torch.cat(((place == 0).nonzero()[:, 0], place.new_tensor([len(place)])))
    one_row = (y[None] for y in (q, k, v, g, beta))
    o = gated_delta_rule_reference(*one_row, cu_doc_lens=ends, normalize_qk=True)[0][0]
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
