"""The ranks that torchrun has started, in place of processes of our own.

The first rank asks, as it asks :class:`~olmo_core.diagnostics.ranks.Ranks`; the others serve until
it has no more questions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from olmo_core.diagnostics.ranks import Failure, failure_of
from olmo_core.distributed.launched import join_started

__all__ = ["StartedRanks", "started_ranks"]


@contextmanager
def started_ranks(device: torch.device, patience: float = 120.0) -> Iterator[StartedRanks]:
    """Join the ranks: the first can ask them; the others have served it when the block begins.

    :param device: Of its type each rank takes its own.
    :param patience: Seconds after which a rank that waits for the others gives up.
    """
    join_started(timedelta(seconds=patience), on_gpus=device.type == "cuda")
    ranks = StartedRanks()
    try:
        if not ranks.are_mine:
            ranks.serve()
        yield ranks
        if ranks.are_mine:
            ranks.end()
    finally:
        dist.destroy_process_group()


class StartedRanks:
    """All ranks of the default process group."""

    alive = True

    def __init__(self) -> None:
        # The first rank may be busy with other cells for as long as it likes.
        self._questions = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    @property
    def are_mine(self) -> bool:
        """Whether this rank is the first, which alone asks and reports."""
        return dist.get_rank() == 0

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 0
    ) -> list[Any | Failure]:
        """What ``function(rank, n, *args)`` returns on each rank, or its :class:`Failure`.

        :param function: At the top level of a module.
        :param timeout: The group has one of its own.
        """
        answers = self._answer((function.__module__, function.__name__, args))
        assert answers is not None
        return answers

    def serve(self) -> None:
        """Answer the first rank's questions until its last."""
        while self._answer(None) is not None:
            pass

    def end(self) -> None:
        """Let the others go."""
        self._answer(None)

    def _answer(self, question: tuple[str, str, tuple[Any, ...]] | None) -> list[Any] | None:
        message = [question]
        dist.broadcast_object_list(message, src=0, group=self._questions)
        if message[0] is None:
            return None
        module, name, args = message[0]
        rank, n = dist.get_rank(), dist.get_world_size()
        try:
            torch.manual_seed(0)
            answer = getattr(importlib.import_module(module), name)(rank, n, *args)
        except Exception as error:
            answer = failure_of(error)
        answers: list[Any] = [None] * n
        dist.all_gather_object(answers, answer, group=self._questions)
        return answers
