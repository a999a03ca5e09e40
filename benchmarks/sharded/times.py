"""How near N ranks come to being N times as fast as one: attention, plans, the gated delta net."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from benchmarks.sharded.clock import Times, answered_at_once, fastest, fits, slowest
from benchmarks.sharded.delta import delta
from benchmarks.sharded.job import Job
from benchmarks.sharded.problems import (
    Attention,
    Mask,
    context_of,
    log_normal,
    masks,
    padded,
    ways,
)
from benchmarks.sharded.rivals import Unavailable, context_parallel
from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.nn.attention.capabilities import CAPABILITIES, Environment, Request, refusals
from olmo_core.nn.attention.parallel.layout import LAYOUTS
from olmo_core.nn.attention.parallel.plan import gather_plan
from olmo_core.nn.attention.parallel.readings import Reading

__all__ = ["measure"]


def measure(job: Job) -> None:
    job.say(f"\ntimes: {job.describe()}")
    if job.shares_gpus:
        job.say("Ranks share a GPU here: they take turns, and none of these times means anything.")
    sizes = job.sizes
    job.say(
        f"{sizes.heads}:{sizes.kv_heads} heads of {sizes.head_dim}, {job.dtype}; "
        "share of the ideal: t1 / (N tN); TF: TFLOP/s a rank"
    )
    columns = f"{'ms':>9}{'share':>7}{'silent':>8}{'TF':>6}"
    job.say(f"{'':39}{'forward':>30}{'forward + backward':>30}")
    job.say(f"{'kernel, tokens a rank, mask':39}{columns}{columns}")
    missing = {kernel: _missing(job, kernel) for kernel in sizes.kernels}
    for kernel, why in missing.items():
        if why:
            job.say(f"{kernel}: {why}")
    rivals: list[tuple[_Table, Attention]] = []
    for tokens in sizes.tokens:
        for mask in masks(job, tokens):
            for kernel in (kernel for kernel, why in missing.items() if not why):
                problem = Attention(job, mask, kernel, tokens)
                table = _attention(job, problem)
                if table and mask.window < 0 and len(mask.ends) == 2 and kernel == "torch":
                    rivals.append((table, problem))
    _plans(job)
    delta(job)
    job.say("\ntorch's experimental context_parallel, one document")
    for table, problem in rivals:  # last: if one rank alone fails there, nothing else is lost
        name, shown = "torch's own", f"{problem.tokens} tokens a rank"
        try:
            table.row(name, context_parallel(job, problem), None, shown)
        except Unavailable as reason:
            job.say(f"  {shown}: {str(reason)[:70]}")
            job.found("attention", **table.facts, way=name, unavailable=str(reason))


def _missing(job: Job, kernel: str) -> str:
    request = Request(job.dtype, probe_head_dim(job.device))
    return "; ".join(refusals(CAPABILITIES[kernel], Environment.detect(job.device), request))


class _Table:
    """Lines about one problem, whose shares are of one device's time."""

    def __init__(self, job: Job, problem: Attention, alone: Times) -> None:
        self.job, self.alone = job, alone
        mask, sizes = problem.mask, job.sizes
        self.facts = {
            "kernel": problem.kernel, "tokens": problem.tokens, "mask": mask.name, "ranks": job.n,
        }  # fmt: skip
        flops = 4 * mask.pairs * sizes.heads * sizes.head_dim
        self.flops = Times(flops, 3.5 * flops)  # backward: five products for forward's two

    def head(self, title: str, from_parts: bool) -> None:
        line = f"{title + (', one device*' if from_parts else ', one device'):39}"
        for ms, flops in zip(self.alone, self.flops, strict=True):
            line += f"{ms:9.2f}{'':15}{flops / ms / 1e9:6.0f}"
        self.job.say(line)
        self._found("one device", self.alone, parts=from_parts)

    def row(self, way: str, times: Times, silent: Times | None, shown: str = "") -> None:
        """:param silent: With messages that were answered at once."""
        n, line = self.job.n, f"  {shown or way:37}"
        for i, ms in enumerate(times):
            line += f"{ms:9.2f}{self.alone[i] / (n * ms):7.1%}"
            line += f"{self.alone[i] / (n * silent[i]):8.1%}" if silent else f"{'':8}"
            line += f"{self.flops[i] / (n * ms) / 1e9:6.0f}"
        self.job.say(line)
        shares = [round(a / (n * b), 4) for a, b in zip(self.alone, times, strict=True)]
        quiet = silent and silent._asdict()
        self._found(way, times, share=Times(*shares)._asdict(), silent_ms=quiet)

    def _found(self, way: str, times: Times, **more: Any) -> None:
        self.job.found("attention", **self.facts, way=way, ms=times._asdict(), **more)


def _attention(job: Job, problem: Attention) -> _Table | None:
    """Every way of sharding one problem, with its messages and without."""
    title = f"{problem.kernel} {problem.tokens} {problem.mask.name}"
    alone, from_parts = _alone(job, problem)
    if alone is None:
        job.say(f"{title}: one device can't hold it, not even in parts")
        return None
    table = _Table(job, problem, alone)
    table.head(title, from_parts)
    for way in ways(job, problem.mask):
        forward = problem.sharded(way.style, way.head_stride)
        times = slowest(job, forward, problem.backward)
        with answered_at_once():
            silent = slowest(job, forward, problem.backward)
        table.row(way.name, times, silent)
    return table


def _alone(job: Job, problem: Attention) -> tuple[Times | None, bool]:
    """One device's time for all tokens, and whether it is a sum over parts."""
    if fits(job, problem.whole):
        return fastest(job, *problem.whole()), False
    each = []
    for i in range(job.n):
        if not fits(job, partial(problem.part, i)):
            return None, True
        each.append(fastest(job, *problem.part(i)))
    return Times(sum(t.forward for t in each), sum(t.both for t in each)), True


def _plans(job: Job) -> None:
    """What a new batch costs the host, once a step: to plan it, and to agree on it."""
    sizes = job.sizes
    tokens = sizes.tokens[0]
    job.say("\na batch's plan and agreement, ms a step on the host, whatever the layers")
    ends = padded(
        log_normal(job.n * tokens, max(2.0, job.n * tokens / sizes.planned_documents)),
        2 * job.n,
        job.n * tokens,
    )
    for layout in LAYOUTS:
        taken = []
        for _ in range(5):
            reading = Reading(list(ends), torch.device("cpu"))
            begun = time.perf_counter()
            gather_plan(reading, layout, job.n, job.rank, -1, 1)
            taken.append(1e3 * (time.perf_counter() - begun))
        (ms,) = job.largest([min(taken)])
        job.say(f"  plan, {layout}, {len(ends) - 1} documents {ms:18.2f}")
        job.found("plans", layout=layout, documents=len(ends) - 1, ms=ms)
    problem = Attention(job, Mask("", ends, -1), sizes.kernels[0], tokens)
    for what, new in (("lengths known", False), ("lengths new", True)):
        ms = _host(job, problem, new)
        job.say(f"  forward on the host, {what:22} {ms:10.2f}")
        job.found("plans", forward=what, ms=ms)
    everyone = context_of(job, "balanced", 1).everyone
    ms = _agreement(job, everyone)
    job.say(f"  of which a message of 8 bytes, and its wait {ms:10.2f}")
    job.found("plans", agreement_ms=ms)


def _host(job: Job, problem: Attention, new: bool) -> float:
    """Until the host has launched a layer; with lengths that no rank has seen, or known ones."""
    taken = []
    known = problem.sharded("balanced", 1)
    known()
    for _ in range(7):
        forward = problem.sharded("balanced", 1, problem.lengths.clone()) if new else known
        job.line_up()
        begun = time.perf_counter()
        forward()
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(job.largest(taken))


def _agreement(job: Job, everyone: str) -> float:
    from olmo_core.distributed.collectives import gather_integers

    taken = []
    for _ in range(9):
        job.line_up()
        begun = time.perf_counter()
        gather_integers(1, everyone, job.device).tolist()
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(job.largest(taken))
