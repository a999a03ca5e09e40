"""AdamW and gradient clipping, of whole parameters or of shards.

Shards of one parameter and of another may lie on different meshes (tensor-parallel ones on two
dimensions): torch's fused and multi-tensor functions take one mesh at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from olmo_core.distributed.utils import get_full_tensor
from olmo_core.train.config import OptimizerConfig

__all__ = ["adamw", "clip_gradients", "optimizer_state", "start_state"]


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    own = list(parameters)
    groups = []
    for part in _by_mesh(own):
        matrices = [p for p in part if p.dim() >= 2]
        vectors = [p for p in part if p.dim() < 2]
        groups += [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=own[0].device.type in ("cpu", "cuda"),
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients down to at most this total norm.

    :returns: their norm before, a plain tensor, the same on all ranks.
    """
    limit = math.inf if max_norm is None else max_norm
    parts = _by_mesh(parameters)
    if len(parts) == 1:
        return get_full_tensor(torch.nn.utils.clip_grad_norm_(parts[0], limit))
    norms = []
    for part in parts:
        gradients = [p.grad for p in part if p.grad is not None]
        norms.append(get_full_tensor(torch.nn.utils.get_total_norm(gradients)))
    total = torch.stack(norms).norm()
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, limit, total)
    return total


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``optimizer.FIELD.PARAMETER`` of each tensor that the optimizer holds."""
    return {
        f"optimizer.{field}.{name}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def start_state(model: nn.Module, optimizer: torch.optim.Optimizer, names: Collection[str]) -> None:
    """Give an optimizer of :func:`adamw` the state, of zeros, that ``names`` as in
    :func:`optimizer_state` say: torch makes it at the first step alone."""
    for name, parameter in model.named_parameters():
        if f"optimizer.step.{name}" in names:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    parts: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(parts.values())
