"""The layers that ``verify`` builds: few, but every option is in one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from olmo_core.config import DType
from olmo_core.diagnostics.reference import Params, attention_layer
from olmo_core.nn.attention.base import SequenceMixer, SequenceMixerConfig
from olmo_core.nn.attention.config import (
    AttentionBackendName,
    AttentionConfig,
    AttentionType,
    GateConfig,
    GateGranularity,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.kernels.softmax import Feature
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEType,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)

if TYPE_CHECKING:
    from olmo_core.nn.attention.gated_delta_net import GatedDeltaNetConfig

__all__ = ["MIXERS", "N_HEADS", "Mixer"]

N_HEADS = 4


@dataclass(frozen=True)
class Mixer:
    """One layer, for any head_dim and dtype."""

    name: str
    family: str
    """The class by its config's name: attention, normalized, fused or gated_delta_net."""
    about: str
    make: Callable[[int], SequenceMixerConfig[Any]]
    """The config for a head_dim, float32."""
    features: frozenset[Feature] = frozenset()
    """What it asks of a backend by itself."""
    window: int | None = None

    @property
    def has_backend(self) -> bool:
        """Whether it is softmax attention, over one of the table's backends."""
        return self.family != "gated_delta_net"

    def build(
        self, head_dim: int, dtype: torch.dtype, device: torch.device, backend: str
    ) -> SequenceMixer:
        """The layer on ``device``, with weights that nobody has set."""
        config = self.make(head_dim)
        options: dict[str, Any] = {"dtype": DType.from_pt(dtype)}
        if self.has_backend:
            options["backend"] = AttentionBackendName(backend)
        layer = replace(config, **options).build(
            N_HEADS * head_dim, layer_idx=0, n_layers=1, init_device=str(device)
        )
        assert isinstance(layer, SequenceMixer)
        return layer

    def reference(self, head_dim: int, params: Params, x: Tensor, document: Tensor) -> Tensor:
        """The layer by its definition: see :mod:`.reference`."""
        config = self.make(head_dim)
        if isinstance(config, AttentionConfig):
            return attention_layer(config, self.window, params, x, document)
        from olmo_core.diagnostics.reference_recurrent import gated_delta_net_layer

        return gated_delta_net_layer(cast("GatedDeltaNetConfig", config), params, x, document)


def _attention(head_dim: int, /, **options: Any) -> AttentionConfig:
    window = options.pop("window", None)
    if window is not None:
        options["sliding_window"] = SlidingWindowAttentionConfig([window], False, False)
    return AttentionConfig(n_heads=N_HEADS, **options)


def _softmax(
    name: str, about: str, family: AttentionType = AttentionType.default, **options: Any
) -> Mixer:
    window = options.get("window")
    features = {Feature.window} if window else set()
    if family == AttentionType.fused and "rope" not in options:
        features.add(Feature.packed_qkv)
    make = partial(_attention, name=family, **options)
    family_name = "attention" if family == AttentionType.default else str(family)
    return Mixer(name, family_name, about, make, frozenset(features), window)


def _gated_delta_net(head_dim: int, /, **options: Any) -> SequenceMixerConfig[Any]:
    from olmo_core.nn.attention.gated_delta_net import GatedDeltaNetConfig

    return GatedDeltaNetConfig(head_dim=head_dim, **options)


def _gate(granularity: GateGranularity) -> GateConfig:
    return GateConfig(granularity)


_RMS = LayerNormConfig(LayerNormType.rms, bias=False)
_QWEN = LayerNormConfig(LayerNormType.qwen_rms, bias=False)

MIXERS: Mapping[str, Mixer] = MappingProxyType(
    {
        m.name: m
        for m in (
            _softmax("mha", "multi-head, RoPE", rope=RoPEConfig()),
            _softmax(
                "gqa",
                "grouped-query, full-width qk-norm, complex RoPE, headwise gate",
                n_kv_heads=2,
                bias=False,
                qk_norm=_RMS,
                rope=RoPEConfig(RoPEType.complex, theta=10_000),
                gate=_gate(GateGranularity.headwise),
            ),
            _softmax(
                "mqa",
                "multi-query, qk-norm per head, YaRN, elementwise gate",
                n_kv_heads=1,
                bias=False,
                qk_norm=_QWEN,
                use_head_qk_norm=True,
                rope=RoPEConfig(scaling=YaRNRoPEScalingConfig(old_context_len=64)),
                gate=_gate(GateGranularity.elementwise),
            ),
            _softmax(
                "window",
                "window of 5 keys, grouped-query, partial RoPE with stepwise scaling",
                n_kv_heads=2,
                window=5,
                rope=RoPEConfig(
                    scaling=StepwiseRoPEScalingConfig(old_context_len=64), partial_rotary_factor=0.5
                ),
            ),
            _softmax(
                "window-70",
                "window of 70 keys, interpolated RoPE, clipped q, k and v",
                window=70,
                clip_qkv=3.0,
                rope=RoPEConfig(scaling=PIRoPEScalingConfig()),
            ),
            _softmax(
                "ngpt",
                "NormalizedAttention, grouped-query, RoPE with another base",
                AttentionType.normalized,
                n_kv_heads=2,
                rope=RoPEConfig(scaling=ABFRoPEScalingConfig()),
            ),
            _softmax(
                "ngpt-window",
                "NormalizedAttention with qk-norm and a window of 5 keys",
                AttentionType.normalized,
                qk_norm=_RMS,
                window=5,
            ),
            _softmax(
                "fused",
                "FusedAttention, fused RoPE",
                AttentionType.fused,
                rope=RoPEConfig(RoPEType.fused),
            ),
            _softmax(
                "fused-window",
                "FusedAttention, packed QKV straight into the backend, window of 5 keys",
                AttentionType.fused,
                bias=False,
                window=5,
            ),
            Mixer(
                "gdn",
                "gated_delta_net",
                "gated delta net, two value heads per key head, negative eigenvalues",
                partial(_gated_delta_net, n_heads=2, n_v_heads=4),
            ),
            Mixer(
                "gdn-plain",
                "gated_delta_net",
                "gated delta net, positive eigenvalues, convolution of 3 with a bias",
                partial(
                    _gated_delta_net, n_heads=2, allow_neg_eigval=False, conv_size=3, conv_bias=True
                ),
            ),
        )
    }
)
