"""A checkpoint that is being written: in a hidden folder until it is whole, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo_core.train.disk import hide, remove_folder, sync, sync_folder
from olmo_core.train.errors import CheckpointError

__all__ = ["STATE", "Draft", "checkpoint_folders", "state_digest", "step_of"]

STATE = "state.json"


class Draft:
    """The checkpoint of ``step`` in a run's folder, before anybody can find it."""

    def __init__(self, run: Path, step: int) -> None:
        self.run = run
        self.step = step
        self.target = run / f"step-{step:08d}"
        self.folder = run / f".writing-{self.target.name}"

    def begin(self) -> None:
        """Make the folder, without what an interrupted process may have left in it."""
        self.run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def write_state(
        self,
        version: int,
        files: Mapping[str, str],
        *,
        config: dict[str, Any],
        extra: dict[str, Any] | None,
    ) -> None:
        """:param files: the digests of all other files, by their path below the folder."""
        state = {"format": version, "step": self.step, "config": config, "extra": extra or {}}
        state |= {"files": dict(files)}
        text = json.dumps(state | {"sha256": state_digest(state)}, indent=1) + "\n"
        (self.folder / STATE).write_text(text, encoding="utf-8")
        sync(self.folder / STATE)

    def publish(self) -> None:
        """Give the folder, whose files are synced, its name."""
        for folder in (*(path for path in self.folder.iterdir() if path.is_dir()), self.folder):
            sync_folder(folder)
        if self.target.exists():
            hide(self.target)  # left by a run that went further than the checkpoint it resumed from
        os.rename(self.folder, self.target)
        sync_folder(self.run)

    def remove_others_but(self, keep: int) -> None:
        """Remove all but the last ``keep`` checkpoints, and what interrupted processes left."""
        leftovers = [*self.run.glob(".writing-step-*"), *self.run.glob(".old-step-*")]
        for folder in [*leftovers, *checkpoint_folders(self.run)[:-keep]]:
            remove_folder(folder)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def failure(self, error: Exception) -> CheckpointError:
        """What to raise where the disk has refused."""
        text = str(error)
        message = f"the checkpoint of step {self.step} could not be written to {self.run}: {text}."
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in text or "os error 28" in text:
            message += " The disk is full: free some space, then go on with --resume."
        else:
            message += " Mend that, then go on with --resume."
        last = checkpoint_folders(self.run)
        return CheckpointError(
            message + (f" Last whole checkpoint: {last[-1].name}." if last else "")
        )


def checkpoint_folders(run: Path) -> list[Path]:
    """Oldest first."""
    steps = {folder: step_of(folder) for folder in run.glob("step-*") if folder.is_dir()}
    return sorted((f for f in steps if steps[f] is not None), key=lambda f: steps[f] or 0)


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; ``None`` if it is no checkpoint's name."""
    found = re.fullmatch(r"step-(\d{8,})", folder.name)
    return None if found is None else int(found[1])


def state_digest(state: Mapping[str, Any]) -> str:
    """The SHA-256 that ``state.json`` says of the rest of itself."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
