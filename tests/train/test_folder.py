"""The folder of a run: made, locked, tried, and left without a trace where nothing is written."""

from __future__ import annotations

import builtins
import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train import disk
from olmo_core.train.errors import TrainingError
from olmo_core.train.folder import RunFolder


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_it_is_made_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    with folder.held(), folder.held():
        assert names(folder.path) == [".lock"]
    assert names(tmp_path) == []
    with folder.held():
        (folder.path / "notes.txt").touch()
    assert names(folder.path) == [".lock", "notes.txt"]
    with folder.held():
        pass
    assert folder.earlier() == [] and folder.others() == ["notes.txt"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    message = "another process is training in"
    with RunFolder(tmp_path).held(), pytest.raises(TrainingError, match=message):
        RunFolder(tmp_path).held().__enter__()
    with RunFolder(tmp_path).held():
        pass


def test_a_lock_that_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, another process has removed an empty folder's."""
    lock, opened = disk.lock, []

    def removed(file: Any) -> bool:
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        return lock(file)

    monkeypatch.setattr(disk, "lock", removed)
    with RunFolder(tmp_path).held():
        assert len(opened) == 2 and opened[0].closed and (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    ("refused", "code", "message"),
    [
        ("mkdir", errno.EROFS, "can't be made"),
        ("mkdir", errno.EACCES, "can't be made"),
        ("lock", errno.ENOLCK, "can't be locked"),
        ("open", errno.EACCES, "can't be locked"),
        ("write_bytes", errno.ENOSPC, "can't be written"),
        ("write_bytes", errno.EDQUOT, "can't be written"),
    ],
)
def test_what_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, code: int, message: str
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(disk if refused == "lock" else Path, refused, fails)
        with pytest.raises(OLMoConfigurationError, match=f"{message}: {os.strerror(code)}"):
            RunFolder(tmp_path / "r").held().__enter__()
    assert names(tmp_path) == []


def test_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    RunFolder(tmp_path).expect_room(2_000_000)
    with pytest.raises(OLMoConfigurationError, match=r"room for 2 MB, .* takes 3 MB"):
        RunFolder(tmp_path).expect_room(3_000_000)


def test_metrics_that_can_not_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(0)
    folder.append([{"step": 1}])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(TrainingError, match=r"metrics.jsonl can't be written: No space .*--resume"):
        folder.append([{"step": 2}])


def test_errors_of_the_run_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), RunFolder(tmp_path / "r").held():
        raise OSError("mine")
    assert names(tmp_path) == []


def test_windows_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fcntl: by its own call, which says that another process has the lock by EACCES."""
    held: set[int] = set()

    def locking(descriptor: int, mode: int, n_bytes: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if inode in held:
            raise OSError(errno.EACCES, "Permission denied")
        held.add(inode)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with RunFolder(tmp_path).held(), pytest.raises(TrainingError, match="another process"):
        RunFolder(tmp_path).held().__enter__()


def test_train_imports_without_what_windows_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def windows(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("fcntl", "resource"):
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith(("olmo_core.train", "olmo_core.cli"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", windows)
    __import__("olmo_core.cli.train")
    __import__("olmo_core.train.trainer")
    import torch

    from olmo_core.memory import memory_of

    assert memory_of(torch.device("cpu"))
