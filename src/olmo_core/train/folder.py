"""What a run writes into its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

LOCK = ".lock"
PATTERNS = (
    "step-*",
    "damaged-step-*",
    ".writing-step-*",
    ".old-step-*",
    "metrics.jsonl",
    ".metrics.jsonl",
    "loss.png",
    LOCK,
)


def run_files(run: Path) -> list[Path]:
    """The files and folders in ``run`` that a run has written."""
    return [path for pattern in PATTERNS for path in run.glob(pattern)]


def remove_run(run: Path) -> None:
    """Remove them, the lock apart: it may be held."""
    for path in run_files(run):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
