"""Loading Transformer Engine beside a cuDNN that is partly loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from olmo_core.nn.attention.kernels import te

LINE = "7f00-7f01 r-xp 00000000 08:01 42 {path}\n"


def test_the_rest_comes_from_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, other = tmp_path / "used", tmp_path / "other"
    for folder in (used, other):
        folder.mkdir()
        for part in ("graph", "cnn", "broken"):
            (folder / f"libcudnn_{part}.so.9").touch()
        (folder / "libcudnn.so.9").touch()
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 rw-p 00000000 00:00 0 \n"
        + LINE.format(path=used / "libcudnn_graph.so.9")
        + LINE.format(path=other / "libc.so.6")
    )

    def load(path: str, mode: int) -> None:
        if "broken" in path:
            raise OSError(f"{path}: undefined symbol")

    monkeypatch.setattr(te.ctypes, "CDLL", load)
    loaded = te.load_rest_of_cudnn(maps)
    assert loaded == [used / "libcudnn_cnn.so.9", used / "libcudnn_graph.so.9"]


def test_nothing_is_loaded_where_nothing_is_known(tmp_path: Path) -> None:
    assert te.load_rest_of_cudnn(tmp_path / "absent") == []
    (tmp_path / "maps").write_text(LINE.format(path="/usr/lib/libc.so.6"))
    assert te.load_rest_of_cudnn(tmp_path / "maps") == []
