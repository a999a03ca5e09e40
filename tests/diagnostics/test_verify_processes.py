"""The same outcomes from several processes; a crash costs the cell that crashed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from olmo_core.diagnostics.verify import Cell, cells, run
from olmo_core.diagnostics.verify_processes import run_in_processes

CPU = torch.device("cpu")

CRASHING = """
import os, signal
from olmo_core.diagnostics.verify import Outcome

def run(cells, device):
    for cell in cells:
        if cell.prop == "rollback":
            os.kill(os.getpid(), signal.SIGSEGV)
        if cell.prop == "chunks":
            raise KeyError("a fault of verify itself")
        yield Outcome(cell, "passed", 0.0, 0.0)
"""


@pytest.mark.slow
def test_processes_answer_as_one_does() -> None:
    todo = [c for c in cells(["window", "gdn"], ["torch"]) if c.dtype == torch.float64]
    todo = [c for c in todo if c.prop in ("whole", "rollback", "ring")]
    alone = {o.cell: o for o in run(todo, CPU)}
    together = {o.cell: o for o in run_in_processes(todo, CPU, 2)}
    assert list(alone) == todo and set(together) == set(todo)
    for cell, outcome in together.items():
        assert (outcome.status, outcome.reasons) == (alone[cell].status, alone[cell].reasons)
        assert outcome.bound == alone[cell].bound


def test_a_crash_costs_one_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crashing_verify.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    crashing = importlib.import_module("crashing_verify").run
    props = ("whole", "rollback", "chunks", "decode")
    todo = [Cell("mha", "torch", torch.float32, p) for p in props]
    todo += [Cell("gqa", "torch", torch.float32, p) for p in ("whole", "decode")]
    outcomes = {o.cell: o for o in run_in_processes(todo, CPU, 2, crashing)}
    assert set(outcomes) == set(todo)
    failed = {o.cell.prop: o.reasons[0] for o in outcomes.values() if o.status == "failed"}
    assert set(failed) == {"rollback", "chunks"}
    assert "its process died: SIGSEGV" in failed["rollback"]
    assert "exit code 1" in failed["chunks"]
    assert "a fault of verify itself" in capfd.readouterr().err
