"""What must not change between a checkpoint and the run that goes on from it.

The losses then are those of a run that was never interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.checkpoint import Checkpoint
from olmo_core.train.config import TrainConfig
from olmo_core.train.errors import CheckpointError

__all__ = ["TEXTS", "expect_same_settings", "expect_same_texts"]

# Batch number n depends on these, and on the text.
_OF_THE_BATCHES = (
    "seed",
    "data.batch_size",
    "data.sequence_length",
    "data.max_doc_len",
    "data.held_out",
)
TEXTS = {"data_sha256": "the text to train on", "held_out_sha256": "the held-out text"}
"""Of what a checkpoint keeps the digests."""


def expect_same_settings(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """:raises OLMoConfigurationError: if ``config`` makes other batches, or fewer steps."""
    saved = TrainConfig.from_dict(checkpoint.config)
    pairs = {name: (_value(saved, name), _value(config, name)) for name in _OF_THE_BATCHES}
    changed = [f"{name}={now} (was {was})" for name, (was, now) in pairs.items() if was != now]
    if changed:
        raise OLMoConfigurationError(
            f"{checkpoint.folder} was trained on other batches and can't go on with "
            f"{', '.join(changed)}: leave that out, or start a new run in another folder"
        )
    if checkpoint.step > config.steps:
        raise OLMoConfigurationError(
            f"{checkpoint.folder} has nothing to go on with: it is beyond steps={config.steps}. "
            "Ask for more steps, or start a new run in another folder"
        )


def expect_same_texts(checkpoint: Checkpoint, digests: Mapping[str, str], path: str | None) -> None:
    """:raises CheckpointError: if what is trained on, or what is held out, has changed."""
    changed = [TEXTS[key] for key in TEXTS if checkpoint.extra.get(key) != digests[key]]
    if changed:
        raise CheckpointError(
            f"{checkpoint.folder} was trained on other text than {path or 'the embedded corpus'} "
            f"holds now, or with another tokenizer ({' and '.join(changed)} changed): put the data "
            "back, or start a new run in another folder"
        )


def _value(config: TrainConfig, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)
