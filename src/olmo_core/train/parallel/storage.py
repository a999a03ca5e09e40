"""What a run saves and goes on from: model, optimizer, and what its steps draw from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from olmo_core.train.checkpoint import Checkpoint, find_checkpoint, set_random_state
from olmo_core.train.folder import RunFolder
from olmo_core.train.optimizer import optimizer_state, start_state
from olmo_core.train.parallel.ranks import Ranks

__all__ = ["find", "restore", "save"]


def save(
    folder: RunFolder,
    ranks: Ranks,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    device: torch.device,
    **content: Any,
) -> Path:
    """Write a checkpoint: each rank what it holds.

    :param content: as in :func:`.save_checkpoint`.
    :raises OLMoError: on all ranks, if a value is not finite or a disk refuses.
    """
    content["model"] = model.state_dict()
    content["training"] = optimizer_state(model, optimizer) | ranks.random_state(seed, device)
    if ranks.size == 1:
        return folder.save(step, **content)
    from olmo_core.train.sharded_checkpoint import save_sharded

    return save_sharded(folder.path, step, **content)


def find(path: Path, ranks: Ranks) -> tuple[Checkpoint, list[str]]:
    """As :func:`.find_checkpoint`, the same on all ranks."""
    if ranks.size == 1:
        return find_checkpoint(path)
    from olmo_core.train.sharded_checkpoint import find_checkpoint_together

    with ranks.together():
        return find_checkpoint_together(path)


def restore(
    checkpoint: Checkpoint,
    ranks: Ranks,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    device: torch.device,
) -> None:
    """Fill model and optimizer from a checkpoint, whatever the number of ranks that wrote it.

    One process draws on from where one process was; from a checkpoint of several ranks it starts
    its generators anew.

    :raises CheckpointError: on all ranks, if it is of another model or not finite.
    """
    start_state(model, optimizer)
    generators = ranks.random_state(seed, device)
    training = optimizer_state(model, optimizer) | generators
    with ranks.together():
        checkpoint.load_into(model.state_dict(), training)
    if ranks.size == 1:
        set_random_state(training, device)
