"""Checkpoints that are whole or absent.

A run's folder holds ``step-00000200/`` with ``model.safetensors``, ``training.safetensors``
(optimizer and random generators) and ``state.json`` (step, configuration, and the digest of both
files). A checkpoint is written into a hidden folder, synced to the disk and renamed: whenever the
process dies, each ``step-*`` folder is complete. The last two are kept, so that a file damaged
later costs the steps between them, not the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmo_core.exceptions import OLMoError

FORMAT = 1
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


class CheckpointError(OLMoError):
    """A checkpoint that is missing, damaged, or could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk whose files are as they were written."""

    folder: Path
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        return load_file(self.folder / MODEL)

    def training(self) -> dict[str, Tensor]:
        return load_file(self.folder / TRAINING)


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
    :raises CheckpointError: if the disk refuses; earlier checkpoints are then untouched.
    """
    target = run / f"step-{step:08d}"
    hidden = run / f".writing-step-{step:08d}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        digests = {}
        for name, tensors in ((MODEL, model), (TRAINING, training)):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, hidden / name)
            digests[name] = _sync(hidden / name)
        state = {"format": FORMAT, "step": step, "config": config, "extra": extra or {}}
        (hidden / STATE).write_text(json.dumps({**state, "sha256": digests}, indent=1) + "\n")
        for name in digests:
            # safetensors makes files that their owner alone can read, whatever the umask says.
            shutil.copymode(hidden / STATE, hidden / name)
        _sync(hidden / STATE)
        _sync_folder(hidden)
        if target.exists():
            # Left by a run that went further than the checkpoint it now resumed from.
            os.rename(target, run / f".old-{target.name}")
        os.rename(hidden, target)
        _sync_folder(run)
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
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a folder that `olmo-core train` wrote")
    folders = [path] if (path / STATE).is_file() else checkpoint_folders(path)[::-1]
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint (no folder named step-*)")
    problems: list[str] = []
    for folder in folders:
        try:
            return _verify(folder), problems
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            problems.append(f"{folder.name} is damaged: {_reason(error)}")
    raise CheckpointError(f"{path} holds no usable checkpoint. " + ". ".join(problems))


def checkpoint_folders(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted(f for f in run.glob("step-*") if f.is_dir())


def _verify(folder: Path) -> Checkpoint:
    state = json.loads((folder / STATE).read_text())
    if state["format"] != FORMAT:
        raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
    for name, expected in state["sha256"].items():
        if _digest(folder / name) != expected:
            raise ValueError(f"{name} is not as it was written (its sha256 differs)")
    return Checkpoint(folder, state["step"], state["config"], state["extra"])


def _remove_all_but(run: Path, keep: int) -> None:
    leftovers = [*run.glob(".writing-step-*"), *run.glob(".old-step-*")]
    for folder in [*leftovers, *checkpoint_folders(run)[:-keep]]:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def retire_newer(run: Path, step: int) -> None:
    """Set aside checkpoints after ``step``: they were found damaged, not to be found again."""
    for folder in checkpoint_folders(run):
        if folder.name > f"step-{step:08d}":
            damaged = run / f"damaged-{folder.name}"
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(folder, damaged)
