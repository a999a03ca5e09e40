"""Steps that the ranks take together: what fails on one of them fails on all.

A rank that raises alone leaves the others waiting in their next collective, until a timeout. With
these, a rank's error is known to all before any of them goes on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from olmo_core.distributed.utils import get_rank, get_world_size, is_distributed

__all__ = ["from_first_rank", "gather", "together"]

T = TypeVar("T")


def together(step: Callable[[], T]) -> T:
    """What ``step`` returns on this rank, once it has succeeded on every rank.

    A collective of the default process group; without one it only calls ``step``.

    :raises Exception: What the first rank that failed has raised, on every rank; on that one with
        its traceback.
    """
    if not is_distributed():
        return step()
    own: Exception | None = None
    try:
        result = step()
    except Exception as error:
        own = _portable(error)
    failed = [(rank, each) for rank, each in enumerate(gather(own)) if each is not None]
    if failed:
        rank, first = failed[0]
        raise own if own is not None and rank == get_rank() else first
    return result


def from_first_rank(step: Callable[[], T]) -> T:
    """What ``step`` returns, or raises, on the first rank, which alone calls it; on every rank."""
    return gather(together(lambda: step() if get_rank() == 0 else None))[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Each rank's value, which must pickle, in the order of the ranks of the default group."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it doesn't survive a message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        same = RuntimeError(f"{type(error).__name__}: {error}")
        same.__cause__ = error
        return same
    return error
