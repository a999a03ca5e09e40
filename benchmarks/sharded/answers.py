"""Every layer on every style of sharding = the dense float64 reference, as ``verify`` has them.

In bfloat16 on GPUs, in float32 on CPUs; the bound is a few times the error that a plain reference
has in that precision. Eager, checkpointed and compiled; and the same bits when asked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.sharded.checks import Check, Skipped, expect_none
from benchmarks.sharded.job import Job
from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.measures import Comparison, worst
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.properties import PROPERTIES
from olmo_core.diagnostics.sharded import HYBRID, TP_CP, RankPart
from olmo_core.diagnostics.subject import Answer, Subject
from olmo_core.diagnostics.verify import Cell, why_not
from olmo_core.distributed.collectives import Traffic, count_traffic
from olmo_core.distributed.utils import local_part
from olmo_core.nn.attention.capabilities import (
    CAPABILITIES,
    Environment,
    Request,
    refusals,
)
from olmo_core.nn.attention.kernels.softmax import Feature

__all__ = ["checks", "expect_same_messages"]

STYLES = tuple(name for name, prop in PROPERTIES.items() if prop.is_sharded)
PROBLEMS = ("whole", "documents")
COMPILED = ("gqa", "window", "gdn")
"""Compiling takes long: a layer with keys that go round, one that gathers them, one of states."""
Call = Callable[..., Tensor]


def _eager(layer: nn.Module) -> Call:
    return layer


def _checkpointed(layer: nn.Module) -> Call:
    return partial(checkpoint, layer, use_reentrant=False)


def _compiled(layer: nn.Module) -> Call:
    return torch.compile(layer, fullgraph=True)


def _reduced_overhead(layer: nn.Module) -> Call:
    return torch.compile(layer, fullgraph=True, mode="reduce-overhead")


MODES: dict[str, Callable[[nn.Module], Call]] = {
    "eager": _eager,
    "checkpointed": _checkpointed,
    "compiled": _compiled,
    "reduce-overhead": _reduced_overhead,
}


def checks(job: Job, mixers: Sequence[str] = ()) -> tuple[list[Check], list[Check]]:
    """Those of each backend and style, and those that compile, which takes minutes.

    :param mixers: Only these of ``verify``'s layers; all of them if empty.
    """
    environment, head_dim = Environment.detect(job.device), probe_head_dim(job.device)
    subject = cache(lambda name: Subject(MIXERS[name], head_dim, job.device, job.n))
    every = _Every(job, tuple(mixers) or tuple(MIXERS), environment, subject)
    quick: list[Check] = []
    slow: list[Check] = []
    for backend in _backends(job):
        for style in STYLES:
            for mode in MODES:
                check = Check(
                    f"{backend} {style} {mode}", partial(every.right, backend, style, mode)
                )
                (quick if mode in ("eager", "checkpointed") else slow).append(check)
            name = f"{backend} {style} same bits again"
            quick.append(Check(name, partial(every.same_bits, backend, style)))
    return quick, slow


def _backends(job: Job) -> list[str]:
    """Those that serve a sharded layer on this machine; torch's first."""
    environment = Environment.detect(job.device)
    asked = Request(
        job.dtype, probe_head_dim(job.device), frozenset({Feature.backward, Feature.documents})
    )
    return [name for name, row in CAPABILITIES.items() if not refusals(row, environment, asked)]


class _Every:
    """Layers of many kinds on one style."""

    def __init__(
        self,
        job: Job,
        mixers: tuple[str, ...],
        environment: Environment,
        subject: Callable[[str], Subject],
    ) -> None:
        self.job, self.mixers = job, mixers
        self.environment, self.subject = environment, subject

    def _suited(self, backend: str, style: str, mixers: Sequence[str]) -> list[str]:
        if style in (HYBRID, TP_CP) and (self.job.n < 4 or self.job.n % 2):
            raise Skipped(f"needs an even number of ranks, at least 4; these are {self.job.n}")
        reasons: dict[str, list[str]] = {}
        for mixer in mixers:
            subject = self.subject(mixer)
            if subject.mixer.has_backend or backend == "torch":
                cell = Cell(mixer, backend, self.job.dtype, style)
                reasons[mixer] = why_not(
                    cell, self.subject, self.environment, subject.head_dim, self.job.n
                )
        suited = [mixer for mixer, each in reasons.items() if not each]
        if not suited:
            why = dict.fromkeys(reason for each in reasons.values() for reason in each)
            raise Skipped("; ".join(why) or "none of these layers")
        return suited

    def right(self, backend: str, style: str, mode: str) -> str:
        """Every layer, with and without documents."""
        if mode == "reduce-overhead" and not self.job.on_gpus:
            raise Skipped("CUDA graphs need GPUs")
        compiled = mode not in ("eager", "checkpointed")
        mixers = [m for m in self.mixers if not compiled or m in COMPILED]
        seen: list[Comparison] = []
        graphs = 0
        for mixer in self._suited(backend, style, mixers):
            for problem in PROBLEMS[1:] if compiled else PROBLEMS:
                subject = self.subject(mixer)
                part = RankPart(self.job.n, subject, backend, self.job.dtype, style, problem)
                if compiled:
                    torch.compiler.reset()
                if mode == "reduce-overhead":
                    mine, launched = _replayed(part, MODES[mode](part.layer))
                    graphs += launched
                else:
                    mine = part.answer(MODES[mode](part.layer))
                whole = part.put_together(mine)
                where = f"{mixer}, {problem}: "
                for c in subject.compare(whole, subject.truth(problem), problem, self.job.dtype):
                    seen.append(c._replace(what=where + c.what))
        wrong = [f"{c.what} is off by {c.error:.1e} > {c.bound:.1e}" for c in seen if not c.passed]
        expect_none(wrong)
        nearest = worst(seen)
        drawn = f"; {graphs} graphs, no message in them" if mode == "reduce-overhead" else ""
        seen_here = f"{nearest.ratio:.2f} of the bound of {nearest.what}{drawn}"
        return seen_here if self.job.is_first else ""

    def same_bits(self, backend: str, style: str) -> str:
        """Forward and backward twice, under deterministic algorithms: on each rank."""
        needed = frozenset({Feature.deterministic, Feature.backward})
        asked = Request(self.job.dtype, probe_head_dim(self.job.device), needed)
        if why := refusals(CAPABILITIES[backend], self.environment, asked):
            raise Skipped("; ".join(why))
        differ, compared = [], 0
        mixers = self._suited(backend, style, self.mixers)
        for mixer in mixers:
            part = RankPart(
                self.job.n, self.subject(mixer), backend, self.job.dtype, style, "documents"
            )
            with _deterministic():
                first, second = part.answer(), part.answer()
            compared += len(first)
            differ += [
                f"{mixer}: {name}"
                for name in first
                if not torch.equal(local_part(first[name]), local_part(second[name]))
            ]
        expect_none(differ)
        return f"{compared} tensors of {len(mixers)} layers"


def _replayed(part: RankPart, call: Call) -> tuple[Answer, int]:
    """The third answer of a compiled layer, from CUDA graphs, and how many were launched for it.

    :raises AssertionError: If a graph holds messages: then Python sends fewer than in eager mode.
    """
    with count_traffic() as eager:
        part.answer()
    for _ in range(2):
        torch.compiler.cudagraph_mark_step_begin()
        part.answer(call)
    torch.compiler.cudagraph_mark_step_begin()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with count_traffic() as replayed, torch.profiler.profile(activities=activities) as profile:
        answer = {name: y.clone() for name, y in part.answer(call).items()}
        torch.cuda.synchronize()
    expect_same_messages(eager, replayed)
    return answer, sum(event.name == "cudaGraphLaunch" for event in profile.events() or ())


def expect_same_messages(eager: Traffic, replayed: Traffic) -> None:
    """:raises AssertionError: If a compiled step sends other messages than an eager one."""
    if eager != replayed:
        raise AssertionError(
            f"eager mode sends {eager}, compiled graphs leave {replayed} to Python"
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
