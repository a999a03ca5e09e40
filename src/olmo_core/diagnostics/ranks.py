"""Processes that run one function together, each as a rank of one gloo group.

They are started once and serve call after call. A function that raises on a rank is an answer like
any other; a rank that dies, or that does not answer in time, ends all of them.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import importlib.util
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["Failure", "Ranks", "end_of", "failure_of", "first_failure", "without_interrupts"]

# A fork would inherit torch's threads and locks.
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Failure:
    """What came of a rank instead of an answer."""

    message: str
    """What it raised, ``"ValueError: message"``; or how it was lost."""
    traceback: str = ""
    """Empty if the rank was lost."""
    follows: bool = False
    """Whether it tells no more than that another rank was lost, or is late."""


def first_failure(answers: Sequence[Any]) -> tuple[int, Failure] | None:
    """The rank and the failure that tells most of what went wrong, if any: a death, else an error,
    else a consequence of another rank's."""
    failures = [(rank, a) for rank, a in enumerate(answers) if isinstance(a, Failure)]
    return min(failures, key=lambda each: (each[1].follows, each[1].traceback != ""), default=None)


class Ranks:
    """``n`` processes, the ranks of a default process group over gloo.

    :param n: How many.
    :param patience: Seconds after which a rank that waits for the others gives up.
    """

    def __init__(self, n: int, *, patience: float = 600):
        self.alive = True
        self._folder = tempfile.mkdtemp(prefix="ranks_")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        atexit.register(self.end)
        for rank in range(n):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (theirs, rank, n, f"{self._folder}/store", patience)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            with without_interrupts():
                process.start()
            theirs.close()  # so that its death closes the pipe
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 60
    ) -> list[Any | Failure]:
        """What ``function(rank, n, *args)`` returns on each rank, or its :class:`Failure`.

        :param function: At the top level of a module or of a file.
        :param timeout: In seconds. Ranks that are late are ended, and all others with them.
        """
        try:
            return self._answers(function, args, timeout)
        except BaseException:  # Ctrl-C: what they answer later would be taken for the next answer
            self.end()
            raise

    def _answers(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any | Failure]:
        file = sys.modules[function.__module__].__file__
        for pipe in self._pipes:
            pipe.send((function.__module__, file, function.__name__, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self._pipes):
            waiting = {p: rank for rank, p in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            why = "" if ready else f"no answer in {timeout:g} s"
            for pipe, rank in waiting.items():
                if pipe not in ready:
                    continue
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    how = end_of(self._processes[rank])
                    answers[rank] = Failure(f"died: {how}. What it printed last is above.")
                    why = f"ended, because rank {rank} died"
            if why:
                self.end()
                late = {rank for rank in waiting.values() if rank not in answers}
                answers |= dict.fromkeys(late, Failure(why, follows=True))
        return [answers[rank] for rank in range(len(self._pipes))]

    def end(self) -> None:
        """End the processes."""
        self.alive = False
        for process in self._processes:
            process.kill()  # threads of gloo may hang in a message
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.end)


def failure_of(error: Exception) -> Failure:
    """What a rank says of the exception that it handles."""
    from olmo_core.distributed.launched import lost_another

    message = f"{type(error).__name__}: {error}"
    return Failure(message, traceback.format_exc(), lost_another(error))


def end_of(process: BaseProcess) -> str:
    """How a process that has closed its pipe ended: a signal's name, or its exit code."""
    process.join(1)  # its pipe closes a moment before
    code = process.exitcode
    if code is None:
        return "it no longer listens"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C, which a terminal sends to all: who has started
    them ends them. It is this one's when the block ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, rank: int, n: int, store: str, patience: float) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a library that crashes says where
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n,
        timeout=timedelta(seconds=patience),
    )  # fmt: skip
    while True:
        try:
            module, file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = getattr(_module(module, file), name)(rank, n, *args)
        except Exception as error:
            answer = failure_of(error)
        pipe.send(answer)


def _module(name: str, file: str) -> Any:
    """A module by its name, or if it has none that can be imported (a test), by its file."""
    if name in sys.modules or name.split(".")[0] == __name__.split(".")[0]:
        return importlib.import_module(name)
    name = f"{Path(file).stem}_{abs(hash(file))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
