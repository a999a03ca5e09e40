"""The gates in plain torch: any device, any dtype, differentiable any number of times.

float64 stays float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.functional import compute_dtype


def torch_decay_gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, padding: Tensor | None, double: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`.op.decay_gates`."""
    dtype = compute_dtype(a.dtype)
    beta = b.to(dtype).sigmoid()
    if double:
        beta = 2 * beta
    if padding is not None:
        beta = beta.masked_fill(padding.unsqueeze(-1), 0)  # padding writes nothing
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype)), beta


def torch_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`.op.gated_rms_norm`."""
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return (y * F.silu(gate.to(dtype))).to(gate.dtype)


def torch_sigmoid_gate(x: Tensor, gate: Tensor, rounded: bool) -> Tensor:
    """See :func:`.op.sigmoid_gate`."""
    if rounded:
        return x * torch.sigmoid(gate)
    dtype = compute_dtype(x.dtype)
    return (x.to(dtype) * torch.sigmoid(gate.to(dtype))).to(x.dtype)
