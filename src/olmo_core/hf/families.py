"""The model families of transformers, as data: what their blocks are, and how tensors are called.

A family is facts and names; :mod:`.config` and :mod:`.rules` read them in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.transformer import TransformerBlockType

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
PRE, POST, SANDWICH = (
    TransformerBlockType.pre_norm,
    TransformerBlockType.post_norm,
    TransformerBlockType.sandwich_norm,
)
Values = Mapping[str, Any]

# Tensor names: theirs in a layer -> ours in a block.
ATTENTION = {
    "self_attn.q_proj": "sequence_mixer.w_q",
    "self_attn.k_proj": "sequence_mixer.w_k",
    "self_attn.v_proj": "sequence_mixer.w_v",
    "self_attn.o_proj": "sequence_mixer.w_out",
    "self_attn.q_norm": "sequence_mixer.q_norm",
    "self_attn.k_norm": "sequence_mixer.k_norm",
}
FEED_FORWARD = {
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
NORMS: dict[TransformerBlockType, dict[str, str]] = {
    PRE: {
        "input_layernorm": "sequence_mixer_norm",
        "post_attention_layernorm": "feed_forward_norm",
    },
    POST: {
        "post_attention_layernorm": "sequence_mixer_norm",
        "post_feedforward_layernorm": "feed_forward_norm",
    },
    SANDWICH: {
        "input_layernorm": "sequence_mixer_norm",
        "post_attention_layernorm": "sequence_mixer_post_norm",
        "pre_feedforward_layernorm": "feed_forward_norm",
        "post_feedforward_layernorm": "feed_forward_post_norm",
    },
}
MODEL = {
    "model.embed_tokens": "embeddings",
    "model.norm": "lm_head.norm",
    "lm_head": "lm_head.w_out",
}

# Tensors of theirs, stacked, hold the rows of tensors of ours; ``rules.py`` knows the sizes.
Parts = dict[str | tuple[str, ...], tuple[str, ...]]
_GATES: Parts = {"A_log": ("A_log",), "dt_bias": ("dt_bias",)}
_GDN: Parts = {**_GATES, "conv1d": ("q_conv1d", "k_conv1d", "v_conv1d")}
GDN_SEPARATE: Parts = {
    **_GATES,
    # transformers cuts what it saves into thirds, wherever queries, keys and values end.
    ("q_conv1d", "k_conv1d", "v_conv1d"): ("q_conv1d", "k_conv1d", "v_conv1d"),
    **{f"{name}_proj": (f"w_{name}",) for name in "qkvabg"},
    "o_proj": ("w_out",),
    "o_norm": ("o_norm",),
}
GDN_FLAT: Parts = {
    **_GDN,
    "in_proj_qkv": ("w_q", "w_k", "w_v"),
    "in_proj_z": ("w_g",),
    "in_proj_a": ("w_a",),
    "in_proj_b": ("w_b",),
    "out_proj": ("w_out",),
    "norm": ("o_norm",),
}
GDN_BY_KEY_HEAD: Parts = {
    **_GDN,
    "in_proj_qkvz": ("w_q", "w_k", "w_v", "w_g"),
    "in_proj_ba": ("w_b", "w_a"),
    "out_proj": ("w_out",),
    "norm": ("o_norm",),
}


@dataclass(frozen=True)
class Family:
    """What distinguishes the models of one ``model_type``."""

    architecture: str
    """The class that transformers loads it with."""
    attention_block: TransformerBlockType
    """Where the norms of an attention layer stand; those of a delta net layer always before."""
    defaults: dict[str, Any]
    """Values of ``config.json`` that count where it names none."""
    norm: LayerNormType = LayerNormType.rms
    zero_centred: bool = False
    """Whether norms store their weight's distance from one."""
    qk_norm: str | None = None
    """``"full"`` width or per ``"head"``."""
    gated: bool = False
    """Whether queries share their matrix with an elementwise gate."""
    linear: Parts | None = None
    """The tensors of its delta net layers."""
    rope_by_layer_type: bool = False
    """Whether ``rope_parameters`` has an entry for each type of layer."""
    activation_key: str = "hidden_act"
    layer_types: Callable[[Values], list[str]] = lambda v: [FULL] * v["num_hidden_layers"]
    """The layers' types where ``config.json`` does not list them."""
    ignored_tensors: tuple[str, ...] = ()
    """Patterns of tensors that the text model does not use; transformers skips the same."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that its files have for parts of a layer."""
    whole: bool = True
    """Whether the whole model maps, or its mixers alone."""


def _every(interval: str | int, special: str, other: str) -> Callable[[Values], list[str]]:
    """Every so many layers one of another type; a name is that of a value."""

    def layer_types(v: Values) -> list[str]:
        n = v[interval] if isinstance(interval, str) else interval
        return [special if (i + 1) % n == 0 else other for i in range(v["num_hidden_layers"])]

    return layer_types


def _qwen3_layers(v: Values) -> list[str]:
    slides = v["use_sliding_window"] and v["sliding_window"] is not None
    first = v["max_window_layers"] if slides else v["num_hidden_layers"]
    return [SLIDING if i >= first else FULL for i in range(v["num_hidden_layers"])]


def _hybrid_layers(v: Values) -> list[str]:
    types = [FULL if i % 4 == 3 else LINEAR for i in range(v["num_hidden_layers"])]
    return types if FULL in types else [*types[:-1], FULL]


# fmt: off
_COMMON = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
    "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "max_position_embeddings": 2048, "rope_theta": 10_000.0,
}
_OLMO = {**_COMMON, "vocab_size": 50304, "rms_norm_eps": 1e-5}
_DELTA_NET = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}
_QWEN3_NEXT = {
    **_COMMON, **_DELTA_NET, "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25, "full_attention_interval": 4,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", PRE, {**_COMMON, "mlp_bias": False}, norm=LayerNormType.qwen_rms
    ),
    "olmo2": Family("Olmo2ForCausalLM", POST, _OLMO, qk_norm="full"),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        POST,
        {**_OLMO, "rope_theta": 500_000.0, "sliding_window": 4096},
        qk_norm="full",
        rope_by_layer_type=True,
        layer_types=_every(4, FULL, SLIDING),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        PRE,
        {
            **_COMMON,
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "head_dim": 128,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        norm=LayerNormType.qwen_rms,
        qk_norm="head",
        layer_types=_qwen3_layers,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        SANDWICH,
        {
            **_COMMON,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        zero_centred=True,
        qk_norm="head",
        rope_by_layer_type=True,
        activation_key="hidden_activation",
        layer_types=_every("sliding_window_pattern", FULL, SLIDING),
        ignored_tensors=("*vision_tower.*", "*multi_modal_projector.*"),
    ),
    "olmo_hybrid": Family(
        "OlmoHybridForCausalLM",
        POST,
        {
            **_COMMON,
            **_DELTA_NET,
            "vocab_size": 100352,
            "hidden_size": 3840,
            "num_attention_heads": 30,
            "max_position_embeddings": 65536,
            "linear_num_key_heads": None,
            "linear_num_value_heads": None,
            "linear_key_head_dim": None,
            "linear_value_head_dim": None,
            "linear_allow_neg_eigval": True,
        },
        qk_norm="full",
        linear=GDN_SEPARATE,
        layer_types=_hybrid_layers,
        aliases={
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
        },
        ignored_tensors=("mtp*",),
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        PRE,
        {
            **_QWEN3_NEXT,
            "vocab_size": 248_320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
        },
        zero_centred=True,
        qk_norm="head",
        gated=True,
        linear=GDN_FLAT,
        layer_types=_every("full_attention_interval", FULL, LINEAR),
        ignored_tensors=("mtp*", "model.visual.*"),
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        PRE,
        _QWEN3_NEXT,
        zero_centred=True,
        qk_norm="head",
        gated=True,
        linear=GDN_BY_KEY_HEAD,
        layer_types=_every("full_attention_interval", FULL, LINEAR),
        ignored_tensors=("mtp*",),
        whole=False,
    ),
}
# fmt: on

# A model of several parts, of which the text model is one.
MULTIMODAL = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}
# Where the text model's layers lie in its files.
TEXT_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
}
