"""A profile of one gather, which shows its messages beneath the kernels of the groups before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.sharded.clock import run_ahead
from benchmarks.sharded.job import Job
from benchmarks.sharded.problems import Attention, Mask

__all__ = ["Interval", "hidden", "trace"]


class Interval(NamedTuple):
    """Of something that a device does: microseconds."""

    start: float
    stop: float


def hidden(messages: Sequence[Interval], kernels: Sequence[Interval]) -> list[float]:
    """Of each message, the share of its time in which some kernel computes."""
    shares = []
    for message in messages:
        beneath, reached = 0.0, message.start
        for kernel in sorted(kernels):
            start, stop = max(kernel.start, reached), min(kernel.stop, message.stop)
            if stop > start:
                beneath += stop - start
                reached = stop
        shares.append(beneath / max(message.stop - message.start, 1e-9))
    return shares


def trace(job: Job) -> None:
    """One head of keys at a time, forward: group i + 1 travels while group i computes."""
    job.say("\ntrace: llama3 with head_stride 1, one document, forward")
    tokens, kernel = job.sizes.traced_tokens, job.sizes.kernels[0]
    problem = Attention(job, Mask("one document", [0, job.n * tokens], -1), kernel, tokens)
    forward = problem.sharded("llama3", 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.on_gpus:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.no_grad():
        forward()
        forward()
        job.line_up()
        with torch.profiler.profile(activities=activities) as profile:
            run_ahead(job)
            forward()
            if job.on_gpus:
                torch.cuda.synchronize()
    if job.out is not None:
        profile.export_chrome_trace(str(job.out / "trace.json"))
    messages, kernels = _intervals(job, profile)
    # The last rank sees all keys: its kernels are the longest, so all ranks' shares are told.
    every: list[list[float]] = job.tell(hidden(messages, kernels))
    for rank, shares in enumerate(every):
        job.found("trace", rank=rank, hidden=[round(share, 3) for share in shares])
        if len(shares) < 2:
            job.say(f"  rank {rank}: the profiler saw {len(shares)} messages, too few to tell")
            continue
        listed = " ".join(f"{share:.0%}" for share in shares[1:])
        verdict = "hidden" if min(shares[1:]) >= 0.5 else "NOT hidden"
        job.say(f"  rank {rank}: beneath a kernel: {listed}, after the first: {verdict}")


def _intervals(job: Job, profile: Any) -> tuple[list[Interval], list[Interval]]:
    """Messages in their order, and kernels; on CPUs what gloo's threads and attention do."""
    messages, kernels = [], []
    for event in profile.events() or ():
        on_device = event.device_type.name == "CUDA"
        interval = Interval(event.time_range.start, event.time_range.end)
        if on_device and event.name.startswith("nccl:"):
            continue  # an annotation, of what its kernel is there for too
        if on_device and "nccl" in event.name.lower():
            messages.append(interval)
        elif on_device and not event.name.startswith("Mem"):
            kernels.append(interval)
        elif not job.on_gpus and event.name.startswith("gloo:"):
            messages.append(interval)
        elif not job.on_gpus and "flash_attention" in event.name:
            kernels.append(interval)
    return sorted(messages), kernels
