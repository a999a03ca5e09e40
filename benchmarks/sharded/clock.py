"""Times of what ranks do together: the slowest rank's counts, and the median of several samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.sharded.job import Job
from olmo_core.distributed import collectives
from olmo_core.distributed.collectives import Pending
from olmo_core.memory import ran_out_of_memory

__all__ = ["BothWays", "Times", "answered_at_once", "fastest", "fits", "run_ahead", "slowest"]

BothWays = tuple[Callable[[], Tensor], Callable[[Tensor], Any]]
"""A forward pass, and its backward pass from an output."""
_AHEAD = 4_000_000
"""Cycles that a GPU is kept busy while the host launches what is timed, as it is in training."""


class Times(NamedTuple):
    """Milliseconds."""

    forward: float
    both: float
    """Forward and backward."""


def slowest(job: Job, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Times:
    """Of all ranks, which call this together and begin each sample together."""
    forwards, both = _samples(job, forward, backward)
    return Times(statistics.median(job.largest(forwards)), statistics.median(job.largest(both)))


def fastest(job: Job, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Times:
    """Of all ranks, each of which does the whole alone: the baseline that is hardest to meet."""
    medians = [statistics.median(each) for each in _samples(job, forward, backward)]
    return Times(*(-ms for ms in job.largest([-ms for ms in medians])))


def fits(job: Job, draw: Callable[[], BothWays]) -> bool:
    """Whether every rank has the memory for it: tried before ranks wait for each other in it."""
    fits = True
    try:
        forward, backward = draw()
        backward(forward())
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        fits = False
    if job.on_gpus:
        torch.cuda.empty_cache()
    return all(job.tell(fits))


def _samples(
    job: Job, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]
) -> tuple[list[float], list[float]]:
    """As many as the time for one allows; the same on all ranks."""
    _sample(job, forward, backward)  # compiles, plans and agrees
    first = _sample(job, forward, backward)
    least, most = job.sizes.samples
    (ms,) = job.largest([sum(first)])
    n = int(min(most, max(least, 1e3 * job.sizes.seconds / max(ms, 1e-3))))
    samples = [first, *(_sample(job, forward, backward) for _ in range(n - 1))]
    return [f for f, _ in samples], [f + b for f, b in samples]


def _sample(
    job: Job, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]
) -> tuple[float, float]:
    """Milliseconds of forward, and of backward alone."""
    job.line_up()
    if not job.on_gpus:
        begun = time.perf_counter()
        out = forward()
        between = time.perf_counter()
        backward(out)
        return 1e3 * (between - begun), 1e3 * (time.perf_counter() - between)
    start, middle, stop = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    run_ahead(job)
    start.record()
    out = forward()
    middle.record()
    backward(out)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(stop)


def run_ahead(job: Job) -> None:
    """Let the host launch before the GPU begins."""
    if job.on_gpus:
        torch.cuda._sleep(_AHEAD)


def answered_at_once() -> AbstractContextManager[Any]:
    """Inside, exchanges are answered at once with anything: schedules without their messages.

    All ranks must enter and leave together, with no exchange on its way.
    """
    answers: dict[Any, Tensor] = {}

    def exchange(x: Tensor, send: Any, receive: Any, group: str) -> Pending:
        key = (sum(receive), *x.shape[1:]), x.dtype
        if key not in answers:
            answers[key] = torch.randn(key[0], device=x.device).to(x.dtype)
        return Pending(answers[key])

    return mock.patch.object(collectives, "exchange", exchange)
