"""Context parallelism on the ranks that torchrun has started: checks first, then times.

    torchrun --nproc-per-node 8 -m benchmarks.context_parallel [checks] [times] [trace] [train]

Two ranks or more; over NCCL where each has a GPU, over gloo elsewhere. Without torchrun it starts
a rank for each GPU.

*checks*: every layer of ``verify`` on every style of sharding, with and without documents and
windows, against the dense float64 reference, eager, checkpointed and compiled; the same bits when
asked twice; input that differs between ranks is an error on all of them; FSDP2 x CP x TP with
prefetch ends; what other ranks' keys take of memory; the host's waits; a killed rank ends the job.
A line each, and an exit code other than 0 if one fails. Run them before you believe a time.

*times*: the share of the ideal that N ranks reach, t1 / (N tN), forward and forward + backward: t1
is one device's time for all N T tokens (from as many parts as there are ranks where it can't hold
them: marked ``*``), tN the slowest rank's for its T tokens. Under four masks: one document,
documents of 12-24K tokens, log-normal ones (median 1500, sigma 1.2), a window of 4096. *silent* is
the same with messages that are answered at once, so what it is above is exposed communication.
Then the time to plan a batch and to agree on it, which is a step's whatever its layers, the gated
delta net by exchange of states against Ulysses, and torch's own experimental context_parallel.

*trace*: a profile of one forward, ``$OUT/trace.json`` for chrome://tracing or Perfetto, and the
share of each group's message that is beneath the kernel of the group before it.

*train*: tokens a second of ``olmo-core train`` on one rank and on all, as jobs of their own.

A line is printed as soon as it is known, and ``$OUT`` has all of them as JSON, so that a time limit
loses nothing that was measured. Sizes: ``benchmarks/sharded/sizes.py``; ``--tiny`` tries every line
of it on two CPU ranks in a minute.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from olmo_core.diagnostics.verify import KERNEL, mixer_names
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    from benchmarks.sharded.job import Job

PARTS = ("checks", "times", "trace", "train")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for. Exits with a message if it can't be done."""
    parser = argparse.ArgumentParser("benchmarks.context_parallel", allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; or all")
    parser.add_argument("--tiny", action="store_true", help="sizes for CPUs, to try the script")
    parser.add_argument("--only", default="", metavar="TEXT", help="checks whose name contains it")
    parser.add_argument("--mixer", action="append", default=[], help="of verify's; several times")
    parser.add_argument("--no-launches", action="store_true", help="no checks by jobs of their own")
    parser.add_argument(
        "--patience", type=_seconds, default=120.0, help="seconds to wait for a rank, 1 to 86400"
    )
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.parts} - {*PARTS}):
        parser.error(f"no such part: {', '.join(unknown)}. Choose from {', '.join(PARTS)}.")
    options.parts = options.parts or list(PARTS)
    if options.mixer:
        try:
            options.mixer = [name for name in mixer_names(options.mixer) if name != KERNEL]
        except OLMoConfigurationError as error:
            parser.error(str(error))
        if not options.mixer:  # none would stand for all
            parser.error(f"{KERNEL} is no layer, and what ranks share is one. Name a layer.")
    return options


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 86400:  # NaN neither
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 86400 seconds")
    return seconds


def refuse_launch() -> None:
    """Exit with a message if these ranks can't do it, before they wait for each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        sys.exit("needs two ranks or more: one shares nothing, and any check of it would pass.")
    if os.environ["RANK"] == "0" and "OUT" in os.environ:
        folder = Path(os.environ["OUT"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            sys.exit(f"OUT={folder} can't be written: {error.strerror}.")


def become_torchrun(arguments: Sequence[str]) -> None:
    """With a rank for each GPU of this machine."""
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks < 2:
        sys.exit(
            "needs two GPUs or more. To try it on CPUs: "
            "torchrun --nproc-per-node 2 -m benchmarks.context_parallel --tiny"
        )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), "-m", "benchmarks.context_parallel", *arguments,
    ]  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or torchrun says at length that it sets it
    os.execv(sys.executable, command)


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    if "RANK" not in os.environ:
        become_torchrun(arguments)
    refuse_launch()
    # cuBLAS is deterministic only if it is told before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from benchmarks.sharded.job import Job

    job = Job(patience=options.patience, tiny=options.tiny)
    if "checks" in options.parts and not checked(job, options):
        return 1  # without a word to ranks that may be lost
    if "times" in options.parts:
        from benchmarks.sharded.times import measure

        measure(job)
    if "trace" in options.parts:
        from benchmarks.sharded.trace import trace

        trace(job)
    if "train" in options.parts:
        from benchmarks.sharded.training import train

        train(job)
    job.leave()
    return 0


def checked(job: Job, options: argparse.Namespace) -> bool:
    """Whether all checks have passed that were asked for."""
    from benchmarks.sharded import answers, composed, costs, refusals
    from benchmarks.sharded.checks import Check, run_checks

    def every() -> Iterator[Check]:
        quick, slow = answers.checks(job, options.mixer)
        yield from quick
        yield from refusals.checks(job)
        yield from costs.checks(job)
        yield from composed.checks(job, launches=not options.no_launches)
        yield from slow

    chosen = [check for check in every() if options.only in check.name]
    if not chosen:
        job.say(f"no check's name contains {options.only!r}.")
        return False
    return run_checks(job, chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
