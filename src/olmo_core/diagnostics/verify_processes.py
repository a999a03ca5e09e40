"""``verify`` in several processes: faster, and a crash in a library costs one cell.

Each process checks one layer on one backend at a time, in whatever order they become free. The
sharded cells of a backend go to one of them, before all others: they take longest, and its ranks
start once. ``doctor`` has its ticks from here too, a feature at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from olmo_core.diagnostics.ranks import end_of, without_interrupts
from olmo_core.diagnostics.sharded import end_ranks
from olmo_core.diagnostics.verify import Cell, Outcome, run

__all__ = ["run_in_processes"]

Run = Callable[[Iterable[Cell], torch.device], Iterator[Outcome]]

# A fork would inherit CUDA's state and threads' locks.
_CONTEXT = multiprocessing.get_context("spawn")
_PATIENCE = 5.0
"""Seconds in which a process that is told to end can end its ranks."""


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    cells: deque[Cell] = field(default_factory=deque)
    """Given to it and not answered yet; the first is the one that it checks."""


def _layer(cell: Cell) -> tuple[str, str | None]:
    return cell.backend, None if cell.is_sharded else cell.mixer


def run_in_processes(
    todo: Sequence[Cell],
    device: torch.device,
    jobs: int,
    run: Run = run,
    together: Callable[[Cell], Hashable] = _layer,
) -> Generator[Outcome, None, None]:
    """The outcomes of :func:`.verify.run`, in no order. Close it if you don't exhaust it.

    :param jobs: How many processes, at most.
    :param run: What each of them does; importable by name.
    :param together: Neighbours that are alike in this go to one process.
    """
    todo = sorted(todo, key=lambda cell: not cell.is_sharded)
    groups = deque(list(cells) for _, cells in groupby(todo, key=together))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers: list[_Worker] = []
    try:
        while groups or workers:
            while groups and len(workers) < jobs:
                worker = _start(device, threads, run)
                workers.append(worker)
                _give(worker, groups.popleft())
            for pipe in wait([worker.pipe for worker in workers]):
                worker = next(w for w in workers if w.pipe is pipe)
                try:
                    outcome: Outcome = worker.pipe.recv()
                except EOFError:  # it died
                    workers.remove(worker)
                    how = f"its process died: {end_of(worker.process)}."
                    reasons = (f"{how} What it printed last is above.",)
                    yield Outcome(worker.cells.popleft(), "failed", reasons=reasons)
                    if worker.cells:
                        groups.appendleft(list(worker.cells))
                    continue
                worker.cells.remove(outcome.cell)
                yield outcome
                if worker.cells:
                    continue
                if groups:
                    _give(worker, groups.popleft())
                else:
                    worker.pipe.send(None)
                    workers.remove(worker)
                    worker.process.join()
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_PATIENCE)
            worker.process.kill()


def _start(device: torch.device, threads: int, run: Run) -> _Worker:
    ours, theirs = _CONTEXT.Pipe()
    # No daemon: it may have ranks of its own.
    process = _CONTEXT.Process(target=_work, args=(theirs, device, threads, run))
    with without_interrupts():
        process.start()
    theirs.close()  # so that its death closes the pipe
    return _Worker(process, ours)


def _give(worker: _Worker, cells: list[Cell]) -> None:
    worker.cells = deque(cells)
    worker.pipe.send(cells)


def _work(pipe: Connection, device: torch.device, threads: int, run: Run) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # ends what this has started
    torch.set_num_threads(threads)
    while (cells := pipe.recv()) is not None:
        for outcome in run(cells, device):
            pipe.send(outcome)
        end_ranks()  # they have their part of a GPU's memory
