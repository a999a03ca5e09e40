"""The programs of ``examples/`` run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", ROOT / "examples" / name, *args],
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
