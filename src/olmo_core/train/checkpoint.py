"""Checkpoints that are whole or absent.

A run's folder holds ``step-00000200/`` with ``model.safetensors``, ``training.safetensors``
(optimizer and random generators) and ``state.json`` (step, configuration, the digests of both
files, and its own). A checkpoint is written into a hidden folder, synced to the disk and renamed,
and renamed again before it is removed: whenever the process dies and whoever reads beside it, each
``step-*`` folder is complete. The last two are kept, so that a file damaged later costs the steps
between them, not the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmo_core.train.disk import digest, hide, remove_folder, sync, sync_folder
from olmo_core.train.errors import CheckpointError, TrainingError

FORMAT = 2
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk whose files are as they were written."""

    folder: Path
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        """:raises CheckpointError: if a weight is not finite."""
        return self._load(MODEL)

    def training(self) -> dict[str, Tensor]:
        """:raises CheckpointError: if the optimizer's state is not finite."""
        return self._load(TRAINING)

    def _load(self, name: str) -> dict[str, Tensor]:
        tensors = load_file(self.folder / name)
        if wrong := not_finite(tensors):
            raise CheckpointError(f"{self.folder} can't be used: {wrong}")
        return tensors


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
    target = run / _name(step)
    hidden = run / f".writing-{target.name}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        files = {}
        for name, tensors in ((MODEL, model), (TRAINING, training)):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, hidden / name)
            sync(hidden / name)
            files[name] = digest(hidden / name)
        state = {"format": FORMAT, "step": step, "config": config, "extra": extra or {}}
        (hidden / STATE).write_text(_signed(state | {"files": files}), encoding="utf-8")
        for name in files:
            # safetensors makes files that their owner alone can read, whatever the umask says.
            shutil.copymode(hidden / STATE, hidden / name)
        sync(hidden / STATE)
        sync_folder(hidden)
        if target.exists():
            hide(target)  # left by a run that went further than the checkpoint it resumed from
        os.rename(hidden, target)
        sync_folder(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise CheckpointError(_cannot_write(run, step, error)) from error
    _remove_all_but(run, keep)
    return target


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


def _find(path: Path, files: tuple[str, ...]) -> tuple[Checkpoint, list[str]]:
    while True:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}: give a folder that `olmo-core train` wrote")
        folders = [path] if (path / STATE).is_file() else checkpoint_folders(path)[::-1]
        # A second look: the first may have seen one that has gone since, and missed its successor.
        folders = folders or checkpoint_folders(path)[::-1]
        if not folders:
            raise CheckpointError(f"{path} holds no checkpoint (no folder named step-*)")
        problems: list[str] = []
        for folder in folders:
            try:
                return _verify(folder, files), problems
            except (OSError, ValueError, KeyError, RecursionError) as error:
                if not folder.exists():
                    break  # a run that goes on beside this process has removed it: look again
                problems.append(f"{folder.name} is damaged: {_reason(error)}")
        else:
            raise CheckpointError(f"{path} holds no usable checkpoint. " + ". ".join(problems))


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


def checkpoint_folders(run: Path) -> list[Path]:
    """Oldest first."""
    steps = {folder: _step(folder) for folder in run.glob("step-*") if folder.is_dir()}
    return sorted((f for f in steps if steps[f] is not None), key=lambda f: steps[f] or 0)


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor holds a value that is not finite; empty if none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            wrong = tensor.numel() - int(finite.sum())
            return f"{wrong:,} of {tensor.numel():,} values of {name} are not finite"
    return ""


def retire_newer(run: Path, step: int) -> None:
    """Set aside checkpoints after ``step``: they were found damaged, not to be found again."""
    for folder in checkpoint_folders(run):
        if (_step(folder) or 0) > step:
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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(folder: Path) -> int | None:
    found = re.fullmatch(r"step-(\d{8,})", folder.name)
    return None if found is None else int(found[1])


def _verify(folder: Path, files: tuple[str, ...]) -> Checkpoint:
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is a {type(state).__name__}, not an object")
    if state["format"] not in (1, FORMAT):
        raise ValueError(f"its format is {state['format']}, this version reads 1 and {FORMAT}")
    if state["format"] == 1:  # its state.json has no digest of its own
        state["files"] = state.pop("sha256")
    elif state.pop("sha256") != _sha256(state):
        raise ValueError(f"{STATE} is not as it was written (its sha256 differs)")
    if _step(folder) not in (state["step"], None):
        raise ValueError(f"it is of step {state['step']}")
    for name in files:
        if digest(folder / name) != state["files"][name]:
            raise ValueError(f"{name} is not as it was written (its sha256 differs)")
    return Checkpoint(folder, state["step"], state["config"], state["extra"])


def _signed(state: dict[str, Any]) -> str:
    return json.dumps(state | {"sha256": _sha256(state)}, indent=1) + "\n"


def _sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _remove_all_but(run: Path, keep: int) -> None:
    leftovers = [*run.glob(".writing-step-*"), *run.glob(".old-step-*")]
    for folder in [*leftovers, *checkpoint_folders(run)[:-keep]]:
        remove_folder(folder)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{STATE} has no {error}"
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    return str(error)


def _cannot_write(run: Path, step: int, error: Exception) -> str:
    message = f"the checkpoint of step {step} could not be written to {run}: {error}."
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in text or "os error 28" in text:
        message += " The disk is full: free some space, then go on with --resume."
    else:
        message += " Mend that, then go on with --resume."
    last = checkpoint_folders(run)
    return message + (f" Last whole checkpoint: {last[-1].name}." if last else "")
