"""A configuration written as ``config.json``, and whether that says the same.

Writing is not judged by rules of its own: what is written is read again, and compared with the
model layer by layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from olmo_core.config import DType
from olmo_core.hf.config import ACTIVATIONS, PretrainedError, read_config
from olmo_core.hf.families import FAMILIES, FULL, LINEAR, SLIDING
from olmo_core.hf.rope import write_rope
from olmo_core.nn.attention import (
    AttentionConfig,
    GateConfig,
    GatedDeltaNetConfig,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import ABFRoPEScalingConfig, RoPEConfig, RoPEType
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

# They differ by rounding alone.
_RMS = {
    LayerNormType.rms,
    LayerNormType.fused_rms,
    LayerNormType.cute_rms,
    LayerNormType.qwen_rms,
}


def describe(
    config: TransformerConfig, model_type: str | None = None, *, max_position_embeddings: int
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    :param model_type: of the family to write; the first that fits if not given.
    :raises PretrainedError: if none does, with every difference from the closest one.
    """
    if model_type is not None and (model_type not in FAMILIES or not FAMILIES[model_type].whole):
        whole = [name for name, family in FAMILIES.items() if family.whole]
        raise PretrainedError(f"cannot write model_type={model_type!r}: use {', '.join(whole)}")
    layers = [_resolved(block, config, i) for i, block in enumerate(config.layer_blocks())]
    wanted = _flat(config, layers)
    closest: tuple[str, list[str]] | None = None
    for name, family in FAMILIES.items():
        if not family.whole or model_type not in (None, name):
            continue
        written = _write(name, config, layers, max_position_embeddings)
        try:
            again = read_config(written).config
        except PretrainedError as error:
            differences = [str(error)]
        else:
            got = _flat(again, [_resolved(b, again, i) for i, b in enumerate(again.layer_blocks())])
            differences = [
                f"{key}: the model has {wanted.get(key)!r}, {family.architecture} {got.get(key)!r}"
                for key in sorted(wanted.keys() | got.keys())
                if wanted.get(key) != got.get(key)
            ]
        if not differences:
            return written
        if closest is None or len(differences) < len(closest[1]):
            closest = (family.architecture, differences)
    assert closest is not None
    from olmo_core.hf.rules import listed

    raise PretrainedError(
        f"no model of transformers computes this; {closest[0]} comes closest:" + listed(closest[1])
    )


def _write(
    model_type: str,
    config: TransformerConfig,
    layers: list[TransformerBlockConfig],
    max_position_embeddings: int,
) -> dict[str, Any]:
    family = FAMILIES[model_type]
    first = layers[0]
    assert first.feed_forward is not None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    out: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": first.feed_forward.hidden_size,
        "num_hidden_layers": config.n_layers,
        "rms_norm_eps": first.layer_norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "max_position_embeddings": max_position_embeddings,
        family.activation_key: names[first.feed_forward.activation],
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if "mlp_bias" in family.defaults:
        out["mlp_bias"] = bool(first.feed_forward.bias)
    types, ropes = [], {}
    for layer in layers:
        mixer = layer.sequence_mixer
        if isinstance(mixer, GatedDeltaNetConfig):
            types.append(LINEAR)
            out |= _write_delta_net(mixer)
        elif isinstance(mixer, AttentionConfig):
            types.append(FULL if mixer.sliding_window is None else SLIDING)
            if mixer.sliding_window is not None:
                out["sliding_window"] = mixer.sliding_window.pattern[0]
            out |= {
                "num_attention_heads": mixer.n_heads,
                "num_key_value_heads": mixer.n_kv_heads,
                "head_dim": mixer.head_dim,
                "attention_bias": mixer.bias,
                "attention_dropout": mixer.dropout,
            }
            rope = mixer.rope
            ropes[types[-1]] = (
                {"rope_type": "default", "rope_theta": None} if rope is None else write_rope(rope)
            )
    if set(types) != {FULL}:
        out["layer_types"] = types
    if SLIDING in types and "use_sliding_window" in family.defaults:
        out["use_sliding_window"] = True
    if "query_pre_attn_scalar" in family.defaults:
        out["query_pre_attn_scalar"] = out.get("head_dim")
    if family.linear is None or model_type != "olmo_hybrid":
        out.pop("linear_allow_neg_eigval", None)
    if ropes:
        out["rope_parameters"] = ropes if family.rope_by_layer_type else next(iter(ropes.values()))
    return out


def _write_delta_net(mixer: GatedDeltaNetConfig) -> dict[str, Any]:
    assert mixer.head_dim is not None
    return {
        "linear_num_key_heads": mixer.n_heads,
        "linear_num_value_heads": mixer.n_v_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": round(mixer.head_dim * mixer.expand_v),
        "linear_conv_kernel_dim": mixer.conv_size,
        "linear_allow_neg_eigval": mixer.allow_neg_eigval,
    }


def _flat(config: TransformerConfig, layers: list[TransformerBlockConfig]) -> dict[str, Any]:
    """Everything that a model's output depends on, by dotted name."""
    out: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                visit(f"{name}.{key}" if name else key, each)
        elif value is not None:
            out[name] = value

    for name in ("d_model", "vocab_size", "n_layers", "tie_embeddings", "embedding_scale"):
        visit(name, getattr(config, name))
    if not config.is_normalized:
        visit("layer_norm", _norm(config.layer_norm).as_dict())
    for i, layer in enumerate(layers):
        visit(f"layer {i}", {k: v for k, v in layer.as_dict().items() if k != "alpha_init"})
    return out


def _resolved(
    block: TransformerBlockConfig, config: TransformerConfig, layer: int
) -> TransformerBlockConfig:
    """The block of one layer with every choice made, and what changes no value left out."""
    mixer = block.sequence_mixer
    if isinstance(mixer, AttentionConfig):
        resolved: SequenceMixerConfig = _attention(mixer, config, layer)
    elif isinstance(mixer, GatedDeltaNetConfig):
        resolved = mixer.replace(
            n_v_heads=mixer.n_v_heads or mixer.n_heads,
            head_dim=mixer.head_dim or config.d_model // mixer.n_heads,
            dtype=DType.float32,
        )
    else:
        resolved = mixer
    feed_forward = block.feed_forward_of(config.d_model)
    return block.replace(
        sequence_mixer=resolved,
        feed_forward=feed_forward.replace(bias=bool(feed_forward.bias), dtype=DType.float32),
        layer_norm=_norm(block.layer_norm),
    )


def _attention(mixer: AttentionConfig, config: TransformerConfig, layer: int) -> AttentionConfig:
    swa, window = mixer.sliding_window, None
    if swa is not None and swa.should_use_swa(layer, config.n_layers):
        window = SlidingWindowAttentionConfig(
            pattern=[swa.get_window_size(layer, config.n_layers)],
            force_full_attention_on_first_layer=False,
            force_full_attention_on_last_layer=False,
        )
    rope = mixer.rope
    if rope is not None and rope.no_global_rope and window is None:
        rope = None
    return mixer.replace(
        n_kv_heads=mixer.n_kv_heads or mixer.n_heads,
        head_dim=mixer.head_dim or config.d_model // mixer.n_heads,
        bias=mixer.bias is not False,
        gate=None if mixer.gate is None else GateConfig(granularity=mixer.gate.granularity),
        rope=None if rope is None else _rope(rope),
        qk_norm=None if mixer.qk_norm is None else _norm(mixer.qk_norm),
        use_head_qk_norm=bool(mixer.use_head_qk_norm),
        dropout=mixer.dropout or 0.0,
        use_flash=None,
        backend=None,
        dtype=DType.float32,
        sliding_window=window,
    )


def _rope(rope: RoPEConfig) -> RoPEConfig:
    scaling, theta = rope.scaling, rope.theta
    if isinstance(scaling, ABFRoPEScalingConfig) and scaling.attention_rescale_factor == 1:
        theta, scaling = scaling.new_theta, None
    name = rope.name if rope.name == RoPEType.complex else RoPEType.default
    return dataclasses.replace(
        rope, name=name, theta=theta, scaling=scaling, full_precision=True, no_global_rope=False
    )


def _norm(norm: LayerNormConfig) -> LayerNormConfig:
    affine = norm.elementwise_affine is not False
    return LayerNormConfig(
        name=LayerNormType.rms if norm.name in _RMS else norm.name,
        eps=1e-5 if norm.eps is None else norm.eps,
        elementwise_affine=affine,
        bias=affine and norm.bias is not False,
    )
