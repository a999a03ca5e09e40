"""The command: table, JSON, plot, bad options, and Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from olmo_core.cli.main import app

SMALL = ["--device", "cpu", "--heads", "2", "--head-dim", "16", "--window", "9", "--batch", "1"]
QUICK = [*SMALL, "--seconds", "0.001", "-t", "24", "-t", "48"]


def bench(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


def test_table_json_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report, plot = tmp_path / "b.json", tmp_path / "b.png"
    result = bench(*QUICK, "--json", str(report), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 100 for line in result.output.splitlines())
    for word in ("full", "window", "documents", "decode", "sdpa", "TFLOP/s", "GB/s"):
        assert word in result.output
    content = json.loads(report.read_text())
    mine = {(r["case"], r["tokens"]): r for r in content["rows"] if r["name"] == "torch"}
    assert len(mine) == 8
    assert all(r["error"] < 1e-5 for r in mine.values())
    assert plot.read_bytes()[:4] == b"\x89PNG"
    if not torch.cuda.is_available():
        assert set(content["absent"]) == {"flash_2", "flash_3", "flash_4", "te"}
        assert "not here: te: needs an NVIDIA GPU" in result.output


def test_only_what_was_asked_for() -> None:
    result = bench(*QUICK, "-c", "window", "--no-peers", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "bfloat16" in result.output and "sdpa" not in result.output
    assert (
        "decode"
        not in result.output.split("window", 1)[1].split("not here")[0].split("max error:")[0]
    )


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core.diagnostics import bench as measuring

    whole = measuring.run

    def interrupted(*args: Any) -> Any:
        yield next(whole(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "run", interrupted)
    report = tmp_path / "b.json"
    result = bench(*QUICK, "--json", str(report))
    assert result.exit_code == 130
    assert "interrupted" in result.output and "torch" in result.output
    assert len(json.loads(report.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--backend", "nope"], "no attention backend 'nope'"),
        (["--case", "nope"], "--case nope: choose from full, window, documents, decode"),
        (["--dtype", "int8"], "--dtype int8: choose from"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--heads", "6", "--kv-heads", "4"], "multiple of --kv-heads, got 6 and 4"),
        (["--heads", "0"], "n_heads must be positive, got 0"),
        (["--window", "-1"], "window must be positive, got -1"),
        (["--seconds", "nan"], "seconds must be positive, got nan"),
        (["--plot", "x.pdf"], "name it *.png"),
        (["--plot", "no/such/x.png"], "does not exist"),
        (["--device", "quantum"], "device 'quantum' can't be used"),
        (["--device", "meta"], "device 'meta' can't be used"),
        (["--seconds", "inf"], "seconds must be at most 3600, got inf"),
        (["--seconds", "1e300"], "seconds must be at most 3600"),
        (["--batch", "99999999999999999999"], "batch must be at most 2147483647"),
        (["--tokens", "99999999999999999999"], "--tokens must be at most 2147483647"),
        (["--tokens", "2000000000"], "GiB of memory"),
        (["--head-dim", "2000000000"], "GiB of memory"),
        (["-c", "decode", "--batch", "2000000000"], "GiB of memory"),
        (["--json", ""], "the path is empty"),
        (["--json", "."], "is a folder"),
        (["--json", "pyproject.toml/x.json"], "--json pyproject.toml/x.json can't be written"),
        (["--json", "x" * 300], "can't be written: File name too long"),
        (["--plot", "x" * 300 + ".png"], "can't be written: File name too long"),
        (["--tokens", "many"], "Invalid value for '--tokens'"),
    ],
)
def test_bad_options_cost_one_message(args: list[str], message: str) -> None:
    result = bench(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_backend_that_can_not_run_is_refused_with_its_reasons() -> None:
    result = bench("--backend", "flash_4")
    assert result.exit_code == 2
    assert "No backend to time can run here" in result.output
    assert "flash_attn.cute is not installed" in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_report_that_can_not_be_written_costs_one_message() -> None:
    result = bench(*QUICK[:-2], "-c", "full", "--no-peers", "--json", "/dev/full")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "/dev/full can't be written: No space left on device" in result.output


def test_nothing_measured_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core.diagnostics import bench as measuring

    def fails(*args: object) -> float:
        raise MemoryError("no room")

    monkeypatch.setattr(measuring, "median_ms", fails)
    result = bench(*QUICK[:-2], "-c", "full", "--no-peers")
    assert result.exit_code == 1
    assert "MemoryError: no room" in result.output and "Nothing could be measured" in result.output
