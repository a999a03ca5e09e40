"""Where a run starts; each value can be overridden.

All four are sized for a laptop: about two minutes on two CPU cores.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from olmo_core.data import VOCAB_SIZE
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionConfig, AttentionType, SlidingWindowAttentionConfig
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import (
    TransformerBlockConfig,
    TransformerBlockType,
    TransformerConfig,
)
from olmo_core.train.config import DataConfig, OptimizerConfig, TrainConfig

DEFAULT_PRESET = "tiny-hybrid"


def get_preset(name: str) -> TrainConfig:
    """:raises OLMoConfigurationError: for a name that is not a preset."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        question = f"; did you mean {close[0]!r}?" if close else "."
        raise OLMoConfigurationError(
            f"unknown preset {name!r}{question} Choose one of: {', '.join(PRESETS)}"
        )
    return PRESETS[name]()


def tiny() -> TrainConfig:
    """A transformer of 4 layers, d_model 128: RMS pre-norm, RoPE, qk-norm, SwiGLU."""
    return _config([TransformerBlockConfig(sequence_mixer=_attention())])


def tiny_window() -> TrainConfig:
    """``tiny`` with windows of 64 keys in the middle layers."""
    attention = _attention()
    attention.sliding_window = SlidingWindowAttentionConfig(pattern=[64])
    return _config([TransformerBlockConfig(sequence_mixer=attention)])


def tiny_ngpt() -> TrainConfig:
    """``tiny`` as an nGPT: normalized attention, matrices on the sphere, no weight decay."""
    block = TransformerBlockConfig(
        name=TransformerBlockType.ngpt,
        alpha_init=0.25,
        sequence_mixer=AttentionConfig(
            name=AttentionType.normalized, n_heads=HEADS, rope=RoPEConfig()
        ),
    )
    config = _config([block])
    config.model.init_method = InitMethod.normalized
    config.optimizer.lr = 5e-3
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    return config


def tiny_hybrid() -> TrainConfig:
    """Three gated delta net layers to one of attention."""
    from olmo_core.nn.attention import GatedDeltaNetConfig

    mixers: list[SequenceMixerConfig] = [
        GatedDeltaNetConfig(n_heads=HEADS // 2, head_dim=32, expand_v=1.0),
        _attention(),
    ]
    config = _config([TransformerBlockConfig(sequence_mixer=mixer) for mixer in mixers])
    config.model.pattern = [0, 0, 0, 1]
    return config


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "tiny-window": tiny_window,
    "tiny-ngpt": tiny_ngpt,
    "tiny-hybrid": tiny_hybrid,
}

HEADS = 4


def _attention() -> AttentionConfig:
    return AttentionConfig(
        n_heads=HEADS,
        bias=False,
        rope=RoPEConfig(theta=10_000),
        qk_norm=LayerNormConfig(name=LayerNormType.rms, bias=False),
        use_head_qk_norm=True,
    )


def _config(blocks: list[TransformerBlockConfig]) -> TrainConfig:
    # Small batches: on a CPU many steps teach more than large ones. Scenes are cut into pieces of
    # 256 bytes, at least four to a row, each attended to by itself.
    return TrainConfig(
        model=TransformerConfig(
            d_model=128,
            vocab_size=VOCAB_SIZE,
            n_layers=4,
            blocks=blocks,
            init_method=InitMethod.fan_in,
        ),
        data=DataConfig(sequence_length=1024, batch_size=1, max_doc_len=256),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=40),
        steps=800,
        eval_every=100,
        save_every=100,
    )
