"""FSDP2 around context and tensor parallelism, with prefetch; and launches that must end.

A job of FSDP, CP and TP has messages of several groups in flight at once. Where a GPU has one queue
for its work (``CUDA_DEVICE_MAX_CONNECTIONS=1``, as Megatron wants it) their order on all ranks is
what keeps them from waiting for each other, so the same is launched once more in that way.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sharded.checks import Check, Skipped
from benchmarks.sharded.job import TOO_LATE, Job
from olmo_core.config import DType
from olmo_core.data import VOCAB_SIZE, PackedDocuments, load_documents
from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig
from olmo_core.nn.attention.config import SlidingWindowAttentionConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import Transformer, TransformerBlockConfig, TransformerConfig
from olmo_core.train.parallel.degrees import deal
from olmo_core.train.parallel.many import ManyRanks

__all__ = ["TOGETHER", "checks", "small_model"]

TOGETHER = "FSDP2 x CP x TP, prefetched"
STEPS = 3


def checks(job: Job, *, launches: bool = True) -> Iterator[Check]:
    """:param launches: Whether to launch jobs of their own; those themselves do not."""
    for style in ("zig_zag", "balanced", "ulysses"):
        yield Check(f"{TOGETHER}, {style}", partial(_together, job, style))
    if launches:
        yield Check("the same, one queue a device", partial(_one_queue, job))
        yield Check("a killed rank ends the job", partial(_killed, job))


def small_model(dtype: torch.dtype, layers: int = 4) -> TransformerConfig:
    """Attention, with a window in two of three layers, and a gated delta net in every other."""
    attention = AttentionConfig(
        n_heads=4,
        n_kv_heads=4,
        bias=False,
        rope=RoPEConfig(),
        sliding_window=SlidingWindowAttentionConfig([32, 32, -1], False, False),
    )
    blocks = [
        TransformerBlockConfig(sequence_mixer=mixer)
        for mixer in (attention, GatedDeltaNetConfig(n_heads=4, head_dim=32))
    ]
    return TransformerConfig(
        128, VOCAB_SIZE, layers, blocks=blocks, pattern=[0, 1], dtype=DType.from_pt(dtype)
    )


def _together(job: Job, style: str) -> str:
    """Some steps of training: the losses of one process, and none waits for ever."""
    if job.n < 2:
        raise Skipped("for several ranks")
    tp = 2 if job.n % 4 == 0 else 1
    cp = 2 if job.n % (2 * tp) == 0 else job.n // tp
    if style == "ulysses" and 4 % (cp * tp):
        raise Skipped(f"{cp * tp} ranks can't share 4 heads")
    ranks = ManyRanks(deal(job.n, cp=style, cp_degree=cp, tp_degree=tp))
    of, config = ranks.degrees, small_model(job.dtype)
    data = PackedDocuments(
        load_documents(), batch_size=of.data, sequence_length=512, max_doc_len=200
    )

    def losses(share: bool) -> list[float]:
        model = config.build(init_device=str(job.device))
        model.init_weights(seed=0)
        if share:
            ranks.share_model(model, job.device)
            _prefetch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, foreach=False)  # over two meshes
        found = []
        for step in range(STEPS):
            whole = data.batch(step).to(job.device)
            if share:
                mine = ranks.shard(data.batch(step, share=ranks.share)).to(job.device)
                ids, labels, lengths = mine
            else:
                ids, labels, lengths = whole.input_ids, whole.labels, whole.doc_lens._asdict()
            count = (whole.labels != -100).sum()
            loss = model(ids, labels=labels, loss_reduction="sum", **lengths) / count
            # FSDP averages over its ranks, of which each has a part of the sum.
            (loss * (of.fsdp if share else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().double()
            if share:
                dist.all_reduce(total)
                total /= of.tp
            found.append(total.item())
        return found

    got, want = losses(True), losses(False)
    allowed = torch.finfo(job.dtype).eps ** 0.5 / 4
    off = max(abs(a - b) / b for a, b in zip(got, want, strict=True))
    if not off <= allowed:
        raise AssertionError(f"{of}: losses {got}, of one process {want}")
    return f"{of}: {STEPS} losses within {off:.0e} of one process's (allowed: {allowed:.0e})"


def _prefetch(model: Transformer) -> None:
    """Each group of parameters is asked for while the one before computes, both ways."""
    from torch.distributed.fsdp import FSDPModule

    groups = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    for before, after in pairwise(groups):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])


def _one_queue(job: Job) -> str:
    """A launch of its own: the variable is read before a GPU is first used."""
    _expect_one_node(job)
    arguments = ["-m", "benchmarks.context_parallel", "checks", "--only", TOGETHER, "--no-launches"]
    done = job.launch(arguments, ranks=job.n, limit=300, CUDA_DEVICE_MAX_CONNECTIONS="1")
    if done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}: {_last_lines(done.stdout)}")
    counts = re.findall(r"^\d+ passed, .*", done.stdout, re.MULTILINE)
    return f"CUDA_DEVICE_MAX_CONNECTIONS=1: {counts[-1]}"


def _killed(job: Job) -> str:
    _expect_one_node(job)
    begun = time.perf_counter()
    done = job.launch(["-m", "benchmarks.sharded.killed"], ranks=job.n, limit=120)
    seconds = time.perf_counter() - begun
    if done.returncode in (0, TOO_LATE) or "step" not in done.stdout:
        raise AssertionError(
            f"exit code {done.returncode} after {seconds:.0f} s: {_last_lines(done.stdout)}"
        )
    named = re.search(rf"rank +: {job.n - 1} .*\n +exitcode +: -9", done.stdout)
    return f"exit code {done.returncode} after {seconds:.0f} s" + (
        f", which names rank {job.n - 1}" if named else ""
    )


def _expect_one_node(job: Job) -> None:
    if not job.is_one_node:
        raise Skipped("launches a job of its own, on one node")
    if job.n < 2:
        raise Skipped("for several ranks")


def _last_lines(output: Any) -> str:
    return " | ".join(str(output).strip().splitlines()[-3:])
