"""What the reporting commands share: a console of at most 100 columns, and a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

__all__ = ["WIDTH", "console", "number", "progress", "write_json"]

WIDTH = 100


def console() -> Console:
    """Standard output; a file or a pipe gets the full width."""
    terminal = Console(highlight=False)
    if terminal.is_terminal and terminal.width <= WIDTH:
        return terminal
    return Console(width=WIDTH, highlight=False)


def progress() -> Progress:
    """A bar on standard error, gone at the end, and absent where nobody watches."""
    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description:44}"), BarColumn(30), MofNCompleteColumn())
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def number(x: float, digits: int = 1) -> str:
    """``digits`` after the point, and an exponent without padding: 1.6e-2."""
    if x == 0:
        return "0"
    mantissa, _, exponent = f"{x:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As a text that people can read too."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
