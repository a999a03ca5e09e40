"""The programs of ``examples/`` run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *args: str, ranks: int = 0) -> str:
    """What an example prints; by torchrun on so many ranks, if any."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [
            *[sys.executable, "-W", "error::UserWarning", *(torchrun if ranks else [])],
            *[ROOT / "examples" / name, *args],
        ],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training() -> None:
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) bits", run("train.py", "6"))]
    assert losses[-1] < losses[0]


@pytest.mark.slow  # README's own example runs always
def test_context_parallelism() -> None:
    shown = run("context_parallel.py", ranks=2)
    (rows,) = re.findall(r"(\d+) of 1024 tokens", shown)
    ((whole, sharded),) = re.findall(r"loss of one rank ([\d.]+), of 2 ([\d.]+)", shown)
    (difference,) = re.findall(r"differ by (\S+) of", shown)
    assert int(rows) <= 520  # about half
    assert float(whole) == pytest.approx(float(sharded), abs=3e-6)
    assert 0 < float(difference) < 1e-4


@pytest.mark.slow
def test_packed_documents() -> None:
    pytest.importorskip("transformers")
    shown = re.findall(
        r"(transformers|into|ops) .*?([\d.]+e[-+]\d+)$", run("packed_documents.py"), re.M
    )
    errors = [float(error) for _, error in shown]
    assert len(errors) == 6
    for leak, ours, mended in (errors[:3], errors[3:]):
        assert leak > 1 and max(ours, mended) < 1e-4
