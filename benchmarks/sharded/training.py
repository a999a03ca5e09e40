"""``olmo-core train`` on one rank and on all: tokens a second, as jobs of their own."""

from __future__ import annotations

import re
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.sharded.job import Job
from olmo_core.train.metrics import read_metrics

__all__ = ["train"]

WARM = 3
"""Steps that are not counted."""


def train(job: Job) -> None:
    """The same batches, of a row for each rank, shared in each way."""
    job.say("\ntrain, tokens a second; the batch has a row for each rank")
    if not job.is_one_node:
        job.say("  skipped: launches jobs of its own, on one node")
        return
    alone = _rate(job, 1, [])
    _say(job, "one rank", 1, alone, alone)
    for name, options in (
        ("FSDP2", []),
        ("ring", ["--cp", "zig_zag"]),
        ("balanced", ["--cp", "balanced"]),
        ("ulysses", ["--cp", "ulysses"]),
        ("tensors", ["--tp-degree", str(job.n)]),
    ):
        _say(job, name, job.n, _rate(job, job.n, options), alone)


def _say(job: Job, name: str, ranks: int, rate: float | str, alone: float | str) -> None:
    job.found("train", way=name, ranks=ranks, tokens_per_second=rate)
    if isinstance(rate, str):
        job.say(f"  {name:37}{rate[:100]}")
        return
    share = f"{rate / (ranks * alone):7.1%}" if isinstance(alone, float) else ""
    job.say(f"  {name:37}{rate:9.0f}{share}")


def _rate(job: Job, ranks: int, options: list[str]) -> float | str:
    """The median over steps, or why there is none."""
    sizes = job.sizes
    with tempfile.TemporaryDirectory() as folder:
        run = job.tell(str(Path(folder, "run")))[0]
        steps = sizes.train_steps
        never = [f"eval_every={steps + 1}", f"save_every={steps + 1}", "eval_batches=1"]
        done = job.launch(
            [
                "-m", "olmo_core", "train", "-p", "tiny", "--save-folder", run, *options,
                "--steps", str(steps), "--sample", "0", f"data.batch_size={job.n}",
                f"device={job.device.type}", *never, *sizes.train_options,
            ],
            ranks=ranks,
            limit=300,
        )  # fmt: skip
        rows = read_metrics(Path(run, "metrics.jsonl")) if job.is_first else []
    seconds = [row["seconds"] for row in rows]
    taken = [b - a for a, b in pairwise(seconds)][WARM - 1 :]
    errors = re.findall(r"^.*Error\b.*$", done.stdout, re.MULTILINE) or [done.stdout[-200:]]
    rate: float | str = f"exit code {done.returncode}: {errors[0].strip()}"
    if done.returncode == 0 and taken:
        length = next(o for o in sizes.train_options if o.startswith("data.sequence_length="))
        rate = job.n * int(length.split("=")[1]) / statistics.median(taken)
    return job.tell(rate)[0]
