"""Runs functions on n gloo ranks: processes that are started once and serve all tests of a session.

A case is a function ``f(rank, n, *args)`` of a test file, run on every rank at once. What the ranks
return comes back as a list; an error of any rank is raised here, with the errors of the others.

    def total(rank, n, x): ...
    def test_total(): assert on_ranks(2, total, 3) == [6, 6]

The processes of a rank count share one default process group. After a timeout, or the death of a
rank, they are replaced by new ones.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["RankError", "errors_on_ranks", "on_ranks"]

# A fork would inherit torch's threads and locks.
_CONTEXT = multiprocessing.get_context("spawn")
_GROUPS: dict[int, _Group] = {}


class RankError(AssertionError):
    """At least one rank raised: the message has each rank's traceback."""


class _Failure(str):
    """What a rank raised: its type and message; ``traceback`` has the rest."""

    traceback: str = ""


def on_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What ``function(rank, n, *args)`` returns on each of ``n`` ranks.

    :param function: At the top level of its file.
    :raises RankError: If a rank raises, dies, or does not answer in time.
    """
    answers = _group(n).run(function, args, timeout)
    failures = {rank: a for rank, a in enumerate(answers) if isinstance(a, _Failure)}
    if failures:
        each = (f"--- rank {rank} of {n}\n{f.traceback or f}" for rank, f in failures.items())
        raise RankError("\n".join(each))
    return answers


def errors_on_ranks(
    n: int, function: Callable[..., Any], *args: Any, timeout: float = 60
) -> list[str | None]:
    """What each rank raises, as ``"ValueError: message"``; None for a rank that returns.

    :raises RankError: If a rank dies, or does not answer in time.
    """
    answers = _group(n).run(function, args, timeout)
    lost = [str(a) for a in answers if isinstance(a, _Failure) and not a.traceback]
    if lost:
        raise RankError("\n".join(lost))
    return [str(a) if isinstance(a, _Failure) else None for a in answers]


def _group(n: int) -> _Group:
    if n not in _GROUPS or not _GROUPS[n].alive:
        _GROUPS[n] = _Group(n)
    return _GROUPS[n]


class _Group:
    def __init__(self, n: int):
        self.alive = True
        self.pipes: list[Connection] = []
        self.processes = []
        store = tempfile.mktemp(prefix="gloo_ranks_")
        for rank in range(n):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, rank, n, store), daemon=True)
            process.start()
            theirs.close()  # so that its death closes the pipe
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.end)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        file = sys.modules[function.__module__].__file__
        for pipe in self.pipes:
            pipe.send((file, function.__name__, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self.pipes):
            left = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                try:
                    text, trace, answer = pipe.recv()
                    if text is not None:
                        answer = _Failure(text)
                        answer.traceback = trace
                except EOFError:
                    self.end()
                    answer = _Failure("died; what it printed last is above")
                answers[left[pipe]] = answer
            if not ready:
                self.end()
                for rank in left.values():
                    answers[rank] = _Failure(f"no answer in {timeout:g} s")
        return [answers[rank] for rank in range(len(self.pipes))]

    def end(self) -> None:
        self.alive = False
        for process in self.processes:
            process.kill()  # gloo's threads may hang in a message
            process.join()


def _serve(pipe: Connection, rank: int, n: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n))
    # Longer than any test waits, so that a hang is seen as one.
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((None, None, getattr(_module(file), name)(rank, n, *args)))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            pipe.send((text, traceback.format_exc(), None))


def _module(file: str) -> Any:
    """A test file as a module: pytest's own names for them can't be imported."""
    name = f"ranks_{Path(file).stem}_{abs(hash(file))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
