"""Input that differs between ranks, or is bad on one, is an error on every rank, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.sharded.checks import Check, Skipped, expect_none
from benchmarks.sharded.job import Job
from olmo_core.diagnostics import subject as subjects
from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.sharded import HYBRID, RankPart
from olmo_core.exceptions import DisagreementError
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType

__all__ = ["checks"]

SOON = 30.0
"""Seconds."""


def checks(job: Job) -> Iterator[Check]:
    for style in (*RingAttentionLoadBalancerType, HYBRID):
        for mixer in ("mha", "gdn"):
            for fault in ("other documents", "bad documents"):
                name = f"{fault} on one rank, {style} {mixer}"
                yield Check(name, partial(_refused, job, str(style), mixer, fault))


def _refused(job: Job, style: str, mixer: str, fault: str) -> str:
    if job.n < 2 or (style == HYBRID and (job.n < 4 or job.n % 2)):
        raise Skipped(f"not for {job.n} ranks")
    if style == RingAttentionLoadBalancerType.ulysses and 4 % job.n:
        raise Skipped(f"{job.n} ranks can't share 4 heads")
    subject = subjects.Subject(MIXERS[mixer], probe_head_dim(job.device), job.device, job.n)
    part = RankPart(job.n, subject, "torch", job.dtype, style, "documents")
    last = job.rank == job.n - 1
    if last:
        # Without the load balancer's other keywords: then only a rank's comparison with others
        # tells that something is wrong.
        key = "global_cu_doc_lens" if "global_cu_doc_lens" in part.keywords else "cu_doc_lens"
        ends = part.keywords[key].clone()
        if fault == "other documents":
            ends[1:-1] = ends[2:].clone()  # the first two are one
        else:
            ends[-1] += job.n
        part.keywords = {key: ends}
    begun = time.perf_counter()
    problem, raised = [], "nothing"
    try:
        part.answer()
        problem.append("raised nothing")
    except (ValueError, DisagreementError) as error:
        raised = type(error).__name__
        if fault == "other documents" and not isinstance(error, DisagreementError):
            problem.append(f"{raised} instead of DisagreementError: {error}")
        if fault == "bad documents" and last == isinstance(error, DisagreementError):
            problem.append(f"{raised} on rank {job.rank}: {error}")
    if (seconds := time.perf_counter() - begun) > SOON:
        problem.append(f"only after {seconds:.0f} s")
    if job.on_gpus:
        torch.cuda.synchronize()
    expect_none(problem)
    return raised
