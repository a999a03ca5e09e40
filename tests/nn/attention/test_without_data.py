"""Layers of meta tensors and of fake ones: shapes and dtypes are found, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from olmo_core.diagnostics.mixers import MIXERS

BATCH, TOKENS, HEAD_DIM = 2, 9, 16


def forward_backward(name: str, device: str, ends: list[int] | None) -> list[Tensor]:
    layer = MIXERS[name].build(HEAD_DIM, torch.float32, torch.device(device), "torch")
    x = torch.randn(BATCH, TOKENS, 4 * HEAD_DIM, device=device, requires_grad=True)
    keywords = {}
    if ends is not None:
        keywords = {"cu_doc_lens": torch.tensor(ends, dtype=torch.int32, device=device)}
    out = layer(x, **keywords)
    out.sum().backward()
    assert x.grad is not None
    assert out.shape == x.grad.shape == x.shape and out.dtype == x.grad.dtype == x.dtype
    grads = [p.grad for p in layer.parameters()]
    assert all(g is not None for g in grads)
    return [out, x.grad, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("ends", [None, [0, 4, 4, 18]])
@pytest.mark.parametrize("name", MIXERS)
def test_meta_tensors(name: str, ends: list[int] | None) -> None:
    assert all(y.is_meta for y in forward_backward(name, "meta", ends))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gqa", "window", "gdn"])
def test_a_cache_of_meta_tensors(name: str) -> None:
    layer: Any = MIXERS[name].build(HEAD_DIM, torch.float32, torch.device("meta"), "torch").eval()
    layer.init_kv_cache_manager(BATCH, 16)
    for tokens in (4, 1, 2):
        x = torch.empty(BATCH, tokens, 4 * HEAD_DIM, device="meta")
        assert (y := layer(x)).is_meta and y.shape == x.shape


@pytest.mark.parametrize("name", ["gqa", "ngpt", "fused", "gdn"])
def test_a_layer_built_and_called_under_a_fake_mode(name: str) -> None:
    with FakeTensorMode():
        assert all(isinstance(y, FakeTensor) for y in forward_backward(name, "cpu", None))
