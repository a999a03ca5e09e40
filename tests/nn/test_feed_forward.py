"""SwiGLU and its nGPT form against float64 formulas and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.feed_forward import (
    FeedForward,
    FeedForwardConfig,
    FeedForwardType,
    NormalizedFeedForward,
)
from olmo_core.nn.init import InitMethod

INIT: dict[str, Any] = {
    "init_method": InitMethod.llama,
    "d_model": 12,
    "block_idx": 0,
    "num_blocks": 2,
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def reference(layer: FeedForward, x: Tensor) -> Tensor:
    w = {name: parameter.double() for name, parameter in layer.named_parameters()}
    bias = {n: w.get(f"{n}.bias", torch.zeros(())) for n in ("w1", "w2", "w3")}
    gate = x.double() @ w["w1.weight"].T + bias["w1"]
    up = x.double() @ w["w3.weight"].T + bias["w3"]
    if isinstance(layer, NormalizedFeedForward):
        gate = gate * w["sw1"] * math.sqrt(layer.d_model)
        up = up * w["sw3"]
    return (gate * gate.sigmoid() * up) @ w["w2.weight"].T + bias["w2"]


@given(
    name=st.sampled_from(FeedForwardType),
    d_model=st.integers(1, 16),
    hidden_size=st.integers(1, 24),
    bias=st.booleans(),
    dtype=st.sampled_from([DType.float32, DType.float64, DType.bfloat16]),
    shape=st.lists(st.integers(0, 3), max_size=2),
)
def test_equals_the_float64_reference(
    name: FeedForwardType,
    d_model: int,
    hidden_size: int,
    bias: bool,
    dtype: DType,
    shape: list[int],
) -> None:
    bias = bias and name == FeedForwardType.default
    config = FeedForwardConfig(hidden_size, name=name, bias=bias or None, dtype=dtype)
    layer = config.build(d_model)
    layer.init_weights(**INIT | {"d_model": d_model, "std": 0.3}, generator=generator())
    torch.manual_seed(0)
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    x = torch.randn(*shape, d_model).to(dtype.as_pt()).requires_grad_()
    y, expected = layer(x), reference(layer, x)
    assert y.dtype == x.dtype
    eps = torch.finfo(dtype.as_pt()).eps
    scale = expected.abs().max().item() + 1 if expected.numel() else 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=16 * scale * eps)
    dy = torch.randn(y.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, *layer.parameters()), dy)
    actual = torch.autograd.grad(y, (x, *layer.parameters()), dy.to(y.dtype))
    for a, b in zip(actual, wanted, strict=True):
        scale = b.abs().max().item() + 1 if b.numel() else 1
        torch.testing.assert_close(a, b, rtol=0, atol=32 * scale * eps)
    assert config.num_params(d_model) == sum(p.numel() for p in layer.parameters())
    matrices = 3 * d_model * hidden_size
    assert layer.num_flops_per_token(128) == 6 * matrices


def test_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2))
    ours = FeedForward(d_model=12, hidden_size=20)
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    state = {f"{a}.weight": theirs.get_parameter(f"{b}.weight") for a, b in names.items()}
    ours.load_state_dict(state)
    x = torch.randn(3, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_init_weights_scales_the_output_matrix_by_depth() -> None:
    layer = FeedForward(d_model=100, hidden_size=300, bias=True)
    layer.init_weights(
        init_method=InitMethod.llama, d_model=100, block_idx=1, num_blocks=8, generator=generator()
    )
    spread = 0.98658 * 0.02  # of a normal distribution truncated at 3 sigma
    assert layer.w1.weight.std().item() == pytest.approx(spread, rel=0.02)
    assert layer.w3.weight.std().item() == pytest.approx(spread, rel=0.02)
    assert layer.w2.weight.std().item() == pytest.approx(spread / 4, rel=0.02)
    assert not any(w.bias.any() for w in (layer.w1, layer.w2, layer.w3))


@pytest.mark.parametrize("name", FeedForwardType)
def test_meta_build_equals_cpu_build(name: FeedForwardType) -> None:
    config = FeedForwardConfig(20, name=name)
    late = config.build(12, init_device="meta").to_empty(device="cpu")
    late.init_weights(**INIT, generator=generator())
    expected = config.build(12)
    expected.init_weights(**INIT, generator=generator())
    for key, value in expected.state_dict().items():
        assert torch.equal(late.state_dict()[key], value)


def test_ngpt_matrices_have_unit_vectors() -> None:
    layer = NormalizedFeedForward(d_model=12, hidden_size=20)
    layer.init_weights(**INIT, generator=generator())
    assert torch.equal(layer.sw1, torch.ones(20))
    assert torch.equal(layer.sw3, torch.ones(20))
    with torch.no_grad():
        layer.w1.weight[3] = 0
        layer.w2.weight[:, 4] = 0
        layer.w3.weight.mul_(7)
    before = layer.w3.weight.detach().clone()
    layer.normalize_matrices()
    ones = torch.ones(20)
    lengths = [
        layer.w1.weight.norm(dim=1),
        layer.w2.weight.norm(dim=0),
        layer.w3.weight.norm(dim=1),
    ]
    for vector, zero in zip(lengths, (3, 4, None), strict=True):
        expected = ones.clone()
        if zero is not None:
            expected[zero] = 0
        torch.testing.assert_close(vector, expected)
    torch.testing.assert_close(layer.w3.weight, F.normalize(before, dim=1))


def test_ngpt_compiles_and_runs_under_autocast() -> None:
    layer = NormalizedFeedForward(d_model=12, hidden_size=20)
    x = torch.randn(3, 12, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("config", "d_model", "message"),
    [
        (FeedForwardConfig(0), 8, "at least 1, got 8 and 0"),
        (FeedForwardConfig(8), 0, "at least 1, got 0 and 8"),
        (FeedForwardConfig(8, name=FeedForwardType.normalized, bias=True), 8, "has no biases"),
    ],
)
def test_bad_configs(config: FeedForwardConfig, d_model: int, message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        config.build(d_model)
    with pytest.raises(OLMoConfigurationError, match=message):
        config.num_params(d_model)


@pytest.mark.parametrize(("name", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_other_activations_are_those_of_transformers(name: str, theirs: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    layer = FeedForwardConfig(24, activation=name, dtype="float64").build(16)  # type: ignore[arg-type]
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    act = activations.ACT2FN[theirs]
    want = (act(x @ layer.w1.weight.T) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), want)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), inputs))


def test_the_normalized_layer_has_silu_alone() -> None:
    with pytest.raises(OLMoConfigurationError, match="silu alone, got gelu_tanh"):
        FeedForwardConfig(24, name="normalized", activation="gelu_tanh").build(16)  # type: ignore[arg-type]
