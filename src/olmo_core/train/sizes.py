"""Whether a run can fit into memory at all."""

from __future__ import annotations

import torch

from olmo_core.memory import expect_room
from olmo_core.train.config import TrainConfig
from olmo_core.train.parallel.degrees import Degrees

__all__ = ["checkpoint_bytes", "expect_it_fits"]


def expect_it_fits(config: TrainConfig, device: torch.device, degrees: Degrees) -> None:
    """Lower bounds of what one rank holds at once, against the memory that there is.

    Weights, gradients and both moments of AdamW; a step's tokens, the input of each block and the
    logits.

    :raises OLMoConfigurationError: if they exceed it.
    """
    model, data = config.model, config.data
    item = model.dtype.as_pt().itemsize
    sizes = f"the model's sizes (d_model={model.d_model}, n_layers={model.n_layers}, ...)"
    for n_params in (lambda: model.vocab_size * model.d_model, model.num_params):
        expect_room(sizes, 4 * n_params() * item // (degrees.fsdp * degrees.tp), device)
    tokens = data.batch_size * data.sequence_length // degrees.fsdp
    logits = min(tokens, model.loss_chunk_size or tokens) * model.vocab_size
    batch = f"data.batch_size={data.batch_size} and data.sequence_length={data.sequence_length}"
    expect_room(batch, tokens * (16 + 2 * model.d_model * model.n_layers) + 2 * logits, device)


def checkpoint_bytes(config: TrainConfig) -> int:
    """Of the weights and both moments of AdamW."""
    return 3 * config.model.num_params() * config.model.dtype.as_pt().itemsize
