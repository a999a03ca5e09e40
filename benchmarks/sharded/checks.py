"""Checks that all ranks make together, a line each: passed, failed or skipped, and why.

A rank that fails alone may leave the others in the middle of an exchange. They give up after the
job's patience, all learn of the failure over a group of its own, and nothing more is checked where
an exchange was lost. A rank that doesn't come out at all prints where it is and ends, and torchrun
ends the others.
"""

from __future__ import annotations

import faulthandler
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.sharded.job import Job
from olmo_core.distributed.launched import lost_another

__all__ = ["Check", "Skipped", "expect_none", "run_checks"]


class Skipped(Exception):
    """A check that can't be made here; the message says why."""


class Check(NamedTuple):
    """Something that must hold: a name, and what all ranks call."""

    name: str
    make: Callable[[], str]
    """Returns what was seen, for a person: what ranks say alike, or one of them, is said once.
    Raises if it doesn't hold, on whichever ranks see that."""


class _Word(NamedTuple):
    """What a rank says of a check."""

    status: str
    text: str
    lost: bool = False
    """Whether messages may no longer come through."""


def run_checks(job: Job, checks: Iterable[Check], *, limit: float = 900.0) -> bool:
    """Whether none failed on any rank; the same answer on all.

    :param limit: Seconds that one check may take.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    job.say(f"checks: {job.describe()}")
    for check in checks:
        begun = time.perf_counter()
        faulthandler.dump_traceback_later(limit, exit=True)
        words = _heard(job, _made(check))
        faulthandler.cancel_dump_traceback_later()
        status, text = _verdict(words)
        counts[status] += 1
        seconds = time.perf_counter() - begun
        job.say(f"  {status:8}{check.name:42}{seconds:6.1f} s  {text}".rstrip())
        job.found("checks", name=check.name, status=status, text=text, seconds=round(seconds, 2))
        if any(word.lost for word in words):
            job.say("  An exchange between ranks was lost: what follows is not checked.")
            break
    job.say(", ".join(f"{n} {status}" for status, n in counts.items()))
    return counts["failed"] == 0 and counts["passed"] > 0


def _heard(job: Job, mine: _Word) -> list[_Word]:
    """What all ranks say; this one for all of them where one does not answer."""
    try:
        return job.last_word(mine)
    except RuntimeError:
        return [_Word("failed", f"a rank does not answer; here: {mine.text}", lost=True)]


def _made(check: Check) -> _Word:
    try:
        return _Word("passed", check.make())
    except Skipped as reason:
        return _Word("skipped", str(reason))
    except Exception as error:
        traceback.print_exc(limit=-4)
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return _Word("failed", f"{type(error).__name__}: {lines[0][:300]}", lost_another(error))


def _verdict(words: list[_Word]) -> tuple[str, str]:
    failed = [(rank, word) for rank, word in enumerate(words) if word.status == "failed"]
    if failed:
        # Who lost another tells less than who was lost.
        rank, first = min(failed, key=lambda each: each[1].lost)
        others = f" (and on {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
        return "failed", f"rank {rank}: {first.text}{others}"
    if len({word.status for word in words}) > 1:
        return "failed", "some ranks skipped what others checked"
    return words[0].status, ", ".join(dict.fromkeys(word.text for word in words if word.text))


def expect_none(problems: list[str]) -> None:
    """:raises AssertionError: With the first of the problems. A rank raises its own: that is how
    the others learn of them."""
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AssertionError("; ".join(problems[:3]) + more)
