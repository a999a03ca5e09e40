"""A differentiable sum over the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.distributed.collectives import group_named
from olmo_core.nn.dispatch import register_differentiable

__all__ = ["sum_over_ranks"]

_LIB = torch.library.Library("olmo_core", "FRAGMENT")


def _forward(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_named(group))
    return total


def _fake(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group = inputs


def _differentiate(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    return sum_over_ranks(d, ctx.group), None


_LIB.define("sum_over_ranks(Tensor x, str group) -> Tensor")
sum_over_ranks = register_differentiable(
    _LIB, "sum_over_ranks", _forward, _fake, _differentiate, _save
)
"""The op ``sum_over_ranks(x, group) -> Tensor``: the sum of the ranks' ``x``, the same on each.

Every rank goes on with the sum in a part of the loss of its own, so the gradient of ``x`` is the
sum of the ranks' gradients. All ranks of the group, which goes by name, call it together, and
backward through its result too.
"""
