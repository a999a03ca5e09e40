"""Configs build what they say, count it exactly, and refuse what a variant lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import (
    Attention,
    AttentionConfig,
    FusedAttention,
    GateConfig,
    NormalizedAttention,
    SequenceMixerConfig,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig, YaRNRoPEScalingConfig

options = st.fixed_dictionaries(
    {
        "name": st.just("default"),
        "n_heads": st.just(4),
        "n_kv_heads": st.sampled_from([None, 1, 2, 4]),
        "head_dim": st.sampled_from([None, 6]),
        "bias": st.sampled_from([None, True, False]),
        "gate": st.sampled_from([None, GateConfig(), GateConfig("elementwise", False)]),
        "rope": st.sampled_from(
            [None, RoPEConfig(), RoPEConfig(theta=1e4, scaling=YaRNRoPEScalingConfig(factor=4.0))]
        ),
        "clip_qkv": st.sampled_from([None, 8.0]),
        "qk_norm": st.sampled_from(
            [None, LayerNormConfig(name="rms", bias=False), LayerNormConfig()]
        ),
        "dropout": st.sampled_from([None, 0.1]),
        "backend": st.sampled_from([None, "torch"]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "sliding_window": st.sampled_from([None, SlidingWindowAttentionConfig([8, -1])]),
    }
)


@given(options, st.booleans())
def test_default(kwargs: dict[str, Any], per_head: bool) -> None:
    config = AttentionConfig(**kwargs, use_head_qk_norm=per_head if kwargs["qk_norm"] else None)
    layer = config.build(24, layer_idx=1, n_layers=4)
    assert type(layer) is Attention
    assert config.num_params(24) == sum(p.numel() for p in layer.parameters())
    assert layer.window_size == (8 if kwargs["sliding_window"] else None)
    assert layer.w_q.weight.dtype == getattr(torch, kwargs["dtype"])
    for cls in (AttentionConfig, SequenceMixerConfig):
        again = cls.from_dict(config.as_config_dict())
        assert again == config and type(again) is AttentionConfig


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (AttentionConfig(name="fused", n_heads=4, bias=False), FusedAttention),
        (AttentionConfig(name="fused", n_heads=4, rope=RoPEConfig(name="fused")), FusedAttention),
        (AttentionConfig(name="normalized", n_heads=4, n_kv_heads=2), NormalizedAttention),
        (
            AttentionConfig(name="normalized", n_heads=4, qk_norm=LayerNormConfig(name="rms")),
            NormalizedAttention,
        ),
    ],
)
def test_variants(config: AttentionConfig, cls: type) -> None:
    layer = config.build(24, layer_idx=0, n_layers=1)
    assert type(layer) is cls
    assert config.num_params(24) == sum(p.numel() for p in layer.parameters())
    assert SequenceMixerConfig.from_dict(config.as_config_dict()) == config


def test_merge() -> None:
    config = AttentionConfig(n_heads=4, rope=RoPEConfig())
    merged = config.merge(["n_kv_heads=2", "rope.theta=1000", "gate.granularity=elementwise"])
    assert (merged.n_kv_heads, merged.rope.theta) == (2, 1000)
    assert merged.gate == GateConfig("elementwise")
    with pytest.raises(OLMoConfigurationError, match=r"n_kv_headz.*n_kv_heads"):
        config.merge(["n_kv_headz=2"])


def test_sliding_window_pattern() -> None:
    windows = SlidingWindowAttentionConfig([4, 8, -1])
    used = [windows.should_use_swa(i, 8) for i in range(8)]
    # The first layer is full, so the pattern starts at the second; the last is full too.
    assert used == [False, True, True, False, True, True, False, False]
    assert [windows.get_window_size(i, 8) for i in (1, 2, 4, 5)] == [4, 8, 4, 8]
    free = SlidingWindowAttentionConfig([4, -1], False, False)
    assert [free.should_use_swa(i, 4) for i in range(4)] == [True, False, True, False]
    with pytest.raises(ValueError, match="has no window"):
        windows.get_window_size(0, 8)
    with pytest.raises(ValueError, match="layer_idx"):
        windows.should_use_swa(8, 8)


def test_no_global_rope() -> None:
    config = AttentionConfig(
        n_heads=4,
        rope=RoPEConfig(no_global_rope=True),
        sliding_window=SlidingWindowAttentionConfig([4]),
    )
    layers = [config.build(16, layer_idx=i, n_layers=3) for i in range(3)]
    assert [layer.rope is None for layer in layers] == [True, False, True]
    direct = [
        Attention(d_model=16, n_heads=4, rope=RoPEConfig(no_global_rope=True), window_size=window)
        for window in (None, 4)
    ]
    assert [layer.rope is None for layer in direct] == [True, False]


def test_layers_share_rope_tables() -> None:
    """Page 2, failure 8: a shared cache without head_dim in its key gave wrong tables."""
    cache = BufferCache()
    shapes = [AttentionConfig(n_heads=h, rope=RoPEConfig()) for h in (2, 4, 4)]
    layers = [c.build(16, layer_idx=0, n_layers=1, cache=cache) for c in shapes]
    x = torch.randn(1, 5, 16)
    for config, layer in zip(shapes, layers):
        alone = config.build(16, layer_idx=0, n_layers=1)
        alone.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), alone(x))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n_heads": 3}, "multiple of n_heads"),
    ({"n_heads": 0}, "positive int"),
    ({"n_heads": 4, "n_kv_heads": 0}, "positive int, got 0"),
    ({"n_heads": 4, "n_kv_heads": 8}, "multiple of n_kv_heads"),
    ({"n_heads": 4, "n_kv_heads": 3}, "multiple of n_kv_heads"),
    ({"n_heads": 4, "head_dim": -1}, "positive int"),
    ({"n_heads": 4, "dropout": 1.0}, "dropout must be in"),
    ({"n_heads": 4, "dropout": -0.1}, "dropout must be in"),
    ({"n_heads": 4, "clip_qkv": 0.0}, "clip_qkv must be positive"),
    ({"n_heads": 4, "clip_qkv": float("nan")}, "clip_qkv must be positive"),
    ({"n_heads": 4, "use_head_qk_norm": True}, "needs a qk_norm"),
    ({"n_heads": 4, "backend": "flash_9"}, "flash_9"),
    ({"n_heads": 4, "head_dim": 5, "rope": RoPEConfig()}, "even"),
    ({"n_heads": 4, "name": "fused", "n_kv_heads": 2}, "no option n_kv_heads"),
    ({"n_heads": 4, "name": "fused", "gate": GateConfig()}, "no option gate"),
    ({"n_heads": 4, "name": "fused", "qk_norm": LayerNormConfig()}, "no option qk_norm"),
    ({"n_heads": 4, "name": "fused", "rope": RoPEConfig()}, "needs the RoPE implementation"),
    ({"n_heads": 4, "name": "normalized", "bias": True}, "no option bias"),
    ({"n_heads": 4, "name": "normalized", "head_dim": 8}, "no option head_dim"),
    ({"n_heads": 4, "name": "normalized", "dropout": 0.1}, "no option dropout"),
    ({"n_heads": 4, "name": "normalized", "clip_qkv": 1.0, "gate": GateConfig()}, "gate, clip_qkv"),
]


@pytest.mark.parametrize(("kwargs", "match"), BAD, ids=[m for _, m in BAD])
def test_bad_options(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=match):
        AttentionConfig(**kwargs).build(16, layer_idx=0, n_layers=1)


@pytest.mark.parametrize("pattern", [[], [0], [-2], [4.0], [True], "4", None])
def test_bad_patterns(pattern: Any) -> None:
    with pytest.raises(OLMoConfigurationError, match="window pattern"):
        SlidingWindowAttentionConfig(pattern)


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_bad_windows(window: Any) -> None:
    with pytest.raises(OLMoConfigurationError, match="window_size"):
        Attention(d_model=16, n_heads=2, window_size=window)


def test_a_pattern_that_reaches_no_layer_is_said_once() -> None:
    window = SlidingWindowAttentionConfig(pattern=[4])
    config = AttentionConfig(n_heads=2, sliding_window=window)
    for n_layers in (1, 2):
        with pytest.warns(UserWarning, match="force_full_attention_on_first_layer") as said:
            for i in range(n_layers):
                config.build(16, layer_idx=i, n_layers=n_layers)
        assert len(said) == 1
    for good in (
        SlidingWindowAttentionConfig(pattern=[4], force_full_attention_on_first_layer=False),
        SlidingWindowAttentionConfig(pattern=[-1]),
    ):
        AttentionConfig(n_heads=2, sliding_window=good).build(16, layer_idx=0, n_layers=2)
    config.build(16, layer_idx=0, n_layers=3)
