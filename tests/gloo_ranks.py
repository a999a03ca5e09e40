"""Runs functions on n gloo ranks: processes that are started once and serve all tests of a session.

A case is a function ``f(rank, n, *args)`` at the top level of a test file, run on every rank at
once. What the ranks return comes back as a list; an error of any rank is raised here, with the
errors of the others.

    def total(rank, n, x): ...
    def test_total(): assert on_ranks(2, total, 3) == [6, 6]

The processes of a rank count share one default process group. After a timeout, or the death of a
rank, they are replaced by new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from olmo_core.diagnostics.ranks import Failure, Ranks

__all__ = ["RankError", "errors_on_ranks", "on_ranks", "pool"]

_RANKS: dict[int, Ranks] = {}


class RankError(AssertionError):
    """At least one rank raised, died or did not answer: the message has each rank's traceback."""


def on_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What ``function(rank, n, *args)`` returns on each of ``n`` ranks.

    :raises RankError: If a rank raises, dies, or does not answer in time.
    """
    answers = pool(n).run(function, *args, timeout=timeout)
    failures = {rank: a for rank, a in enumerate(answers) if isinstance(a, Failure)}
    if failures:
        each = (
            f"--- rank {rank} of {n}\n{f.traceback or f.message}" for rank, f in failures.items()
        )
        raise RankError("\n".join(each))
    return answers


def errors_on_ranks(
    n: int, function: Callable[..., Any], *args: Any, timeout: float = 60
) -> list[str | None]:
    """What each rank raises, as ``"ValueError: message"``; None for a rank that returns.

    :raises RankError: If a rank dies, or does not answer in time.
    """
    answers = pool(n).run(function, *args, timeout=timeout)
    lost = [a.message for a in answers if isinstance(a, Failure) and not a.traceback]
    if lost:
        raise RankError("\n".join(lost))
    return [a.message if isinstance(a, Failure) else None for a in answers]


def pool(n: int) -> Ranks:
    """The processes of a rank count, for what drives them by itself."""
    if n not in _RANKS or not _RANKS[n].alive:
        _RANKS[n] = Ranks(n)
    return _RANKS[n]
