"""Loading Transformer Engine beside two cuDNNs, of which torch uses one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from olmo_core.nn.attention.kernels.softmax import te

LINE = "7f00-7f01 r-xp 00000000 08:01 42 {path}\n"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded, as it comes."""
    names: list[str] = []

    def load(path: str, mode: int) -> None:
        if "broken" in path:
            raise OSError(f"{path}: undefined symbol")
        names.append(path)

    monkeypatch.setattr(te.ctypes, "CDLL", load)
    return names


@pytest.mark.parametrize("before", [None, "/opt/another"])
def test_everything_comes_from_torchs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str], before: str | None
) -> None:
    used, other = tmp_path / "used", tmp_path / "other"
    for folder in (used, other):
        folder.mkdir()
        for part in ("_graph", "_cnn", "_broken", ""):
            (folder / f"libcudnn{part}.so.9").touch()
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 rw-p 00000000 00:00 0 \n"
        + LINE.format(path=other / "libc.so.6")
        + LINE.format(path=used / "libcudnn.so.9")
    )
    if before is None:
        monkeypatch.delenv("CUDNN_HOME", raising=False)
    else:
        monkeypatch.setenv("CUDNN_HOME", before)
    with te.one_cudnn(maps):
        assert os.environ["CUDNN_HOME"] == str(used)
        parts = ("", "_cnn", "_graph")
        assert sorted(loaded) == sorted(str(used / f"libcudnn{part}.so.9") for part in parts)
    assert os.environ.get("CUDNN_HOME") == before


def test_the_environment_is_restored_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str]
) -> None:
    monkeypatch.delenv("CUDNN_HOME", raising=False)
    maps = tmp_path / "maps"
    maps.write_text(LINE.format(path=tmp_path / "libcudnn.so.9"))
    with pytest.raises(ImportError), te.one_cudnn(maps):
        raise ImportError
    assert "CUDNN_HOME" not in os.environ


def test_nothing_is_loaded_where_nothing_is_known(tmp_path: Path, loaded: list[str]) -> None:
    maps = tmp_path / "maps"
    maps.write_text(LINE.format(path="/usr/lib/libc.so.6"))
    for known in (maps, tmp_path / "absent"):
        before = dict(os.environ)
        with te.one_cudnn(known):
            assert os.environ == before
    assert not loaded
