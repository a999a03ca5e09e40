"""AdamW and gradient clipping, of whole parameters or of shards.

Shards of one parameter and of another may lie on different meshes (tensor-parallel ones on two
dimensions): torch's fused and multi-tensor functions take one mesh at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmo_core.nn.sharded import is_sharded
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

    :param parameters: plain, or DTensors on meshes of all ranks, which then call this together.
    :returns: their norm before, a plain tensor, the same on all ranks.
    """
    limit = math.inf if max_norm is None else max_norm
    own = list(parameters)
    if not is_sharded(own[0]):
        return torch.nn.utils.clip_grad_norm_(own, limit)
    # Squares of what each rank holds, over the number of ranks that hold the same: one sum of all
    # ranks does for all meshes, where DTensors would sum for each mesh and dimension.
    copies: dict[int, list[Tensor]] = {}
    for parameter in own:
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            holders = _sharded_over(gradient)
            copies.setdefault(dist.get_world_size() // holders, []).append(gradient.to_local())
    squares = [
        torch.nn.utils.get_total_norm(gradients).double().square() / n
        for n, gradients in copies.items()
    ]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    total = total.sqrt()
    for part in _by_mesh(own):
        torch.nn.utils.clip_grads_with_norm_(part, limit, total)
    return total


def _sharded_over(x: Any) -> int:
    """How many ranks hold different parts of a DTensor."""
    sizes = zip(x.device_mesh.shape, x.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``optimizer.FIELD.PARAMETER`` of each tensor that the optimizer holds."""
    return {
        f"optimizer.{field}.{name}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def start_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer of :func:`adamw` the state that torch makes at its first step."""
    for parameter in model.parameters():
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
