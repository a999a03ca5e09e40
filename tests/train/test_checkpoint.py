"""Checkpoints are whole or absent, and a damaged one is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo_core.train import checkpoint as module
from olmo_core.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    find_checkpoint,
    retire_newer,
    save_checkpoint,
)


def save(run: Path, step: int, **options: Any) -> Path:
    tensors = {"w": torch.full((3,), float(step))}
    return save_checkpoint(
        run, step, model=tensors, training={"rng.cpu": torch.arange(4)}, config={"a": 1}, **options
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_round_trip_and_only_the_last_two_stay(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    for step in (5, 100, 2000):
        folder = save(run, step, extra={"digest": "x"})
    assert names(run) == ["step-00000100", "step-00002000"]
    found, problems = find_checkpoint(run)
    assert found == Checkpoint(folder, 2000, {"a": 1}, {"digest": "x"}) and problems == []
    assert found.model()["w"].tolist() == [2000] * 3
    assert found.training()["rng.cpu"].tolist() == [0, 1, 2, 3]
    assert find_checkpoint(run / "step-00000100")[0].step == 100
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize(
    "damage",
    {
        "cut": lambda f: (f / "model.safetensors").write_bytes(b"123"),
        "flipped": lambda f: (f / "training.safetensors").write_bytes(
            (f / "training.safetensors").read_bytes()[:-1] + b"\x7f"
        ),
        "absent": lambda f: (f / "training.safetensors").unlink(),
        "no state": lambda f: (f / "state.json").unlink(),
        "half a state": lambda f: (f / "state.json").write_text('{"step": 9'),
        "other state": lambda f: (f / "state.json").write_text("{}"),
        "later format": lambda f: (f / "state.json").write_text(json.dumps({"format": 99})),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: Any) -> None:
    save(tmp_path, 8)
    damage[1](save(tmp_path, 9))
    found, (problem,) = find_checkpoint(tmp_path)
    assert found.step == 8 and problem.startswith("step-00000009 is damaged: ")
    retire_newer(tmp_path, found.step)
    assert names(tmp_path) == ["damaged-step-00000009", "step-00000008"]
    damage[1](tmp_path / "step-00000008")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint.*step-00000008 is damaged"):
        find_checkpoint(tmp_path)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("point", ["save_file", "fsync", "rename"])
def test_a_death_at_any_point_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    save(tmp_path, 1)
    calls = {"save_file": module, "fsync": os, "rename": os}
    original = getattr(calls[point], point)
    for count in range(1, 8):
        left = count

        def dies(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(calls[point], point, dies)
            try:
                save(tmp_path, 2)
            except KeyboardInterrupt:
                pass
            else:
                break
        found, problems = find_checkpoint(tmp_path)
        assert problems == [] and found.model()["w"].tolist() == [found.step] * 3
    assert count > 1, f"{point} was never called"
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_full_disk_is_named_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    message = r"step 2 .*disk is full.*--resume.*Last whole checkpoint: step-00000001"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"old")
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path)[0].step == 2
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-00000001", "step-00000002"]
