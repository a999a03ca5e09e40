"""Linear layers of one input against calling them one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from olmo_core.nn.projections import _project, project


def make(sizes: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(2, 7, 5, dtype=dtype).requires_grad_()
    return x, [torch.randn(n, 5, dtype=dtype).requires_grad_() for n in sizes]


SIZES = [[70, 3, 80, 4], [3, 4], [70, 80], [80, 3], [64, 65, 66, 1, 2, 90]]


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients(sizes: list[int]) -> None:
    x, weights = make(sizes)
    got, want = _project(x, weights), [nn.functional.linear(x, w) for w in weights]
    douts = [torch.randn_like(y) for y in want]
    leaves = [x, *weights]
    grads = (torch.autograd.grad(outs, leaves, douts) for outs in (got, want))
    for a, b in (*zip(got, want, strict=True), *zip(*grads, strict=True)):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen: int) -> None:
    x, weights = make([70, 3])
    leaves = [x, *weights]
    leaves[frozen].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    got, want = _project(x, weights), [nn.functional.linear(x, w) for w in weights]
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in outs), wanted) for outs in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_opcheck(sizes: list[int]) -> None:
    x, weights = make(sizes)
    op = getattr(torch.ops.olmo_core, f"project_{len(weights)}").default
    torch.library.opcheck(op, (x, *weights))


def test_autocast_casts_as_linear_does() -> None:
    x, weights = make([70, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = _project(x, weights), [nn.functional.linear(x, w) for w in weights]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b)
    sum(y.float().sum() for y in got).backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_a_layer_with_a_hook_is_called() -> None:
    linears = [nn.Linear(5, 3, bias=False) for _ in range(2)]
    calls = []
    linears[0].register_forward_hook(lambda *_: calls.append(1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    project([linear.to(device) for linear in linears], torch.randn(2, 5, device=device))
    assert calls == [1]
