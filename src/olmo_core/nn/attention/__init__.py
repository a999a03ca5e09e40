"""Sequence mixers: softmax attention in three variants, and the gated delta net."""

from olmo_core.nn.attention.attention import Attention, NormalizedAttention
from olmo_core.nn.attention.backend import (
    AttentionBackend,
    AttentionBackendName,
    FlashAttention2Backend,
    FlashAttention3Backend,
    FlashAttention4Backend,
    TEAttentionBackend,
    TorchAttentionBackend,
)
from olmo_core.nn.attention.base import SequenceMixer, SequenceMixerConfig
from olmo_core.nn.attention.config import (
    AttentionConfig,
    AttentionType,
    GateConfig,
    GateGranularity,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.fused_attention import FusedAttention
from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from olmo_core.nn.attention.ring import (
    BalancedLoadBalancer,
    RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancer,
    RingAttentionLoadBalancerType,
    RingAttentionZigZagLoadBalancer,
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
    UlyssesLoadBalancer,
)

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionBackendName",
    "AttentionConfig",
    "AttentionType",
    "BalancedLoadBalancer",
    "FlashAttention2Backend",
    "FlashAttention3Backend",
    "FlashAttention4Backend",
    "FusedAttention",
    "GateConfig",
    "GateGranularity",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "NormalizedAttention",
    "RingAttentionLlama3LoadBalancer",
    "RingAttentionLoadBalancer",
    "RingAttentionLoadBalancerType",
    "RingAttentionZigZagLoadBalancer",
    "RingContextParallelStyle",
    "SequenceMixer",
    "SequenceMixerConfig",
    "SlidingWindowAttentionConfig",
    "TEAttentionBackend",
    "TorchAttentionBackend",
    "UlyssesContextParallelStyle",
    "UlyssesLoadBalancer",
]
