"""RoPE and its scalings against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nn.test_rope import inputs, turn
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    RoPEType,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)


def hf_config(rope_type: str, head_dim: int = 64, theta: float = 500_000.0, **kwargs: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **kwargs},
    )


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("scaling", "rope_type", "parameters"),
    [
        (PIRoPEScalingConfig(factor=3.0), "linear", {"factor": 3.0}),
        (
            StepwiseRoPEScalingConfig(),  # the defaults are Llama 3.2's
            "llama3",
            {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            StepwiseRoPEScalingConfig(
                factor=8.0,
                low_freq_proportion=0.5,
                high_freq_proportion=0.125,
                old_context_len=4096,
            ),
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 4096,
            },
        ),
        (
            YaRNRoPEScalingConfig(),
            "yarn",
            {"factor": 8.0, "original_max_position_embeddings": 8192},
        ),
        (
            YaRNRoPEScalingConfig(factor=40, beta_fast=16, beta_slow=2, old_context_len=4096),
            "yarn",
            {
                "factor": 40.0,
                "beta_fast": 16,
                "beta_slow": 2,
                "original_max_position_embeddings": 4096,
            },
        ),
        (
            YaRNRoPEScalingConfig(factor=0.5, old_context_len=64),
            "yarn",
            {"factor": 0.5, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_scalings_equal_transformers(
    scaling: RoPEScalingConfig, rope_type: str, parameters: dict[str, Any], head_dim: int
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf_config(rope_type, head_dim, **parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](config)
    actual = scaling.compute_inv_freqs(500_000, head_dim)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=0)
    assert scaling.rescale_factor == pytest.approx(factor)


def test_abf_replaces_theta() -> None:
    scaled = RoPEConfig(theta=10_000, scaling=ABFRoPEScalingConfig(new_theta=1e6)).build(16)
    plain = RoPEConfig(theta=1_000_000).build(16)
    q, k = inputs()
    assert torch.equal(turn(scaled, q, k)[0], turn(plain, q, k)[0])


def test_yarn_rescales_by_its_formula() -> None:
    assert YaRNRoPEScalingConfig(factor=8.0).attention_rescale_factor == 0.1 * math.log(8) + 1
    assert YaRNRoPEScalingConfig(factor=1.0).attention_rescale_factor == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_equals_transformers_llama(dtype: torch.dtype, partial: float) -> None:
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    # "linear" by 1 is no scaling; unlike "default" it heeds the partial factor.
    config = hf_config("linear", theta=10_000.0, partial_rotary_factor=partial, factor=1.0)
    theirs = LlamaRotaryEmbedding(config)
    q, k = inputs(head_dim=64, length=33, dtype=dtype)
    positions = torch.arange(33)[None] + 100
    cos, sin = theirs(q, positions)
    width = cos.shape[-1]
    expected = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim=2)
    for name in (RoPEType.default, RoPEType.fused):
        rope = RoPEConfig(
            name=name, theta=10_000, full_precision=False, partial_rotary_factor=partial
        ).build(64)
        actual = turn(rope, q, k, positions=positions.expand(2, -1), max_position=133)
        dy = torch.randn_like(expected[0])
        for a, b, x in zip(actual, expected, (q, k), strict=True):
            # Theirs is built in float32, and off by 1e-5 at position 100 already.
            tolerance = {"rtol": 0.0, "atol": max(5e-5, 5 * torch.finfo(dtype).eps)}
            torch.testing.assert_close(a[..., :width], b, **tolerance)
            assert torch.equal(a[..., width:], x[..., width:])
            (da,) = torch.autograd.grad(a[..., :width], x, dy[:, :, : x.shape[2]])
            (db,) = torch.autograd.grad(b, x, dy[:, :, : x.shape[2]], retain_graph=True)
            torch.testing.assert_close(da, db, **tolerance)
