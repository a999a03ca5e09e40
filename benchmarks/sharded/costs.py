"""What sharding may cost a GPU beside time: memory for other ranks' keys, and waits of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.sharded.checks import Check, Skipped, expect_none
from benchmarks.sharded.composed import small_model
from benchmarks.sharded.job import Job
from benchmarks.sharded.problems import context_of
from olmo_core.data import VOCAB_SIZE
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.plan import gather_plan
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.attention.parallel.schedule import attend_sharded
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)
from olmo_core.nn.attention.segments import Segments

__all__ = ["checks"]

TOKENS, HEADS, DIM = 8192, 32, 128
FEW, MANY = 8, 16
"""kv heads: what each more of them takes is memory for keys and values, and nothing else is."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def checks(job: Job) -> Iterator[Check]:
    for style, strides in (("zig_zag", (1,)), ("llama3", (1, 2)), ("balanced", (1, 2))):
        for stride in strides:
            what = "ring" if style == "zig_zag" else f"{style}/{stride}"
            yield Check(f"memory of keys, {what}", partial(_memory, job, style, stride))
    for style in ("zig_zag", "balanced", "ulysses"):
        yield Check(f"waits of the host, {style}", partial(_waits, job, style))


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call takes at its peak, above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _memory(job: Job, style: str, stride: int) -> str:
    """What other ranks' keys take in forward, in groups of kv heads, or in shards.

    The peak with more kv heads less that with few, of all that a rank does and of its kernel alone,
    which is given a group, or a shard: queries, outputs and the kernel's own copies are in both.
    There are as many groups in all. Own rows that are packed to be sent don't count.
    """
    if not job.on_gpus:
        raise Skipped("torch counts the memory of GPUs alone")
    _expect_nccl(job)
    rings = style == "zig_zag"
    reading = Reading([0, TOKENS * job.n], job.device)
    rows, own, problem = TOKENS, 0, None
    if not rings:
        layout = RingAttentionLoadBalancerType(style).layout.name
        plan = gather_plan(reading, layout, job.n, job.rank, -1, 1)
        rows, problem = plan.exchange.wanted, plan.segments
        own = TOKENS + sum(plan.exchange.n_send)  # as heads are cut out, and by receiver

    def beyond_kernel(kv_heads: int) -> int:
        """Bytes."""
        alive = kv_heads if rings else stride * kv_heads // FEW
        q, k, v = (
            torch.randn(1, TOKENS, n, DIM, device=job.device, dtype=job.dtype)
            for n in (HEADS, kv_heads, kv_heads)
        )
        packed = torch.randn(1, rows, alive, 2 * DIM, device=job.device, dtype=job.dtype)
        queries = q[:, :, : HEADS // kv_heads * alive]
        segments = problem or Segments.dense(TOKENS, TOKENS)
        context = context_of(job, style, alive)

        def sharded() -> Tensor:
            return attend_sharded(q, k, v, context, scale=DIM**-0.5, kernel="torch")

        def kernel() -> Tensor:
            keys, values = packed.split(DIM, -1)
            return attend(queries, keys, values, segments, scale=DIM**-0.5, kernel="torch")

        with torch.no_grad():
            sharded()  # plans, and libraries' workspaces
            kernel()
            return peak(sharded) - peak(kernel)

    more_heads = MANY - FEW if rings else stride * (MANY // FEW - 1)
    per_row = more_heads * 2 * DIM * job.dtype.itemsize
    units = ((beyond_kernel(MANY) - beyond_kernel(FEW)) / per_row - own) / rows
    # A ring hands kernels the half of a shard that queries see: a copy of it.
    most, what = (2.5, "shards") if rings else (2.0, "groups")
    (largest,) = job.largest([units])
    expect_none([f"{units:.2f} {what} > {most}"] if units > most * 1.05 else [])
    return f"{largest:.2f} {what} at most (allowed: {most})"


def _expect_nccl(job: Job) -> None:
    if job.n < 2:
        raise Skipped("for several ranks")
    if job.shares_gpus:
        raise Skipped("ranks share a GPU: gloo takes messages through the host")


def _waits(job: Job, style: str) -> str:
    """As many waits in a model of many layers as in one of few, and none for known lengths."""
    if not job.on_gpus:
        raise Skipped("the host waits for GPUs alone")
    _expect_nccl(job)
    if style == "ulysses" and 4 % job.n:
        raise Skipped(f"{job.n} ranks can't share 4 heads")
    few, many = (_waits_of(job, style, layers) for layers in (6, 12))
    expect_none([f"{few} in 6 layers, {many} in 12"] if few != many else [])
    return f"{few} in the step where lengths are new, whatever the layers; then none"


def _waits_of(job: Job, style: str, layers: int) -> int:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(job.device.type, (job.n,), mesh_dim_names=("cp",))
    kind = RingAttentionLoadBalancerType(style)
    model = small_model(job.dtype, layers).build(init_device=str(job.device))
    model.init_weights(seed=0)
    if style == "ulysses":
        model.apply_cp(mesh, uly=UlyssesContextParallelStyle())
    else:
        model.apply_cp(mesh, ring=RingContextParallelStyle(kind))
    ids = torch.arange(512, device=job.device)[None] % VOCAB_SIZE

    def batch(*ends: int) -> tuple[Tensor, dict[str, Any]]:
        cu = torch.tensor(ends, dtype=torch.int32, device=job.device)
        (mine,), lengths = kind.build(mesh).batch_shard_by_document(
            inputs=[ids], seq_dims=[1], cu_doc_lens=cu, pad_values=[0]
        )
        return mine, lengths

    def step(ids: Tensor, lengths: dict[str, Any]) -> None:
        model(ids, **lengths).float().square().sum().backward()

    step(*batch(0, 256, 512))  # kernels compile
    new = batch(0, 128, 512)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(*new)
    waits = sum(event.name in WAITS for event in profile.events() or ())
    torch.cuda.synchronize()
    with _no_waits():
        step(*new)
    return waits


@contextmanager
def _no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
