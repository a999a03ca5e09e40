"""The ranks that torchrun has started, and what they say: one line for each thing found, at once.

All ranks run the same code. What one of them finds wrong, all of them know before they go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sharded.sizes import CPU, GPU, TINY, Sizes
from olmo_core.distributed.launched import join_started

__all__ = ["TOO_LATE", "Job"]

ROOT = Path(__file__).parents[2]
TOO_LATE = 124
"""Exit code of a launch that did not end in time."""
_LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC")
"""How the variables begin that torchrun sets: a launch inside a rank must not inherit them."""


@dataclass
class Job:
    """This process among the ranks of the job.

    :param patience: Seconds after which a rank that waits for the others gives up.
    """

    patience: float = 120.0
    tiny: bool = False
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """All that was found so far, by part of the benchmark."""

    def __post_init__(self) -> None:
        on_gpus = torch.cuda.is_available()
        join_started(timedelta(seconds=self.patience), on_gpus=on_gpus)
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else _cpu()
        self._talk = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * self.patience))
        # What came of a check is told here alone: a rank may have left others in the middle of it.
        self._word = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * self.patience))
        # While the first rank has launched something else, the others wait for as long as it takes.
        self._aside = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def on_gpus(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpus else torch.float32

    @property
    def sizes(self) -> Sizes:
        """What is measured: the one place that says how large things are."""
        return TINY if self.tiny else GPU if self.on_gpus else CPU

    @property
    def shares_gpus(self) -> bool:
        """Whether several ranks are on one GPU: what they compute is right, their times are not."""
        return self.on_gpus and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > (
            torch.cuda.device_count()
        )

    @property
    def is_one_node(self) -> bool:
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.n)) == self.n

    @cached_property
    def out(self) -> Path | None:
        """Where files go; only the first rank's."""
        if not self.is_first or "OUT" not in os.environ:
            return None
        folder = Path(os.environ["OUT"])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def describe(self) -> str:
        what = torch.cuda.get_device_name() if self.on_gpus else "CPU"
        over = "nccl" if self.on_gpus and not self.shares_gpus else "gloo"
        return f"{self.n} ranks on {what} over {over}, torch {torch.__version__}"

    def say(self, text: str) -> None:
        """Print on the first rank, at once: a time limit loses no line."""
        if self.is_first:
            print(text, flush=True)

    def found(self, part: str, /, **row: Any) -> None:
        """Keep a row, and write all that were found so far to ``$OUT/context_parallel.json``."""
        self.rows.setdefault(part, []).append(row)
        if self.out is not None:
            content = json.dumps({"job": self.describe(), **self.rows}, indent=1)
            (self.out / "context_parallel.json").write_text(content + "\n")

    def tell(self, value: Any) -> list[Any]:
        """Each rank's value, for all."""
        values: list[Any] = [None] * self.n
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def last_word(self, value: Any) -> list[Any]:
        """Likewise; also after a rank has left what all did together."""
        values: list[Any] = [None] * self.n
        dist.all_gather_object(values, value, group=self._word)
        return values

    def line_up(self) -> None:
        """Wait until every rank is here."""
        if self.on_gpus:
            torch.cuda.synchronize()
        dist.barrier(group=self._talk)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of each value the largest of any rank."""
        whole = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=self._talk)
        found: list[float] = whole.tolist()
        return found

    def launch(
        self, arguments: Sequence[str], *, ranks: int, limit: float, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A launch of its own by the first rank, while the others wait; the outcome, on all ranks.

        :param arguments: What torchrun is to run.
        :param limit: Seconds after which it is ended; its exit code is then :data:`TOO_LATE`.
        """
        if self.on_gpus:
            torch.cuda.empty_cache()
            self.line_up()
        done = _launched(arguments, ranks, limit, environment) if self.is_first else None
        outcome = [done]
        dist.broadcast_object_list(outcome, src=0, group=self._aside)
        assert outcome[0] is not None
        return outcome[0]

    def leave(self) -> None:
        dist.destroy_process_group()


def _cpu() -> torch.device:
    torch.set_num_threads(1)
    return torch.device("cpu")


def _launched(
    arguments: Sequence[str], ranks: int, limit: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHED_BY)}
    paths = [str(ROOT / "src"), str(ROOT), inherited.get("PYTHONPATH", "")]
    inherited["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**inherited, **environment},
    )  # fmt: skip
    code = None
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks, within half a minute
        code, (output, _) = TOO_LATE, process.communicate()
    except BaseException:
        process.terminate()
        raise
    return subprocess.CompletedProcess(command, code or process.returncode, output, "")
