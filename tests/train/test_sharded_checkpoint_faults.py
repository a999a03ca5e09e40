"""What one rank meets all raise, damage is passed over, and what does not fit is refused."""

from __future__ import annotations

import errno
import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gloo_ranks import errors_on_ranks, on_ranks
from nn.attention.parallel.sharing import mesh_of, whole
from olmo_core.train import sharded_checkpoint as module
from olmo_core.train.checkpoint import find_checkpoint, find_weights, load_model, save_checkpoint
from olmo_core.train.errors import CheckpointError
from olmo_core.train.sharded_checkpoint import find_checkpoint_together, save_sharded

pytestmark = pytest.mark.distributed


def tensors(rank: int, n: int, value: float) -> dict[str, dict[str, Tensor]]:
    from torch.distributed.tensor import Shard, distribute_tensor

    w = distribute_tensor(torch.full((5, 3), value), mesh_of(n), [Shard(0)])
    training = {"optimizer.exp_avg.w": w.clone(), "optimizer.step.w": torch.tensor(value)}
    return {"model": {"w": w}, "training": training | {"rng.cpu": torch.arange(4)}}


def save(rank: int, n: int, run: Path, step: int, **options: Any) -> None:
    save_sharded(run, step, **tensors(rank, n, float(step)), config={}, **options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def steps(run: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(run)]


def test_the_last_two_stay_and_leftovers_go(tmp_path: Path) -> None:
    for step in (1, 2):
        on_ranks(2, save, tmp_path, step)
    interrupted = tmp_path / ".writing-step-00000003"
    shutil.copytree(tmp_path / "step-00000001", interrupted)
    stale = "shard-00003-model-00001-of-00001.safetensors"
    shutil.copy(next(interrupted.glob("model/*")), interrupted / "model" / stale)
    shutil.copytree(interrupted, tmp_path / ".writing-step-00000009")
    on_ranks(2, save, tmp_path, 3)
    assert steps(tmp_path) == [2, 3]
    assert not (tmp_path / "step-00000003" / "model" / stale).exists()
    on_ranks(2, save, tmp_path, 3)  # again, as after a resume
    assert steps(tmp_path) == [2, 3] and find_checkpoint(tmp_path)[0].step == 3
    # A file that came later is none of the checkpoint's.
    shutil.copy(
        tmp_path / "step-00000002/model/shard-00001-model-00001-of-00001.safetensors",
        tmp_path / "step-00000003" / "model" / stale,
    )
    assert find_checkpoint(tmp_path)[0].model()["w"].tolist() == [[3.0] * 3] * 5


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")  # does not unpickle


def fault(rank: int, n: int, run: Path, kind: str) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystem

    given = tensors(rank, n, 2.0)
    model, training = given["model"], given["training"]
    if kind == "empty":
        training.clear()
    if rank == 1 and kind == "inf":
        model["w"].to_local()[0, 0] = math.inf  # type: ignore[operator]
    if rank == 1 and kind == "nan":
        training["optimizer.exp_avg.w"].to_local()[0, 0] = math.nan  # type: ignore[operator]
    if rank == 1 and kind == "name":
        training["more"] = torch.ones(1)
    if rank == 1 and kind == "plain":
        training["rng.cpu"] += 1
    patches: dict[str, tuple[int, Any, str, Any]] = {
        "full": (1, FileSystem, "create_stream", OSError(errno.ENOSPC, "No space left on device")),
        "read-only": (0, Path, "mkdir", OSError(errno.EROFS, "Read-only file system")),
        "rename": (0, os, "rename", OSError(errno.EIO, "Input/output error")),
        "digest": (1, module, "digest", OSError(errno.EIO, "Input/output error")),
        "odd": (1, module, "digest", OddError(1, 2)),
        "alone": (1, module, "_written", lambda _: {"model/there": ("", 9)}),
    }
    with ExitStack() as stack:
        where, owner, name, effect = patches.get(kind, (None, None, "", None))
        if rank == where:
            stack.enter_context(mock.patch.object(owner, name, side_effect=effect))
        save_sharded(run, 2, **given, config={})


FAULTS = {
    "inf": "TrainingError: step 2: 1 of 6 values of w are not finite on rank 1: training diverged",
    "nan": "TrainingError: step 2: 1 of 6 values of optimizer.exp_avg.w are not finite on rank 1",
    "name": "ValueError: more (training) differs between ranks 0 and 1",
    "plain": "ValueError: rng.cpu (training) differs between ranks 0 and 1",
    "empty": "ValueError: a checkpoint needs tensors in training, and got none",
    "full": "CheckpointError: the checkpoint of step 2 could not be written to {run}: [Errno 28] "
    "No space left on device. The disk is full: free some space, then go on with --resume. Last "
    "whole checkpoint: step-00000001.",
    "read-only": "CheckpointError: the checkpoint of step 2 could not be written to {run}: [Errno "
    "30] Read-only file system. Mend that, then go on with --resume. Last",
    "rename": "CheckpointError: the checkpoint of step 2 could not be written to {run}: [Errno 5]",
    "digest": "CheckpointError: the checkpoint of step 2 could not be written to {run}: [Errno 5]",
    "odd": "CheckpointError: the checkpoint of step 2 could not be written to {run}: OddError: 1 ",
    "alone": "CheckpointError: the checkpoint of step 2 could not be written to {run}: rank 0 does "
    "not see model/there, which rank 1 has written: the run's folder must lie on a disk that all",
}


def test_what_one_rank_meets_all_raise(tmp_path: Path) -> None:
    on_ranks(2, save, tmp_path, 1)
    for kind, message in FAULTS.items():
        one, other = errors_on_ranks(2, fault, tmp_path, kind, timeout=20)
        assert one == other and one is not None, (kind, one, other)
        assert one.startswith(message.format(run=tmp_path)), one
        assert steps(tmp_path) == [1], kind
    on_ranks(2, save, tmp_path, 2)
    assert find_checkpoint(tmp_path)[0].step == 2


def find(rank: int, n: int, run: Path) -> tuple[int, list[str]]:
    checkpoint, problems = find_checkpoint_together(run)
    return checkpoint.step, problems


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def exchange(file: Path) -> None:
    """With the other rank's: each is whole."""
    other = next(path for path in file.parent.iterdir() if path != file)
    mine = file.read_bytes()
    shutil.copy(other, file)
    other.write_bytes(mine)


def test_a_damaged_shard_gives_way_to_the_checkpoint_before(tmp_path: Path) -> None:
    run, kept = tmp_path / "run", tmp_path / "kept"
    for step in (1, 2):
        on_ranks(2, save, kept, step)
    for part in ("model", "training"):
        for damage in (cut, alter, exchange, Path.unlink):
            shutil.copytree(kept, run)
            damage(run / f"step-00000002/{part}/shard-00002-model-00001-of-00001.safetensors")
            found, problems = find_checkpoint(run)
            assert found.step == 1 and len(problems) == 1
            assert problems[0].startswith("step-00000002 is damaged: ")
            assert on_ranks(2, find, run) == [(1, problems)] * 2
            # Weights alone are enough to generate.
            assert find_weights(run)[0].step == (1 if part == "model" else 2)
            assert load_model(run)[1]["w"][0, 0] == (1 if part == "model" else 2)
            shutil.rmtree(run)
    shutil.copytree(kept, run)
    shutil.copy(run / "step-00000001/state.json", run / "step-00000002/state.json")
    assert on_ranks(2, find, run) == [(1, ["step-00000002 is damaged: it is of step 1"])] * 2
    (run / "step-00000001/state.json").unlink()
    one, other = errors_on_ranks(2, find, run)
    assert one == other and "holds no usable checkpoint. step-00000002 is damaged" in str(one)
    one, other = errors_on_ranks(2, find, tmp_path / "nowhere")
    assert one == other and "nowhere does not exist" in str(one)


def fill(rank: int, n: int, run: Path, kind: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    given = tensors(rank, n, 9.0)
    model, training = given["model"], given["training"]
    exp_avg, step = "optimizer.exp_avg.w", "optimizer.step.w"
    if kind == "missing":
        del model["w"], training[step]
        model["v"] = torch.ones(2)
    elif kind == "misshapen":
        model["w"] = distribute_tensor(torch.full((5, 4), 9.0), mesh_of(n), [Shard(0)])
    elif kind == "dtype":
        model["w"] = model["w"].double()
    elif kind == "one rank" and rank == 1:
        del training[step]
    elif kind == "other generators":
        training["rng.cuda"] = torch.full((2,), 9)
        del training["rng.cpu"]
    checkpoint = find_checkpoint_together(run)[0]
    try:
        checkpoint.load_into(model, training)
    except CheckpointError:
        if kind not in MISFITS:
            raise
        left = (*model.values(), *(x for name, x in training.items() if name != "rng.cpu"))
        assert all((whole(x) == 9).all() or x.shape == (2,) for x in left)
        raise
    value = float(checkpoint.step)
    assert (whole(model["w"]) == value).all()
    first = kind == "no optimizer"
    assert (whole(training[exp_avg]) == (9 if first else value)).all()
    assert training[step] == (9 if first else value)
    if kind == "other generators":
        assert training["rng.cuda"].tolist() == [9, 9]
    else:
        assert training["rng.cpu"].tolist() == [0, 1, 2, 3]


def not_stepped(rank: int, n: int, run: Path) -> None:
    given = tensors(rank, n, 0.0)
    training = {"rng.cpu": given["training"]["rng.cpu"]}
    save_sharded(run, 0, model=given["model"], training=training, config={})


def not_finite(rank: int, n: int, run: Path) -> None:
    given = tensors(rank, n, 5.0)
    if rank == 1:
        given["model"]["w"].to_local()[0, 0] = math.nan  # type: ignore[operator]
    with mock.patch.object(module, "not_finite", lambda _: ""):
        save_sharded(run, 5, **given, config={})


MISFITS = {
    "missing": "it has no v, nothing takes its w. Leave out overrides of model",
    "misshapen": "its w is (5, 3) torch.float32, not (5, 4) torch.float32. Leave",
    "dtype": "its w is (5, 3) torch.float32, not (5, 3) torch.float64. Leave",
    "one rank": "nothing takes its optimizer.step.w. Leave",
}


def test_what_does_not_fit_is_refused_on_every_rank(tmp_path: Path) -> None:
    on_ranks(2, save, tmp_path, 4)
    for kind, message in MISFITS.items():
        one, other = errors_on_ranks(2, fill, tmp_path, kind, timeout=20)
        folder = tmp_path / "step-00000004"
        start = f"CheckpointError: {folder} does not fit the model: {message}"
        assert one == other and str(one).startswith(start), one
    on_ranks(2, fill, tmp_path, "other generators")
    on_ranks(2, not_finite, tmp_path)
    one, other = errors_on_ranks(2, fill, tmp_path, "")
    assert one == other and "can't be used: 1 of 6 values of w are not finite" in str(one)
    with pytest.raises(CheckpointError, match="1 of 15 values of w are not finite"):
        find_checkpoint(tmp_path)[0].model()
    shutil.rmtree(tmp_path / "step-00000005")
    shutil.rmtree(tmp_path / "step-00000004")
    on_ranks(2, not_stepped, tmp_path)
    on_ranks(2, fill, tmp_path, "no optimizer")


@pytest.mark.parametrize("kind", ["missing", "misshapen", "dtype"])
def test_what_does_not_fit_one_process(tmp_path: Path, kind: str) -> None:
    w = torch.ones(5, 3)
    training = {"optimizer.step.w": torch.tensor(1.0), "rng.cpu": torch.arange(4)}
    save_checkpoint(tmp_path, 4, model={"w": w}, training=training, config={})
    model = {
        "missing": {"v": torch.zeros(2)},
        "misshapen": {"w": torch.zeros(5, 4)},
        "dtype": {"w": torch.zeros(5, 3).double()},
    }[kind]
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)[0].load_into(model, training)
    assert MISFITS[kind] in str(caught.value)
    assert not next(iter(model.values())).any()


def test_parts_that_are_no_whole_are_refused(tmp_path: Path) -> None:
    """Were a shard lost before its digest was taken."""
    from olmo_core.train.shards import Shards

    on_ranks(2, save, tmp_path, 4)
    files = sorted((tmp_path / "step-00000004" / "model").iterdir())
    assert Shards(files).read()["w"].shape == (5, 3)
    for some in (files[1:], [*files, files[0]]):
        with pytest.raises(ValueError, match="parts of w are not the whole tensor"):
            Shards(some)
