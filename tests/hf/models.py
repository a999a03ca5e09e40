"""Tiny random models of transformers, one of each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB, WINDOW = 61, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "rms_norm_eps": 1e-5,
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))


def olmo2(**more: Any) -> nn.Module:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{**SIZES, **more}))


def olmo3(**more: Any) -> nn.Module:
    ropes = {"sliding_attention": {"rope_theta": 500_000.0}, "full_attention": YARN}
    config = transformers.Olmo3Config(
        **{**SIZES, "sliding_window": WINDOW, "rope_parameters": ropes, **more}
    )
    return transformers.Olmo3ForCausalLM(config)


def qwen3(**more: Any) -> nn.Module:
    config = transformers.Qwen3Config(**{**SIZES, "head_dim": 10, **more})
    return transformers.Qwen3ForCausalLM(config)


def gemma3(**more: Any) -> nn.Module:
    config = transformers.Gemma3TextConfig(
        **{
            **SIZES,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            **more,
        }
    )
    return transformers.Gemma3ForCausalLM(config)


def olmo_hybrid(**more: Any) -> nn.Module:
    config = transformers.OlmoHybridConfig(**{**SIZES, **DELTA_NET, **more})
    return transformers.OlmoHybridForCausalLM(config)


def qwen3_5(**more: Any) -> nn.Module:
    config = transformers.Qwen3_5TextConfig(**{**SIZES, **DELTA_NET, "head_dim": 16, **more})
    return transformers.Qwen3_5ForCausalLM(config)


def qwen3_next(**more: Any) -> nn.Module:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    config = transformers.Qwen3NextConfig(
        **{**SIZES, **DELTA_NET, "head_dim": 16, **experts, **more}
    )
    return transformers.Qwen3NextForCausalLM(config)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "olmo_hybrid": olmo_hybrid,
    "qwen3_5": qwen3_5,
}
VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "llama, tied, biases": lambda: llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, linear scaling": lambda: llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama, 3.1 scaling": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "olmo2, gqa off": lambda: olmo2(num_key_value_heads=6),
    "olmo3, no scaling": lambda: olmo3(rope_parameters=None),
    "qwen3, windows, tied": lambda: qwen3(
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "gemma3, linear scaling": lambda: gemma3(
        query_pre_attn_scalar=16,
        sliding_window_pattern=2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "olmo_hybrid, no RoPE": lambda: olmo_hybrid(
        rope_parameters={"rope_type": "default", "rope_theta": None},
        linear_allow_neg_eigval=False,
    ),
    "qwen3_5, tied": lambda: qwen3_5(tie_word_embeddings=True, full_attention_interval=2),
}


def build(make: Callable[..., nn.Module], **more: Any) -> Any:
    """A model in evaluation mode, its norms and gates away from where they start."""
    torch.manual_seed(0)
    model = make(**more).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "A_log" in name:
                parameter.sub_(2)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))
