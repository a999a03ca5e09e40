"""What tests of tensor parallelism have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from olmo_core.config import DType
from olmo_core.nn.attention import (
    Attention,
    FusedAttention,
    GateConfig,
    GatedDeltaNet,
    NormalizedAttention,
)
from olmo_core.nn.feed_forward import FeedForward, NormalizedFeedForward
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

F64, D = torch.float64, 32
RMS = LayerNormConfig(name="rms", bias=False, dtype=DType.float64)
ROPE = RoPEConfig(name="default")
SIZES: dict[str, Any] = {"d_model": D, "n_heads": 8, "n_kv_heads": 4, "dtype": F64}


def norm(name: str, **options: Any) -> LayerNormConfig:
    return LayerNormConfig(name=name, dtype=None if name == "l2_norm" else DType.float64, **options)


SOFTMAX: dict[str, Callable[..., nn.Module]] = {
    "full norm, clip": lambda **k: Attention(**SIZES, qk_norm=RMS, rope=ROPE, clip_qkv=0.8, **k),
    "full norm, elementwise gate, no bias": lambda **k: Attention(
        **SIZES, qk_norm=RMS, rope=ROPE, bias=False, gate=GateConfig("elementwise"), **k
    ),
    "head norm, headwise gate, window": lambda **k: Attention(
        **SIZES, qk_norm=norm("qwen_rms"), use_head_qk_norm=True, rope=RoPEConfig(name="complex"),
        gate=GateConfig(), window_size=5, **k,
    ),
    "layer norm": lambda **k: Attention(**SIZES, qk_norm=norm("default"), **k),
    "qwen norm": lambda **k: Attention(**SIZES, qk_norm=norm("qwen_rms"), **k),
    "norm with bias": lambda **k: Attention(**SIZES, qk_norm=norm("rms", bias=True), **k),
    "l2 norm": lambda **k: Attention(**SIZES, qk_norm=norm("l2_norm"), rope=ROPE, **k),
    "ngpt": lambda **k: NormalizedAttention(**SIZES, rope=ROPE, **k),
    "ngpt, full norm": lambda **k: NormalizedAttention(**SIZES, rope=ROPE, qk_norm=RMS, **k),
    "fused": lambda **k: FusedAttention(
        d_model=D, n_heads=4, rope=RoPEConfig(name="fused"), clip_qkv=0.8, dtype=F64, **k
    ),
    "fused, no bias": lambda **k: FusedAttention(d_model=D, n_heads=4, bias=False, dtype=F64, **k),
}  # fmt: skip
RECURRENT: dict[str, Callable[..., nn.Module]] = {
    "gva": lambda **k: GatedDeltaNet(
        d_model=D, n_heads=4, n_v_heads=8, conv_bias=True, dtype=F64, **k
    ),
}
FEED_FORWARD: dict[str, Callable[..., nn.Module]] = {
    "swiglu": lambda **k: FeedForward(d_model=D, hidden_size=24, bias=True, dtype=F64, **k),
    "ngpt ff": lambda **k: NormalizedFeedForward(d_model=D, hidden_size=24, dtype=F64, **k),
}
MIXERS = {**SOFTMAX, **RECURRENT}
LAYERS = {**MIXERS, **FEED_FORWARD}
_MESHES: dict[Any, DeviceMesh] = {}


def mesh_of(*shape: int, names: tuple[str, ...] = ("tp",)) -> DeviceMesh:
    if (shape, names) not in _MESHES:
        _MESHES[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _MESHES[shape, names]


def make(name: str) -> nn.Module:
    """The same on all ranks, with no parameter at a special value."""
    torch.manual_seed(0)
    module = LAYERS[name]()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module


class Block(nn.Module):
    """A module around a mixer: what FSDP wraps, and what compiles to one graph, hooks included."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        self.seen = keywords
        return x + self.mixer(x, **keywords)


def whole(x: Any) -> Tensor:
    """A DTensor or a plain tensor, whole."""
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value where that is over 1."""
    return float((whole(got) - whole(want)).abs().max() / whole(want).abs().max().clamp_min(1.0))


def check_gradients(sharded: nn.Module, want: nn.Module, bound: float = 1e-12) -> None:
    """Every parameter of ``sharded`` is a DTensor whose whole gradient is ``want``'s."""
    from torch.distributed.tensor import DTensor

    wanted = dict(want.named_parameters())
    assert dict(sharded.named_parameters()).keys() == wanted.keys()
    for name, p in sharded.named_parameters():
        assert isinstance(p, DTensor) and p.shape == wanted[name].shape, name
        assert isinstance(p.grad, DTensor) and p.grad.placements == p.placements, name
        assert error(p.grad, wanted[name].grad) < bound, (name, error(p.grad, wanted[name].grad))
