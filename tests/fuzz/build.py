"""The layers of a case, and the tensors that they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fuzz.options import Case
from olmo_core.config import DType
from olmo_core.nn import attention
from olmo_core.nn.attention import AttentionConfig, GateConfig, GatedDeltaNetConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

__all__ = ["Draws", "Stack", "build"]


class Stack(nn.Module):
    """The layers of a case, one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, buffers: list[dict[str, Tensor]], **lengths: Any) -> Tensor:
        for layer, rope in zip(self.layers, buffers):
            x = layer(x, **rope, **lengths)
        return x

    def parameters_of(self, i: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of layer ``i``, under the names of its own state dict."""
        prefix = f"layers.{i}."
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


class Draws:
    """Random tensors of a case."""

    def __init__(self, case: Case) -> None:
        self.generator, self.noise = (torch.Generator().manual_seed(case.seed) for _ in range(2))
        self.case, self.dtype = case, getattr(torch, case.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, *shape: int) -> Tensor:
        x = self.normal(*shape)
        if self.case.extreme:
            x = self.normal(shape[-1]) + 0.01 * x
        x = x.to(self.dtype)
        if self.case.strided:
            x = x.transpose(0, 1).repeat_interleave(2, dim=-1)[..., ::2].transpose(0, 1)
        return x

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x``, each element off by a rounding to ``dtype`` or less."""
        error = torch.rand(x.shape, generator=self.noise, dtype=torch.float64) * 2 - 1
        return (x.double() * (1 + error * torch.finfo(dtype).eps)).to(x.dtype)

    def lengths(self, values: list[int]) -> Tensor:
        if self.case.strided:
            return torch.tensor(values, dtype=torch.int32).repeat_interleave(2)[::2]
        return torch.tensor(values, dtype=torch.int32)

    def split(self, total: int, parts: int) -> list[int]:
        """Cumulative lengths of other documents, as many."""
        cuts = torch.randint(0, total + 1, (parts - 1,), generator=self.generator)
        return [0, *cuts.sort().values.tolist(), total]


def build(case: Case, draws: Draws) -> Stack:
    """The layers, with weights that leave none of them near a special case."""
    cache = BufferCache()
    stack = Stack([build_layer(case, spec, cache) for spec in case.layers])
    with torch.no_grad():
        for name, p in stack.named_parameters():
            values = draws.normal(*p.shape)
            if p.dim() > 1:
                p.copy_(values * p.shape[1:].numel() ** -0.5 * 1.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * values)
            elif name.endswith((".sq", ".sk")):
                p.copy_(p.double() * (1 + 0.3 * values))
            elif name.endswith("A_log") and case.extreme:
                p.copy_(3 + values)
            else:
                p.copy_(0.5 * values)
        for layer in stack.layers if case.dtype != "float64" else ():
            if hasattr(layer, "k_conv1d"):
                # The first token's output is (q k) v, normalised: where q k is nearly 0, its sign,
                # and so everything after it, would be a matter of rounding.
                layer.w_k.weight += 2 * layer.w_q.weight
                layer.k_conv1d.weight += 2 * layer.q_conv1d.weight
    if case.frozen:
        for p in list(stack.parameters())[::2]:
            p.requires_grad_(False)
    # Dropout is for training alone; where it is drawn it must have no effect.
    return stack.train(not any("dropout" in spec for spec in case.layers))


def build_layer(case: Case, spec: dict[str, Any], cache: BufferCache) -> nn.Module:
    spec = dict(spec)
    mixer = spec.pop("mixer")
    for name, config in (("rope", RoPEConfig), ("gate", GateConfig), ("qk_norm", LayerNormConfig)):
        if name in spec:
            spec[name] = config.from_dict(spec[name])
    if not case.via_config:
        shared = {} if mixer == "GatedDeltaNet" else {"cache": cache}
        dtype = getattr(torch, case.dtype)
        return getattr(attention, mixer)(d_model=case.d_model, dtype=dtype, **shared, **spec)
    spec["dtype"] = DType(case.dtype)
    if mixer == "GatedDeltaNet":
        config = GatedDeltaNetConfig(**spec)
    else:
        names = {"Attention": "default", "NormalizedAttention": "normalized"}
        if "window_size" in spec:
            spec["sliding_window"] = attention.SlidingWindowAttentionConfig(
                pattern=[spec.pop("window_size")],
                force_full_attention_on_first_layer=False,
                force_full_attention_on_last_layer=False,
            )
        spec["name"] = names.get(mixer, "fused")
        config = AttentionConfig(**spec)
    layer = config.build(case.d_model, layer_idx=0, n_layers=1, cache=cache)
    assert sum(p.numel() for p in layer.parameters()) == config.num_params(case.d_model)
    return layer
