"""``config.json`` to a :class:`TransformerConfig`, and back.

Only reading is judged: a config that is written is read again, and has to say what the model is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError, OLMoError
from olmo_core.hf.families import (
    FAMILIES,
    FULL,
    LINEAR,
    MULTIMODAL,
    PRE,
    SLIDING,
    Family,
)
from olmo_core.hf.rope import read_rope
from olmo_core.nn.attention import (
    AttentionConfig,
    GateConfig,
    GatedDeltaNetConfig,
    GateGranularity,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.feed_forward import Activation, FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

ACTIVATIONS = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
}
# What transformers fixes in its delta net's norm, whatever the model's eps is.
OLMO_HYBRID_NORM_EPS = 1e-5
# Values that do not change what a text model computes.
_INERT = {
    "_name_or_path", "_sliding_window_pattern", "architectures", "auto_map", "bos_token_id",
    "boi_token_index", "cache_implementation", "chunk_size_feed_forward", "dtype",
    "eoi_token_index", "eos_token_id", "id2label", "image_token_index", "initializer_range",
    "is_llama_config", "label2id", "linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor",
    "linear_dt_max", "linear_dt_min", "max_position_embeddings", "mlp_only_layers",
    "mm_tokens_per_image", "model_type", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings",
    "pad_token_id", "pretraining_tp", "return_dict", "rope_interleaved", "torch_dtype",
    "transformers.js_config", "transformers_version", "use_cache", "vision_config",
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "mamba_ssm_dtype", "max_window_layers", "use_sliding_window", "unsloth_fixed",
    "unsloth_version",
}  # fmt: skip
_ROPE_KEYS = {
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq",
    "partial_rotary_factor",
}  # fmt: skip
_MOE = {
    "decoder_sparse_step", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_experts_per_tok", "num_experts", "norm_topk_prob", "output_router_logits",
    "router_aux_loss_coef",
}  # fmt: skip


class PretrainedError(OLMoError):
    """Weights or a configuration from elsewhere that cannot be used."""


@dataclass(frozen=True)
class Imported:
    """What a ``config.json`` means here."""

    model_type: str
    family: Family
    config: TransformerConfig
    score_scale: float = 1.0
    """The softmax scale over ``head_dim ** -0.5``; it goes into the queries' norm."""


class _Values(Mapping[str, Any]):
    """A ``config.json`` over the family's defaults, which remembers what was read."""

    def __init__(self, data: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.values_ = {**defaults, **{k: v for k, v in data.items() if v is not None}}
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self.values_[key]

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def read_config(data: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> Imported:
    """Translate a ``config.json``.

    :param data: its content.
    :param ignore: keys that are unknown here and known not to change the model.
    :raises PretrainedError: for a family that is not supported, or with a line for each value
        that has no counterpart here.
    """
    model_type = data.get("model_type")
    if model_type in MULTIMODAL and "text_config" in data:
        outer, model_type = data, MULTIMODAL[model_type]
        data = {"tie_word_embeddings": outer.get("tie_word_embeddings"), **outer["text_config"]}
    if model_type not in FAMILIES:
        raise PretrainedError(
            f"config.json names model_type={model_type!r}: supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    values = _Values(data, family.defaults)
    problems: list[str] = []
    try:
        imported = _read(model_type, family, values, data, problems)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OLMoConfigurationError) as error:
        if problems:
            imported = None
        else:
            raise PretrainedError(f"config.json cannot be read: {error}") from error
    known = values.read | _INERT | _ROPE_KEYS | set(ignore) | (set() if family.whole else _MOE)
    unknown = [k for k in data if k not in known and not _is_off(data[k])]
    problems += [f"{key}={data[key]!r}, which is unknown here" for key in unknown]
    if problems or imported is None:
        lines = "".join(f"\n- {problem}" for problem in problems)
        hint = ""
        if unknown:
            hint = (
                "\nIf the unknown ones do not change the model, pass their names as ignore="
                f"{tuple(unknown)!r}."
            )
        raise PretrainedError(
            f"config.json ({model_type}) has values without a counterpart here:{lines}{hint}"
        )
    return imported


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _read(
    model_type: str, family: Family, v: _Values, data: dict[str, Any], problems: list[str]
) -> Imported:
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "quantization_config"):
        if data.get(key) is not None:
            problems.append(f"{key}={data[key]!r}")
        v.read.add(key)
    if data.get("use_bidirectional_attention"):
        problems.append("use_bidirectional_attention=True: attention is causal here")
    v.read.add("use_bidirectional_attention")
    name = v[family.activation_key]
    if name not in ACTIVATIONS or (family.linear is not None and name not in ("silu", "swish")):
        problems.append(f"{family.activation_key}={name!r}")
    types = data.get("layer_types") or family.layer_types(v)
    v.read |= {"layer_types", "sliding_window_pattern", "full_attention_interval"}
    window = v["sliding_window"] if "sliding_window" in family.defaults else None
    v.read.add("sliding_window")
    allowed = {FULL}
    allowed |= {SLIDING} if "sliding_window" in family.defaults else set()
    allowed |= {LINEAR} if family.linear is not None else set()
    if not set(types) <= allowed or len(types) != v["num_hidden_layers"]:
        problems.append(
            f"layer_types={types!r} (expected {v['num_hidden_layers']}, of {sorted(allowed)})"
        )
        raise ValueError("layer_types")
    if SLIDING in types and not window:
        problems.append(f"sliding_window={window!r} with layers of type {SLIDING}")
        raise ValueError("sliding_window")

    ropes = {kind: _rope(family, v, data, kind, problems) for kind in set(types) - {LINEAR}}
    kinds = list(dict.fromkeys(types))
    scale = 1.0
    if "query_pre_attn_scalar" in family.defaults:
        scale = math.sqrt(_head_dim(v) / v["query_pre_attn_scalar"])
    norm = LayerNormConfig(
        name=family.norm,
        eps=v["rms_norm_eps"],
        bias=False,
        dtype=DType.float32 if family.zero_centred else None,
    )
    feed_forward = FeedForwardConfig(
        v["intermediate_size"],
        bias=bool(v["mlp_bias"]) if "mlp_bias" in family.defaults else False,
        activation=ACTIVATIONS.get(name, Activation.silu),
    )
    blocks = []
    for kind in kinds:
        if kind == LINEAR:
            mixer: SequenceMixerConfig = _delta_net(model_type, v)
        else:
            mixer = _attention(family, v, ropes[kind], norm, window if kind == SLIDING else None)
        blocks.append(
            TransformerBlockConfig(
                name=PRE if kind == LINEAR else family.attention_block,
                sequence_mixer=mixer,
                feed_forward=feed_forward.copy(),
                layer_norm=norm.copy(),
            )
        )
    config = TransformerConfig(
        d_model=v["hidden_size"],
        vocab_size=v["vocab_size"],
        n_layers=v["num_hidden_layers"],
        blocks=blocks,
        pattern=_shortest_period([kinds.index(kind) for kind in types]),
        layer_norm=norm,
        tie_embeddings=bool(v["tie_word_embeddings"]),
        embedding_scale=math.sqrt(v["hidden_size"]) if model_type == "gemma3_text" else None,
        init_std=v["initializer_range"],
    )
    for block in blocks:  # raises for sizes that do not fit together
        block.build(config.d_model, layer_idx=0, n_layers=1, init_device="meta")
    config.layer_blocks()
    return Imported(model_type, family, config, scale)


def _head_dim(v: _Values) -> int:
    return int(v["head_dim"] or v["hidden_size"] // v["num_attention_heads"])


def _attention(
    family: Family,
    v: _Values,
    rope: RoPEConfig | None,
    norm: LayerNormConfig,
    window: int | None,
) -> AttentionConfig:
    sliding = None
    if window is not None:
        sliding = SlidingWindowAttentionConfig(
            pattern=[window],
            force_full_attention_on_first_layer=False,
            force_full_attention_on_last_layer=False,
        )
    return AttentionConfig(
        n_heads=v["num_attention_heads"],
        n_kv_heads=v["num_key_value_heads"] or v["num_attention_heads"],
        head_dim=_head_dim(v),
        bias=bool(v["attention_bias"]),
        gate=GateConfig(granularity=GateGranularity.elementwise) if family.gated else None,
        rope=rope,
        qk_norm=norm.copy() if family.qk_norm else None,
        use_head_qk_norm=family.qk_norm == "head",
        dropout=float(v["attention_dropout"] or 0.0),
        sliding_window=sliding,
    )


def _delta_net(model_type: str, v: _Values) -> GatedDeltaNetConfig:
    key_heads = v["linear_num_key_heads"] or v["num_attention_heads"]
    value_heads = v["linear_num_value_heads"] or v["num_attention_heads"]
    key_dim = v["linear_key_head_dim"] or int(0.75 * v["hidden_size"] / key_heads)
    value_dim = v["linear_value_head_dim"] or 2 * key_dim
    hybrid = model_type == "olmo_hybrid"
    return GatedDeltaNetConfig(
        n_heads=key_heads,
        n_v_heads=value_heads,
        head_dim=key_dim,
        expand_v=value_dim / key_dim,
        allow_neg_eigval=bool(v["linear_allow_neg_eigval"]) if hybrid else False,
        conv_size=v["linear_conv_kernel_dim"],
        norm_eps=OLMO_HYBRID_NORM_EPS if hybrid else v["rms_norm_eps"],
    )


def _rope(
    family: Family, v: _Values, data: dict[str, Any], kind: str, problems: list[str]
) -> RoPEConfig | None:
    """The RoPE of one type of layer. Older files have ``rope_theta`` and ``rope_scaling``."""
    parameters = data.get("rope_parameters") or {}
    scaling = data.get("rope_scaling") or {}
    theta = data["rope_theta"] if "rope_theta" in data else v["rope_theta"]
    found: dict[str, Any] = {"rope_theta": theta}
    if "partial_rotary_factor" in v:
        found["partial_rotary_factor"] = v["partial_rotary_factor"]
    if not family.rope_by_layer_type:
        found |= scaling or parameters
    elif parameters and not set(parameters) <= {FULL, SLIDING}:
        problems.append("rope_parameters without an entry for each type of layer")
    else:
        # A scaling stretches the layers that see everything.
        if kind == FULL:
            found |= scaling
        elif "rope_local_base_freq" in v:
            found["rope_theta"] = v["rope_local_base_freq"]
        found |= parameters.get(kind) or {}
    rope = read_rope(found, v["max_position_embeddings"], problems)
    if rope is not None and rope.partial_rotary_factor != 1 and "partial_rotary_factor" not in v:
        problems.append(
            f"partial_rotary_factor={rope.partial_rotary_factor}, which {family.architecture} lacks"
        )
    return rope


def _shortest_period(pattern: list[int]) -> list[int]:
    n = len(pattern)
    for period in range(1, n):
        if all(pattern[i] == pattern[i % period] for i in range(n)):
            return pattern[:period]
    return pattern
