"""A sum over ranks, and its gradient: the sum of what each rank's part of the loss sends back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gloo_ranks import on_ranks
from olmo_core.nn.sum_over_ranks import sum_over_ranks

pytestmark = pytest.mark.distributed


def summed(rank: int, n: int) -> tuple[Tensor, Tensor]:
    group = torch.distributed.group.WORLD.group_name
    x = torch.tensor([[1.0, 2.0]]).mul(rank + 1).t().requires_grad_()  # not contiguous
    total = sum_over_ranks(x, group)
    (total * (rank + 1) * torch.tensor([[1.0], [10.0]])).sum().backward()
    torch.library.opcheck(torch.ops.olmo_core.sum_over_ranks.default, (x.detach(), group))
    assert x.grad is not None
    return total.detach(), x.grad


def test_the_sum_and_its_gradient() -> None:
    for total, gradient in on_ranks(2, summed):
        assert total.tolist() == [[3.0], [6.0]]
        assert gradient.tolist() == [[3.0], [30.0]]
