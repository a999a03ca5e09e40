"""Checkpoints are whole or absent, and a damaged one is passed over."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo_core.train import checkpoint as module
from olmo_core.train.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    find_checkpoint,
    load_model,
    retire_newer,
    save_checkpoint,
)
from olmo_core.train.disk import remove_folder
from olmo_core.train.errors import CheckpointError, TrainingError


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
        "a list": lambda f: (f / "state.json").write_text("[]"),
        "a number": lambda f: (f / "state.json").write_text("3"),
        "no text": lambda f: (f / "state.json").write_bytes(b"\xff\x81"),
        "deep": lambda f: (f / "state.json").write_text("[" * 100_000),
        "another's": lambda f: shutil.copy(f.parent / "step-00000008" / "state.json", f),
        "a folder": lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
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
    if damage[0] == "another's":
        return
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


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path


def test_no_value_of_the_state_can_change_unnoticed(tmp_path: Path) -> None:
    config = {"lr": 1e-3, "betas": [0.9, 0.95], "model": {"n_layers": 2, "tie": False, "x": None}}
    tensors = {"w": torch.ones(2)}
    folder = save_checkpoint(
        tmp_path, 4, model=tensors, training={}, config=config, extra={"data": "abc"}
    )
    state = json.loads((folder / "state.json").read_text())
    paths = list(leaves(state))
    assert len(paths) == 12
    for path in paths:
        spoiled = copy.deepcopy(state)
        *parents, last = path
        node = functools.reduce(lambda node, key: node[key], parents, spoiled)
        node[last] = [node[last]] if node[last] is None else node[last] * 2 + node[last]
        (folder / "state.json").write_text(json.dumps(spoiled))
        with pytest.raises(CheckpointError, match="step-00000004 is damaged"):
            find_checkpoint(tmp_path)
    (folder / "state.json").write_text(json.dumps(state))
    assert find_checkpoint(tmp_path)[0].config == config


def test_values_that_are_not_finite_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = {"w": torch.ones(3), "rng": torch.arange(3)}, {"v": torch.tensor([1, math.nan])}
    for model, training in ((bad, good), (good, bad)):
        with pytest.raises(TrainingError, match=r"step 3: 1 of 2 values of v are not finite"):
            save_checkpoint(tmp_path, 3, model=model, training=training, config={})
    assert names(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(module, "not_finite", lambda tensors: "")
        save_checkpoint(tmp_path, 3, model=bad, training=bad, config={})
    checkpoint, _ = find_checkpoint(tmp_path)
    for load in (checkpoint.model, checkpoint.training, lambda: load_model(tmp_path)):
        with pytest.raises(CheckpointError, match="1 of 2 values of v are not finite"):
            load()


def test_a_reader_beside_a_writer_never_meets_half_a_checkpoint(tmp_path: Path) -> None:
    """Every folder of the run is removed while the reader goes through it, again and again."""
    stop = threading.Event()
    save(tmp_path, 0)

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            save(tmp_path, step, keep=1)

    writer = threading.Thread(target=write)
    writer.start()
    seen = [0]
    try:
        while seen[-1] < 25:
            checkpoint, weights, problems = load_model(tmp_path)
            assert problems == [] and weights["w"].tolist() == [checkpoint.step] * 3
            seen.append(checkpoint.step)
    finally:
        stop.set()
        writer.join()
    assert seen == sorted(seen)


@pytest.mark.parametrize("moment", ["find", "load"])
def test_a_checkpoint_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 1)
    target, original = {"find": "_verify", "load": "load_file"}[moment], {
        "find": module._verify, "load": module.load_file
    }[moment]  # fmt: skip
    calls = []

    def prune(path: Path, *more: Any) -> Any:
        calls.append(path)
        if len(calls) == 1:
            save(tmp_path, 2, keep=1)
        return original(path, *more)

    monkeypatch.setattr(module, target, prune)
    checkpoint, weights, problems = load_model(tmp_path)
    assert checkpoint.step == 2 and problems == [] and weights["w"].tolist() == [2] * 3
    assert len(calls) == 2


def test_one_folder_removed_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 1)

    def prune(folder: Path, *_: Any) -> Any:
        remove_folder(folder)
        raise FileNotFoundError

    monkeypatch.setattr(module, "_verify", prune)
    with pytest.raises(CheckpointError, match="step-00000001 does not exist"):
        load_model(folder)


def test_steps_are_numbers_and_not_names(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    assert find_checkpoint(tmp_path)[0].step == 100_000_000
    retire_newer(tmp_path, 99_999_999)
    assert names(tmp_path) == ["damaged-step-100000000", "step-99999999", "step-notes"]
    # A copy under a name that is not a step's is a checkpoint like any other.
    shutil.copytree(tmp_path / "step-99999999", tmp_path / "best")
    assert find_checkpoint(tmp_path / "best")[0].step == 99_999_999


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(tmp_path / "file")


def test_weights_alone_are_enough_to_load_a_model(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "training.safetensors").unlink()
    checkpoint, weights, problems = load_model(tmp_path)
    assert checkpoint.step == 1 and weights["w"].tolist() == [1] * 3 and problems == []
    with pytest.raises(CheckpointError, match=r"damaged: training.safetensors"):
        find_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"damaged: model.safetensors is not as it was"):
        load_model(tmp_path)
