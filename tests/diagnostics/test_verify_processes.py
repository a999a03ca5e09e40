"""The same outcomes from several processes; a crash costs the cell that crashed."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

SHARDED = """
import os, time
from pathlib import Path
from olmo_core.diagnostics import sharded
from olmo_core.diagnostics.ranks import Ranks
from olmo_core.diagnostics.verify import Outcome

def serve(rank, n, folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60 if folder.endswith("late") else 0)
    return os.getpid()

def run(cells, device):
    for cell in cells:
        if cell.is_sharded:
            ranks = sharded._STARTED.setdefault(2, Ranks(2))
            asked = ranks.run(serve, os.environ["PIDS"], timeout=100)
            yield Outcome(cell, "passed", reasons=tuple(map(str, asked)))
        else:
            yield Outcome(cell, "passed", reasons=(str(os.getpid()),))
"""


def module_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``run`` of a module that processes can import."""
    name = f"verify_{folder.name}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    run: Callable[..., Any] = importlib.import_module(name).run
    return run


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.distributed
def test_sharded_cells_go_to_one_process_with_ranks_of_its_own_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path))
    todo = [
        Cell(mixer, "torch", torch.float32, prop)
        for mixer in ("mha", "gqa")
        for prop in ("whole", "zig_zag", "ulysses")
    ]
    sharded = module_of(SHARDED, tmp_path, monkeypatch)
    outcomes = {o.cell: o for o in run_in_processes(todo, CPU, 2, sharded)}
    assert set(outcomes) == set(todo)
    ranks = {o.reasons for o in outcomes.values() if o.cell.is_sharded}
    assert len(ranks) == 1  # the same two for both layers
    assert not any(is_alive(int(pid)) for reasons in ranks for pid in reasons)


@pytest.mark.distributed
def test_whoever_stops_listening_ends_the_processes_and_their_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "late"
    folder.mkdir()
    monkeypatch.setenv("PIDS", str(folder))
    todo = [Cell("mha", "torch", torch.float32, prop) for prop in ("whole", "zig_zag")]
    answers = run_in_processes(todo, CPU, 2, module_of(SHARDED, tmp_path, monkeypatch))
    assert next(answers).cell.prop == "whole"
    while len(pids := list(folder.iterdir())) < 2:
        time.sleep(0.1)
    answers.close()
    assert not any(is_alive(int(pid.name)) for pid in pids)


@pytest.mark.slow
def test_processes_answer_as_one_does() -> None:
    todo = [c for c in cells(["window", "gdn"], ["torch"]) if c.dtype == torch.float64]
    todo = [c for c in todo if c.prop in ("whole", "rollback", "zig_zag", "tp")]
    alone = {o.cell: o for o in run(todo, CPU)}
    together = {o.cell: o for o in run_in_processes(todo, CPU, 2)}
    assert list(alone) == todo and set(together) == set(todo)
    for cell, outcome in together.items():
        assert (outcome.status, outcome.reasons) == (alone[cell].status, alone[cell].reasons)
        assert outcome.bound == alone[cell].bound


def test_a_crash_costs_one_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    crashing = module_of(CRASHING, tmp_path, monkeypatch)
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
