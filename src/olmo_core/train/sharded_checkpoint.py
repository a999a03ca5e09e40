"""Checkpoints that many ranks write and read together, as whole or absent as those of one process.

A checkpoint's folder holds ``model/`` and ``training/`` with one safetensors file of each rank, and
``state.json`` as ever, with the digests of all files. Any other number of ranks, or one process,
goes on from it. The run's folder lies on a disk that all ranks share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from olmo_core.distributed.together import from_first_rank, gather, together
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.nn.sharded import is_sharded
from olmo_core.train.checkpoint import (
    DAMAGE,
    MODEL,
    SHARDED_FORMAT,
    TRAINING,
    Checkpoint,
    candidates,
    expect_digests,
    none_usable,
    not_finite,
    read_state,
    reason,
)
from olmo_core.train.disk import digest
from olmo_core.train.draft import Draft
from olmo_core.train.errors import TrainingError

__all__ = ["find_checkpoint_together", "save_sharded"]


def save_sharded(
    run: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    config: dict[str, Any],
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step``, then remove all but the last ``keep``.

    Every rank of the default process group calls this, with the same names; what one rank meets,
    all raise.

    :param model: the weights by name; DTensors, or plain tensors that are equal on all ranks.
    :param training: the same of ``optimizer.FIELD.PARAMETER`` and of the generators.
    :returns: its folder.
    :raises TrainingError: if a value is not finite.
    :raises CheckpointError: if the disk refuses; earlier checkpoints are then untouched.
    :raises ValueError: if names, or plain tensors, differ between ranks.
    """
    parts = {MODEL: model, TRAINING: training}
    together(lambda: _expect_finite(step, parts))
    _expect_agreement(parts)
    draft, rank = Draft(run, step), get_rank()
    try:
        from olmo_core.train.shards import write_shards

        from_first_rank(draft.begin)
        for part, tensors in parts.items():
            write_shards(draft.folder / part, tensors)
        written = gather(together(lambda: _written(draft.folder)))
        from_first_rank(lambda: _finish(draft, written, config=config, extra=extra))
    except Exception as error:  # the same on all ranks
        if rank == 0:
            draft.discard()
        raise draft.failure(error) from error
    if rank == 0:
        draft.remove_others_but(keep)
    return draft.target


def find_checkpoint_together(path: Path) -> tuple[Checkpoint, list[str]]:
    """As :func:`~olmo_core.train.checkpoint.find_checkpoint`, by all ranks of the default process
    group: each checks the digests of its share of the files, and all find the same.

    :param path: a run's folder, or one ``step-*`` folder.
    :returns: the checkpoint, and what is wrong with each newer one that was passed over.
    :raises CheckpointError: if there is none; on every rank.
    """
    problems: list[str] = []
    for folder in from_first_rank(lambda: candidates(path)):
        try:
            return together(lambda: _verify_share(folder)), problems  # noqa: B023
        except DAMAGE as error:
            problems.append(f"{folder.name} is damaged: {reason(error)}")
    raise none_usable(path, problems)


def _verify_share(folder: Path) -> Checkpoint:
    checkpoint, digests = read_state(folder)
    share = sorted(digests)[get_rank() :: get_world_size()]
    expect_digests(folder, {name: digests[name] for name in share})
    return checkpoint


def _expect_finite(step: int, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    for tensors in parts.values():
        if wrong := not_finite(tensors):
            where = f" on rank {get_rank()}" if get_world_size() > 1 else ""
            raise TrainingError(f"step {step}: {wrong}{where}: training diverged")


def _expect_agreement(parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Of the names, and of the values of plain tensors, of which one rank's are written."""
    mine = {
        f"{name} ({part})": "DTensor" if is_sharded(tensor) else _digest(tensor)
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    first, *others = gather(mine)
    if empty := [part for part, tensors in parts.items() if not tensors]:
        raise ValueError(f"a checkpoint needs tensors in {' and in '.join(empty)}, and got none")
    for rank, other in enumerate(others, 1):
        if wrong := sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n)):
            raise ValueError(
                f"{wrong[0]} differs between ranks 0 and {rank}: all ranks must save the same "
                "names, and what is not a DTensor must be the same on all"
            )


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(save({"": tensor.detach().cpu().contiguous()})).hexdigest()


def _written(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and size of each file that this rank has written, by its path below ``folder``."""
    from olmo_core.train.shards import written_by

    files = [path for part in (MODEL, TRAINING) for path in written_by(get_rank(), folder / part)]
    return {f"{p.parent.name}/{p.name}": (digest(p), p.stat().st_size) for p in files}


def _finish(draft: Draft, written: list[dict[str, tuple[str, int]]], **state: Any) -> None:
    """On the first rank, once all have written."""
    digests = {}
    for rank, files in enumerate(written):
        for name, (sha256, size) in files.items():
            path = draft.folder / name
            if not path.exists() or path.stat().st_size != size:
                raise OSError(
                    f"rank 0 does not see {name}, which rank {rank} has written: the run's folder "
                    "must lie on a disk that all ranks share"
                )
            digests[name] = sha256
    draft.write_state(SHARDED_FORMAT, digests, **state)
    draft.publish()
