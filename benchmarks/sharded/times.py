"""How near N ranks come to being N times as fast as one: attention, plans, the gated delta net."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.sharded import rivals
from benchmarks.sharded.clock import Times, answered_at_once, fastest, slowest
from benchmarks.sharded.job import Job
from benchmarks.sharded.problems import Attention, Mask, context_of, log_normal, masks, padded, ways
from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.memory import ran_out_of_memory
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
        f"{sizes.heads}:{sizes.kv_heads} heads of {sizes.head_dim}, {job.dtype}; the share of the "
        "ideal, t1 / (N tN), as %"
    )
    job.say(f"{'':39}{'forward':>24}{'forward + backward':>24}")
    job.say(f"{'kernel, tokens a rank, way':39}{'ms      %  silent':>24}{'ms      %  silent':>24}")
    for tokens in sizes.tokens:
        for mask in masks(job, tokens):
            for kernel in sizes.kernels:
                if why := _missing(job, kernel):
                    job.say(f"{kernel}: {why}")
                    continue
                _attention(job, Attention(job, mask, kernel, tokens))
    _plans(job)
    from benchmarks.sharded.delta import delta

    delta(job)


def _missing(job: Job, kernel: str) -> str:
    request = Request(job.dtype, probe_head_dim(job.device))
    return "; ".join(refusals(CAPABILITIES[kernel], Environment.detect(job.device), request))


def _attention(job: Job, problem: Attention) -> None:
    """Every way of sharding one problem, with its messages and without."""
    mask, tokens = problem.mask, problem.tokens
    title = f"{problem.kernel} {tokens} {mask.name}"
    alone, from_parts = _alone(job, problem)
    if alone is None:
        job.say(f"{title}: one device can't do it, not even in parts")
        return
    facts = {"kernel": problem.kernel, "tokens": tokens, "mask": mask.name, "ranks": job.n}
    mark = "*" if from_parts else ""
    job.say(f"{title + ', one device' + mark:39}{alone.forward:9.2f}{'':15}{alone.both:9.2f}")
    job.found("attention", **facts, way="one device", parts=from_parts, ms=alone._asdict())
    for way in ways(job, mask):
        forward = problem.sharded(way.style, way.head_stride)
        whole = _tried(job, way.name, partial(slowest, job, forward, problem.backward))
        silent = None
        if whole is not None:
            with answered_at_once():
                silent = _tried(job, way.name, partial(slowest, job, forward, problem.backward))
        _row(job, facts, way.name, alone, whole, silent)
    if mask.window < 0 and len(mask.ends) == 2:
        rival = _tried(job, "torch", partial(rivals.context_parallel, job, problem))
        _row(job, facts, "torch's context_parallel", alone, rival, None)


def _alone(job: Job, problem: Attention) -> tuple[Times | None, bool]:
    """One device's time for all tokens, and whether it is a sum over parts."""
    whole = _tried(job, "", lambda: fastest(job, *problem.whole()), quiet=True)
    if whole is not None:
        return whole, False

    def in_parts() -> Times:
        each = [fastest(job, *part) for part in problem.parts()]
        return Times(sum(t.forward for t in each), sum(t.both for t in each))

    return _tried(job, "one device, in parts", in_parts), True


def _row(
    job: Job,
    facts: dict[str, Any],
    way: str,
    alone: Times,
    whole: Times | None,
    silent: Times | None,
) -> None:
    if whole is None:
        job.found("attention", **facts, way=way, ms=None)
        return
    line = f"  {way:37}"
    shares: dict[str, Any] = {}
    for name in Times._fields:
        share = getattr(alone, name) / (job.n * getattr(whole, name))
        line += f"{getattr(whole, name):9.2f}{share:7.1%}"
        shares[name] = round(share, 4)
        without = getattr(alone, name) / (job.n * getattr(silent, name)) if silent else None
        line += f"{without:8.1%}" if without else f"{'':8}"
        shares[f"{name}, silent"] = without and round(without, 4)
    job.say(line)
    ms, quiet = whole._asdict(), silent and silent._asdict()
    job.found("attention", **facts, way=way, ms=ms, silent_ms=quiet, share=shares)


def _tried(
    job: Job, what: str, run: Callable[[], Times], *, quiet: bool = False
) -> Times | None:
    """What all ranks have measured; None, and why, if any of them could not."""
    found, problem = None, ""
    try:
        found = run()
    except rivals.Unavailable as reason:
        problem = str(reason)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        problem = "no memory"
    if job.on_gpus:
        torch.cuda.empty_cache()
    problems = [p for p in job.tell(problem) if p]
    if not problems:
        return found
    if not quiet:
        job.say(f"  {what:37} {problems[0][:60]}")
    return None


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
