"""Checkpoints that are whole or absent.

A run's folder holds ``step-00000200/`` with ``model.safetensors``, ``training.safetensors``
(optimizer and random generators) and ``state.json`` (step, configuration, the digests of both
files, and its own). Where several ranks have written it
(:func:`~olmo_core.train.sharded_checkpoint.save_sharded`), the folders ``model`` and ``training``
hold a file of each rank instead; both kinds are read alike.

A checkpoint is written into a hidden folder, synced to the disk and renamed, and renamed again
before it is removed: whenever the process dies and whoever reads beside it, each ``step-*`` folder
is complete. The last two are kept, so that a file damaged later costs the steps between them, not
the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmo_core.distributed.utils import is_distributed, local_part
from olmo_core.train.disk import digest, sync
from olmo_core.train.draft import STATE, Draft, checkpoint_folders, state_digest, step_of
from olmo_core.train.errors import CheckpointError, TrainingError

__all__ = [
    "MODEL",
    "SHARDED_FORMAT",
    "TRAINING",
    "Checkpoint",
    "CheckpointError",
    "checkpoint_folders",
    "find_checkpoint",
    "find_weights",
    "load_model",
    "not_finite",
    "random_state",
    "retire_newer",
    "save_checkpoint",
    "set_random_state",
]

FORMAT, SHARDED_FORMAT = 2, 3
MODEL, TRAINING = "model", "training"
DAMAGE = (OSError, ValueError, KeyError, RecursionError)
"""What reading a damaged checkpoint raises."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk whose files are as they were written."""

    folder: Path
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]
    files: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Those that hold tensors, by their path below the folder."""

    def model(self) -> dict[str, Tensor]:
        """The whole weights, in this process alone.

        :raises CheckpointError: if a weight is not finite.
        """
        return self._load(MODEL)

    def training(self) -> dict[str, Tensor]:
        """The whole state of the optimizer and the generators, in this process alone.

        :raises CheckpointError: if the optimizer's state is not finite.
        """
        return self._load(TRAINING)

    def load_into(self, model: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, whatever number of ranks has written them.

        Where there is a process group, every rank of the default one calls this: each reads what
        its parts of DTensors need, and plain tensors whole. Nothing is filled if anything does not
        fit.

        :param model: the weights by name, just those that were saved.
        :param training: ``optimizer.FIELD.PARAMETER``, just those that were saved; where the
            checkpoint has none, being from before the first step, they stay as they are. Others
            (``rng.cuda`` for example) are filled if they were saved.
        :raises CheckpointError: if names, shapes or dtypes differ, or if a value is not finite; on
            every rank, if it is so on any.
        """
        wanted = {MODEL: model, TRAINING: training}
        if not is_distributed():
            saved = {part: self._load(part) for part in wanted}
            chosen = {part: self._chosen(part, saved[part], wanted[part]) for part in wanted}
            for part, tensors in chosen.items():
                for name, tensor in tensors.items():
                    tensor.detach().copy_(saved[part][name])
            return
        from olmo_core.distributed.together import together
        from olmo_core.train.shards import Shards

        shards = together(lambda: {part: Shards(self._paths(part)) for part in wanted})
        chosen = together(
            lambda: {p: self._chosen(p, shards[p].tensors(), wanted[p]) for p in wanted}
        )
        for part, tensors in chosen.items():
            shards[part].read_into(tensors)
        for tensors in chosen.values():
            together(lambda: self._expect_finite(tensors))  # noqa: B023

    def _paths(self, part: str) -> list[Path]:
        return [self.folder / name for name in self.files if _part(name) == part]

    def _load(self, part: str) -> dict[str, Tensor]:
        paths = self._paths(part)
        if paths == [self.folder / _file(part)]:
            tensors = load_file(paths[0])
        else:
            from olmo_core.train.shards import Shards

            tensors = Shards(paths).read()
        self._expect_finite(tensors)
        return tensors

    def _expect_finite(self, tensors: Mapping[str, Tensor]) -> None:
        if wrong := not_finite(tensors):
            raise CheckpointError(f"{self.folder} can't be used: {wrong}")

    def _chosen(
        self, part: str, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Those of ``wanted`` to be filled, which fit; ``saved`` may be on the meta device."""

        def required(names: Mapping[str, Tensor]) -> set[str]:
            return {n for n in names if part == MODEL or n.startswith("optimizer.")}

        has, asked = required(saved), required(wanted)
        if part == TRAINING and not has:
            asked = set()
        problems = [f"it has no {name}" for name in sorted(asked - has)]
        problems += [f"nothing takes its {name}" for name in sorted(has - asked)]
        chosen = {n: wanted[n] for n in wanted if n in saved}
        for name, to in chosen.items():
            one, other = ((tuple(x.shape), x.dtype) for x in (saved[name], to))
            if one != other:
                problems.append(f"its {name} is {one[0]} {one[1]}, not {other[0]} {other[1]}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.folder} does not fit the model: {', '.join(problems[:5])}{more}. "
                "Leave out overrides of model.*, or start a new run in another folder"
            )
        return chosen


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    training: dict[str, Tensor],
    config: dict[str, Any],
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step``, then remove all but the last ``keep``.

    :returns: its folder.
    :raises TrainingError: if a tensor is not finite.
    :raises CheckpointError: if the disk refuses; earlier checkpoints are then untouched.
    """
    for tensors in (model, training):
        if wrong := not_finite(tensors):
            raise TrainingError(f"step {step}: {wrong}: training diverged")
    draft = Draft(run, step)
    try:
        draft.begin()
        files = {}
        for part, tensors in ((MODEL, model), (TRAINING, training)):
            path = draft.folder / _file(part)
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
            sync(path)
            files[path.name] = digest(path)
        draft.write_state(FORMAT, files, config=config, extra=extra)
        for name in files:
            # safetensors makes files that their owner alone can read, whatever the umask says.
            shutil.copymode(draft.folder / STATE, draft.folder / name)
        draft.publish()
    except (OSError, SafetensorError) as error:
        draft.discard()
        raise draft.failure(error) from error
    draft.remove_others_but(keep)
    return draft.target


def find_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint.

    :param path: a run's folder, or one ``step-*`` folder.
    :returns: the checkpoint, and what is wrong with each newer one that was passed over.
    :raises CheckpointError: if there is none.
    """
    return _find(path, (MODEL, TRAINING))


def find_weights(path: Path) -> tuple[Checkpoint, list[str]]:
    """As :func:`find_checkpoint`, of the weights alone: the optimizer's file may be missing."""
    return _find(path, (MODEL,))


def _find(path: Path, parts: tuple[str, ...]) -> tuple[Checkpoint, list[str]]:
    while True:
        problems: list[str] = []
        for folder in candidates(path):
            try:
                return _verify(folder, parts), problems
            except DAMAGE as error:
                if not folder.exists():
                    break  # a run that goes on beside this process has removed it: look again
                problems.append(f"{folder.name} is damaged: {reason(error)}")
        else:
            raise none_usable(path, problems)


def candidates(path: Path) -> list[Path]:
    """The folders to look at, newest first; see :func:`find_checkpoint`."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: give a folder that `olmo-core train` wrote")
    folders = [path] if (path / STATE).is_file() else checkpoint_folders(path)[::-1]
    # A second look: the first may have seen one that has gone since, and missed its successor.
    folders = folders or checkpoint_folders(path)[::-1]
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint (no folder named step-*)")
    return folders


def none_usable(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(f"{path} holds no usable checkpoint. " + ". ".join(problems))


def load_model(path: Path) -> tuple[Checkpoint, dict[str, Tensor], list[str]]:
    """As :func:`find_weights`, with the weights, also beside a run that goes on.

    :raises CheckpointError: as there, and for weights that are not finite.
    """
    while True:
        checkpoint, problems = find_weights(path)
        try:
            return checkpoint, checkpoint.model(), problems
        except OSError:
            if checkpoint.folder.exists():
                raise


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor, or this rank's part of a DTensor, holds a value that is not finite; empty if
    none does."""
    for name, tensor in tensors.items():
        part = local_part(tensor)
        if part.is_floating_point() and not (finite := part.isfinite()).all():
            wrong = part.numel() - int(finite.sum())
            return f"{wrong:,} of {part.numel():,} values of {name} are not finite"
    return ""


def retire_newer(run: Path, step: int) -> None:
    """Set aside checkpoints after ``step``: they were found damaged, not to be found again."""
    for folder in checkpoint_folders(run):
        if (step_of(folder) or 0) > step:
            damaged = run / f"damaged-{folder.name}"
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(folder, damaged)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that training draws from: the CPU's, and the device's."""
    state = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)


def _verify(folder: Path, parts: tuple[str, ...]) -> Checkpoint:
    checkpoint, digests = read_state(folder)
    for part in parts:
        if not any(_part(name) == part for name in digests):
            raise ValueError(f"{STATE} lists no file of {part}")
    expect_digests(folder, {n: d for n, d in digests.items() if _part(n) in parts})
    return checkpoint


def read_state(folder: Path) -> tuple[Checkpoint, dict[str, str]]:
    """What ``state.json`` says, and the digests of the other files."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is a {type(state).__name__}, not an object")
    if state["format"] not in (1, FORMAT, SHARDED_FORMAT):
        raise ValueError(
            f"its format is {state['format']}, this version reads 1, {FORMAT} and {SHARDED_FORMAT}"
        )
    if state["format"] == 1:  # its state.json has no digest of its own
        state["files"] = state.pop("sha256")
    elif state.pop("sha256") != state_digest(state):
        raise ValueError(f"{STATE} is not as it was written (its sha256 differs)")
    if step_of(folder) not in (state["step"], None):
        raise ValueError(f"it is of step {state['step']}")
    digests: dict[str, str] = state["files"]
    checkpoint = Checkpoint(folder, state["step"], state["config"], state["extra"], tuple(digests))
    return checkpoint, digests


def expect_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """:raises ValueError: for a file that is not as it was written."""
    names: Sequence[str] = list(digests)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(digest, [folder / name for name in names])
        for name, sha256 in zip(names, found, strict=True):
            if sha256 != digests[name]:
                raise ValueError(f"{name} is not as it was written (its sha256 differs)")


def _part(file: str) -> str:
    """``model`` or ``training``, of the path of a file below the folder."""
    return file.partition("/")[0].removesuffix(".safetensors")


def _file(part: str) -> str:
    return f"{part}.safetensors"


def reason(error: Exception) -> str:
    """Of :data:`DAMAGE`, in words."""
    if isinstance(error, KeyError):
        return f"{STATE} has no {error}"
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    return str(error)
