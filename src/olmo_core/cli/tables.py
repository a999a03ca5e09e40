"""What the reporting commands share: a console of at most 100 columns, and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from olmo_core.exceptions import OLMoConfigurationError, OLMoError

__all__ = ["WIDTH", "console", "named", "number", "path_of", "progress", "write_json"]

WIDTH = 100


def console(file: IO[str] | None = None) -> Console:
    """Standard output, or ``file``; a file or a pipe gets the full width.

    Strings are printed as they are: a name may hold what looks like markup. Styles are given as
    arguments, or as :class:`rich.text.Text`.
    """
    plain: dict[str, Any] = {"file": file, "highlight": False, "markup": False, "emoji": False}
    terminal = Console(**plain)
    if terminal.is_terminal and terminal.width <= WIDTH:
        return terminal
    return Console(width=WIDTH, **plain)


def path_of(option: str) -> Callable[[str], Path]:
    """The parser of an option that takes a path: typer would take none for the current folder."""

    def path(text: str) -> Path:
        if not text.strip():
            raise OLMoConfigurationError(f"{option}: the path is empty")
        return Path(text)

    return path


def progress() -> Progress:
    """A bar on standard error, gone at the end, and absent where nobody watches."""
    terminal = Console(stderr=True, markup=False, emoji=False)
    columns = (
        TextColumn("{task.description:44}", markup=False),
        BarColumn(30),
        MofNCompleteColumn(),
    )
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def number(x: float, digits: int = 1) -> str:
    """``digits`` after the point, and an exponent without padding: 1.6e-2."""
    if x == 0:
        return "0"
    mantissa, _, exponent = f"{x:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As a text that people can read too.

    :raises OLMoError: if the disk refuses.
    """
    with named(path):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An error while ``path`` is written says so: a disk that is full names no file."""
    try:
        yield
    except OSError as error:
        raise OLMoError(f"{path} can't be written: {error.strerror or error}") from error
