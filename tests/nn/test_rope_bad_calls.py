"""RoPE refuses options and inputs that cannot be right, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nn.test_rope import CPU, inputs, turn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    RoPEType,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)


@pytest.mark.parametrize(
    ("config", "head_dim", "message"),
    [
        (RoPEConfig(), 15, r"even and at least 2, got 15 \* 1.0 = 15"),
        (RoPEConfig(), 0, "even and at least 2"),
        (RoPEConfig(partial_rotary_factor=0.25), 12, r"12 \* 0.25 = 3"),
        (RoPEConfig(partial_rotary_factor=0.01), 16, "at least 2"),
        (RoPEConfig(partial_rotary_factor=0.0), 16, r"must lie in \(0, 1\], got 0.0"),
        (RoPEConfig(partial_rotary_factor=1.5), 16, r"must lie in \(0, 1\], got 1.5"),
        (RoPEConfig(theta=1), 16, "theta must be greater than 1"),
        (RoPEConfig(theta=float("nan")), 16, "theta must be greater than 1"),
        (RoPEConfig(scaling=PIRoPEScalingConfig(factor=0)), 16, "factor must be positive, got 0"),
        (RoPEConfig(scaling=ABFRoPEScalingConfig(new_theta=-1)), 16, "new_theta must be positive"),
        (
            RoPEConfig(scaling=ABFRoPEScalingConfig(attention_rescale_factor=0)),
            16,
            "attention_rescale_factor must be positive",
        ),
        (
            RoPEConfig(scaling=StepwiseRoPEScalingConfig(low_freq_proportion=0.8)),
            16,
            "got 0.8 and 0.25",
        ),
        (
            RoPEConfig(scaling=StepwiseRoPEScalingConfig(low_freq_proportion=-0.1)),
            16,
            "got -0.1 and 0.25",
        ),
        (
            RoPEConfig(scaling=StepwiseRoPEScalingConfig(high_freq_proportion=0)),
            16,
            "high_freq_proportion must be positive",
        ),
        (RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=-2)), 16, "factor must be positive"),
        (RoPEConfig(scaling=YaRNRoPEScalingConfig(beta_slow=33)), 16, "beta_slow <= beta_fast"),
        (RoPEConfig(scaling=YaRNRoPEScalingConfig(old_context_len=0)), 16, "old_context_len"),
        (RoPEConfig(scaling=RoPEScalingConfig()), 16, "abf, pi, stepwise, yarn"),
    ],
)
def test_bad_configs(config: RoPEConfig, head_dim: int, message: str) -> None:
    with pytest.raises(OLMoConfigurationError, match=message):
        config.build(head_dim)


INT = torch.arange(6)
TABLE = torch.ones(6, 16)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("default", {"positions": INT.float(), "max_position": 6}, TypeError, "torch.float32"),
        ("default", {"positions": INT.bool(), "max_position": 6}, TypeError, "torch.bool"),
        ("default", {"positions": INT}, TypeError, "need max_position"),
        ("default", {"positions": INT, "max_position": INT.max()}, TypeError, "need max_position"),
        ("default", {"positions": INT, "max_position": 6.0}, TypeError, "got 6.0"),
        ("default", {"max_position": 6}, ValueError, "only together with positions"),
        ("default", {"positions": INT[:5], "max_position": 6}, ValueError, r"got \(5,\)"),
        ("default", {"positions": INT[None], "max_position": 6}, ValueError, r"got \(1, 6\)"),
        ("default", {"positions": INT - 1, "max_position": 6}, ValueError, r"lie in \[0, "),
        ("default", {"positions": INT + 9999, "max_position": 6}, ValueError, "max_position=6"),
        ("default", {"positions": INT.to("meta"), "max_position": 6}, ValueError, "on meta"),
        ("default", {"pos_sin": TABLE}, ValueError, "pos_sin and pos_cos together"),
        ("default", {"pos_cos": TABLE}, ValueError, "pos_sin and pos_cos together"),
        ("default", {"freqs_cis": TABLE[:, :8] + 0j}, ValueError, "not freqs_cis"),
        ("complex", {"pos_sin": TABLE, "pos_cos": TABLE}, ValueError, "takes freqs_cis"),
        ("complex", {"freqs_cis": TABLE[:, :8]}, TypeError, "must be complex"),
        ("complex", {"freqs_cis": TABLE + 0j}, ValueError, r"\(positions, 8\) .* got \(6, 16\)"),
        (
            "fused",
            {"pos_sin": TABLE, "pos_cos": TABLE, "positions": INT, "max_position": 6},
            ValueError,
            "not both",
        ),
        ("fused", {"pos_sin": TABLE[:5], "pos_cos": TABLE[:5]}, ValueError, "to 5, got 5 rows"),
        ("fused", {"pos_sin": TABLE, "pos_cos": TABLE[:, :8]}, ValueError, r"got \(6, 8\)"),
        ("fused", {"pos_sin": TABLE[None], "pos_cos": TABLE[None]}, ValueError, r"\(1, 6, 16\)"),
        (
            "default",
            {"pos_sin": TABLE.to("meta"), "pos_cos": TABLE.to("meta")},
            ValueError,
            "on meta, the queries on cpu",
        ),
        (
            "default",
            {"pos_sin": TABLE.bfloat16(), "pos_cos": TABLE.bfloat16()},
            OLMoConfigurationError,
            "cast_forward_inputs=False",
        ),
        (
            "default",
            {"pos_sin": TABLE.long(), "pos_cos": TABLE.long()},
            OLMoConfigurationError,
            "torch.int64",
        ),
    ],
)
def test_bad_calls(name: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    rope = RoPEConfig(name=RoPEType(name)).build(16)
    with pytest.raises(error, match=message):
        turn(rope, *inputs(), **kwargs)


def test_bad_inputs() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs()
    for bad_q, bad_k in [(q[0], k[0]), (q[..., :8], k[..., :8]), (q, k[:, :5]), (q, k[..., :8])]:
        with pytest.raises(ValueError, match="RoPE expected q"):
            turn(rope, bad_q, bad_k)
    with pytest.raises(TypeError, match="floating-point"):
        turn(rope, q.long(), k.long())
    tables = rope.get_buffers(6, CPU)
    with pytest.raises(OLMoConfigurationError, match=r"dtype=torch\.float64"):
        turn(rope, q.double(), k.double(), pos_sin=tables.pos_sin, pos_cos=tables.pos_cos)
    low = RoPEConfig(full_precision=False).build(16)
    assert tables.pos_sin is not None
    assert tables.pos_cos is not None
    sin, cos = tables.pos_sin.bfloat16(), tables.pos_cos.bfloat16()
    turn(
        low, q.bfloat16(), k.bfloat16(), pos_sin=sin, pos_cos=cos
    )  # a table as coarse as asked for
