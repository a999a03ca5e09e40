"""RoPE's parameters as transformers writes them, and back."""

from __future__ import annotations

import math
from typing import Any

from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.rope_scaling import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEScalingConfig,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)

_OTHER_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {
        "factor", "beta_fast", "beta_slow", "original_max_position_embeddings",
        "attention_factor", "truncate", "mscale", "mscale_all_dim",
    },
}  # fmt: skip
# Positions of images; those of text are all alike.
_INERT = {"mrope_section", "mrope_interleaved"}


def read_rope(
    parameters: dict[str, Any], max_position_embeddings: int, problems: list[str]
) -> RoPEConfig | None:
    """What ``rope_parameters`` of one type of layer mean; None is no RoPE.

    :param parameters: ``rope_theta`` included.
    :param max_position_embeddings: the old context, where a scaling names none.
    :param problems: gets a line for each value without a counterpart.
    """
    parameters = {k: v for k, v in parameters.items() if v is not None and k not in _INERT}
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta", None)
    partial = parameters.pop("partial_rotary_factor", 1.0)
    if kind not in _OTHER_KEYS:
        problems.append(f"rope_type={kind!r} (there are {', '.join(_OTHER_KEYS)})")
        return None
    if kind == "default":
        parameters.pop("factor", None)  # without a type it has no effect
    unknown = sorted(parameters.keys() - _OTHER_KEYS[kind])
    problems += [f"{name}={parameters[name]!r} in rope_parameters of {kind}" for name in unknown]
    if theta is None:
        return None
    old = parameters.pop("original_max_position_embeddings", max_position_embeddings)
    try:
        scaling = _read_scaling(kind, parameters, old, problems)
    except KeyError as error:
        problems.append(f"rope_parameters of {kind} lack {error.args[0]!r}")
        return None
    return RoPEConfig(theta=theta, scaling=scaling, partial_rotary_factor=partial)


def _read_scaling(
    kind: str, p: dict[str, Any], old_context_len: int, problems: list[str]
) -> RoPEScalingConfig | None:
    if kind == "linear":
        return PIRoPEScalingConfig(factor=p["factor"])
    if kind == "llama3":
        return StepwiseRoPEScalingConfig(
            factor=p["factor"],
            low_freq_proportion=1 - 1 / p["low_freq_factor"],
            high_freq_proportion=1 / p["high_freq_factor"],
            old_context_len=old_context_len,
        )
    if kind == "yarn":
        scaling = YaRNRoPEScalingConfig(
            factor=p["factor"],
            beta_fast=p.get("beta_fast", 32),
            beta_slow=p.get("beta_slow", 1),
            old_context_len=old_context_len,
        )
        ours = scaling.attention_rescale_factor
        if not math.isclose(p.get("attention_factor", ours), ours, rel_tol=1e-6):
            problems.append(f"YaRN's attention_factor={p['attention_factor']} (it is {ours:.6g})")
        if not p.get("truncate", True):
            problems.append("YaRN's truncate=False (the range of dimensions is rounded)")
        if p.get("mscale") and p.get("mscale_all_dim") and "attention_factor" not in p:
            problems.append(f"YaRN's mscale={p['mscale']}, mscale_all_dim={p['mscale_all_dim']}")
        return scaling
    return None


def write_rope(rope: RoPEConfig) -> dict[str, Any]:
    """The inverse of :func:`read_rope`; a rescale factor of its own has no counterpart there."""
    theta, scaling = rope.theta, rope.scaling
    kind: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, ABFRoPEScalingConfig):
        theta = scaling.new_theta
    elif isinstance(scaling, PIRoPEScalingConfig):
        kind = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, StepwiseRoPEScalingConfig):
        kind = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": 1 / (1 - scaling.low_freq_proportion),
            "high_freq_factor": 1 / scaling.high_freq_proportion,
            "original_max_position_embeddings": scaling.old_context_len,
        }
    elif isinstance(scaling, YaRNRoPEScalingConfig):
        kind = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.old_context_len,
            "attention_factor": scaling.attention_rescale_factor,
        }
    partial = rope.partial_rotary_factor
    return {
        **kind,
        "rope_theta": theta,
        **({} if partial == 1 else {"partial_rotary_factor": partial}),
    }
