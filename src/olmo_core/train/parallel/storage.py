"""What a run saves and goes on from: model, optimizer, and one process's random generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olmo_core.distributed.utils import get_full_tensor
from olmo_core.nn.init import copy_into
from olmo_core.train.checkpoint import Checkpoint, random_state, set_random_state
from olmo_core.train.errors import CheckpointError
from olmo_core.train.folder import RunFolder
from olmo_core.train.optimizer import optimizer_state, start_state
from olmo_core.train.parallel.ranks import Ranks

__all__ = ["restore", "save"]


def save(
    folder: RunFolder,
    ranks: Ranks,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    config: dict[str, Any],
    extra: dict[str, Any],
) -> Path:
    """Write a checkpoint, together.

    :raises OLMoError: on all ranks, if a value is not finite or a disk refuses.
    """
    weights, training = model.state_dict(), optimizer_state(model, optimizer)
    content: dict[str, Any] = {"config": config, "extra": extra}
    if ranks.size == 1:
        training |= random_state(device)
        return folder.save(step, model=weights, training=training, **content)
    whole = [{k: get_full_tensor(v) for k, v in part.items()} for part in (weights, training)]
    return ranks.on_first(folder.save, step, model=whole[0], training=whole[1], **content)


def restore(
    checkpoint: Checkpoint,
    ranks: Ranks,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Fill model and optimizer from a checkpoint, whatever the number of ranks that wrote it, and
    set the generators of one process that goes on from one.

    :raises CheckpointError: on all ranks, if it is of another model or not finite.
    """
    saved = set(checkpoint.training())
    start_state(model, optimizer, saved)
    training = optimizer_state(model, optimizer)
    generators = random_state(device) if ranks.size == 1 else {}
    training |= {name: value for name, value in generators.items() if name in saved}
    with ranks.together():
        _load_into(checkpoint, model.state_dict(), training)
    if "rng.cpu" in training:
        set_random_state(training, device)


def _load_into(
    checkpoint: Checkpoint, model: dict[str, Tensor], training: dict[str, Tensor]
) -> None:
    for wanted, found in ((model, checkpoint.model()), (training, checkpoint.training())):
        for name, tensor in wanted.items():
            if name not in found or found[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{checkpoint.folder} does not fit the model: {name}. Leave out overrides of "
                    "model.*, or start a new run in another folder"
                )
            copy_into(tensor, found[name])
