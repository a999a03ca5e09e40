"""Configurations and weights that an earlier version wrote still load and mean the same.

``recorded/`` was written at version 0.1.0 by ``as_config_dict`` and ``state_dict``. It is never
rewritten: a difference is a break of users' checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from olmo_core.nn.transformer import TransformerConfig
from olmo_core.train.config import TrainConfig

RECORDED = Path(__file__).parent / "recorded"
CONFIGS = json.loads((RECORDED / "configs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONFIGS["models"])
def test_a_recorded_model_computes_the_same(name: str) -> None:
    tensors = load_file(RECORDED / "weights.safetensors")
    weights = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(name)}
    model = TransformerConfig.from_dict(CONFIGS["models"][name]).build()
    model.load_state_dict(weights, strict=True)
    logits = model(torch.arange(14).view(2, 7) * 5 % 23)
    torch.testing.assert_close(logits, tensors[f"logits/{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS["presets"])
def test_a_recorded_run_still_says_what_it_said(name: str) -> None:
    written = TrainConfig.from_dict(CONFIGS["presets"][name]).as_config_dict()
    assert_contains(written, CONFIGS["presets"][name])


def assert_contains(new: Any, old: Any) -> None:
    """Fields may have been added since, none lost or changed."""
    if isinstance(old, dict):
        for key, value in old.items():
            assert_contains(new[key], value)
    elif isinstance(old, list):
        assert len(new) == len(old)
        for a, b in zip(new, old, strict=True):
            assert_contains(a, b)
    else:
        assert new == old
