"""Attention by its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_core.nn.attention.segments import Segments


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """With a dense mask: quadratic, and differentiable by autograd.

    Takes and gives what :func:`.attend` does.
    """
    rep = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rep, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    hidden = ~segments.materialize(q.shape[1], k.shape[1]).to(q.device)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
