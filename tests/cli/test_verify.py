"""The command: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from olmo_core.cli.main import app
from olmo_core.diagnostics import torchrun
from olmo_core.nn.attention.kernels.softmax import get_kernel, register_kernel

KERNELS = ["verify", "--mixer", "kernel", "--quick", "--device", "cpu"]


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def test_all_green(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = run(*KERNELS, "--json", str(report))
    assert result.exit_code == 0, result.output
    assert "merged blocks = whole" in result.output and "≤" in result.output
    assert all(len(line) <= 100 for line in result.output.splitlines())
    content = json.loads(report.read_text())
    assert content["machine"]["torch"] == torch.__version__
    by_status: dict[str, int] = {}
    for cell in content["cells"]:
        by_status[cell["status"]] = by_status.get(cell["status"], 0) + 1
        if cell["status"] == "passed":
            assert cell["error"] <= cell["bound"]
        else:
            assert cell["reasons"]
    assert by_status["passed"] == 22 and "failed" not in by_status
    assert f"22 cells passed, 0 failed, {by_status['skipped']} skipped" in result.output


class OffByOnePercent:
    """Torch's kernel with a wrong gradient of the keys."""

    name = "torch"

    def __init__(self) -> None:
        self.good = get_kernel("torch")
        self.forward = self.good.forward

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        dq, dk, dv = self.good.backward(*args, **kwargs)
        return dq, dk * 1.01, dv


@pytest.fixture
def broken_kernel() -> Iterator[None]:
    good = get_kernel("torch")
    register_kernel(OffByOnePercent())
    yield
    register_kernel(good)


@pytest.mark.usefixtures("broken_kernel")
def test_a_broken_kernel_exits_with_1_and_says_what_is_off() -> None:
    result = run(*KERNELS)
    assert result.exit_code == 1
    assert "FAILED kernel, torch, float32: = reference" in result.output
    assert "\n  dk is off by " in result.output
    assert "again: olmo-core verify --mixer kernel --backend torch" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_nothing_checked_is_not_success() -> None:
    result = run(*KERNELS, "--backend", "te")
    assert result.exit_code == 1
    assert "Nothing could be checked here" in result.output
    assert "transformer_engine is not installed" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mixer", "nope"], "no mixer 'nope'"),
        (["--backend", "flash_9"], "no attention backend 'flash_9'. Choose from torch, flash_2"),
        (["--device", "nope"], "device 'nope' can't be used here"),
        (["--device", "meta"], "has no values"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--json", "."], "is a folder"),
        (["--json", ""], "the path is empty"),
        (["--json", "x" * 300], "can't be written: File name too long"),
        (["--json", "pyproject.toml/x"], "--json pyproject.toml/x can't be written"),
        (["--jobs", "9999999999"], "more than four processes a core"),
        (["--ranks", "9999999999"], "more than four processes a core"),
        (["--mixer", "gdn", "--backend", "te"], "the torch backend alone"),
    ],
)
def test_bad_options_cost_one_message(args: list[str], message: str) -> None:
    result = run("verify", *args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) <= 4


def test_ranks_that_torchrun_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    result = run(*KERNELS, "--ranks", "3")
    assert result.exit_code == 2
    assert "--ranks 3, but torchrun has started 2: leave --ranks out" in result.output


def test_the_options_are_the_first_rank_s_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells what is wrong with them, once, and its disk alone must have room for the report."""
    served = []
    monkeypatch.setattr(torchrun, "started_ranks", lambda where: nullcontext(served.append(where)))
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    result = run(*KERNELS, "--mixer", "nope", "--json", "no/such/folder/x.json")
    assert (result.exit_code, result.output) == (0, "")
    assert served == [torch.device("cpu")]
    monkeypatch.setenv("RANK", "0")
    assert "no mixer 'nope'" in run(*KERNELS, "--mixer", "nope").output


@pytest.mark.slow
def test_under_torchrun_one_rank_prints(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    verify = ["-m", "olmo_core", "verify", "-m", "fused-window", "-b", "torch", "--quick"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
         *verify, "--device", "cpu", "--json", str(report)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cells passed") == 1
    assert "heads dealt, sharded = whole" in done.stdout
    cells = [c for c in json.loads(report.read_text())["cells"] if c["property"] == "tp_cp"]
    assert [c["status"] for c in cells] == ["passed", "passed"]


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_and_their_ranks() -> None:
    """As a terminal sends it, to all of them; each holds the other end of its output."""
    verify = [sys.executable, "-m", "olmo_core", "verify", "-m", "gqa", "-m", "kernel"]
    command = subprocess.Popen(
        [*verify, "-b", "torch", "--device", "cpu", "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    of = [str(command.pid)]
    while len(of) < 6:  # workers, the tracker of resources, ranks
        time.sleep(0.2)
        of = [str(command.pid), *children.read_text().split()]
        for pid in of[1:]:
            of += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.killpg(command.pid, signal.SIGINT)
    out, err = command.communicate(timeout=60)  # when all have closed it
    assert command.returncode == 130, err
    assert "interrupted: " in out and "Traceback" not in err


def test_ctrl_c_prints_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core.diagnostics import verify

    whole = verify.run

    def interrupted(*args: Any) -> Any:
        yield from [outcome for outcome, _ in zip(whole(*args), range(2))]
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", interrupted)
    result = run(*KERNELS)
    assert result.exit_code == 130
    assert "2 cells passed" in result.output and "interrupted" in result.output
