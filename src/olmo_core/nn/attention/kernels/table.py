"""A table of implementations of one op, best first: which serves a call, and why.

An op asks its table with the inputs of the call; ``doctor`` and people print what it says. Whoever
asks for a row by name gets what stands against it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

F = TypeVar("F")


@dataclass(frozen=True)
class Row(Generic[F]):
    """One implementation."""

    name: str
    run: F
    """What it runs: what this is depends on the op."""
    why: str
    """Why it is chosen where it can serve."""
    refusal: Callable[..., str | None] = lambda *_: None
    """Why it can't serve given inputs, or None if it can. It may probe, and never raises."""


@dataclass(frozen=True)
class Choice(Generic[F]):
    """The row that serves a call."""

    row: Row[F]
    reason: str
    """Why this one, and why none of the better ones."""

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def run(self) -> F:
        return self.row.run

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose(rows: Sequence[Row[F]], *inputs: Any, **asked: Any) -> Choice[F]:
    """The first of ``rows`` that can serve ``inputs``. The last one serves everything."""
    refusals = []
    for row in rows[:-1]:
        refused = row.refusal(*inputs, **asked)
        if refused is None:
            break
        refusals.append(f"not {row.name}, since {refused}")
    else:
        row = rows[-1]
    return Choice(row, "; ".join([row.why, *refusals]))
