"""Output that is full, closed or narrow, and input that is closed: one message, no traceback."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from olmo_core.cli.main import app
from olmo_core.cli.streams import SteadyOutput, prepare_streams
from olmo_core.cli.tables import console, path_of
from olmo_core.exceptions import OLMoConfigurationError

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
CONFIG = ["train", "--show-config"]


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        app(list(args), prog_name="olmo-core")
    return int(end.value.code or 0)


@needs_full
@pytest.mark.parametrize("args", [CONFIG, ["--help"], ["--version"], ["doctor", "--help"]])
def test_full(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert call(*args) == 1
    error = capfd.readouterr().err
    assert error == "Error: standard output: No space left on device\n"


def test_closed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert call(*CONFIG) == 0
    monkeypatch.setattr(sys, "stdin", None)
    assert call("generate", "-c", "nowhere", "-") == 2
    assert "standard input, which is closed" in capfd.readouterr().err


def test_nobody_reads_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert call(*CONFIG) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "✓ é 1 ≤ 2 – 日", b"y ? 1 < 2 - ?"),
        ("utf-8", "✓ é", "✓ é".encode()),
        ("utf-8", "no UTF-8: \udcff\udc80", b"no UTF-8: \xff\x80"),
        ("latin-1", "✓ é", b"y \xe9"),
    ],
)
def test_narrow(encoding: str, text: str, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr("olmo_core.config.Config.as_dict", lambda config: {"name": text})
    monkeypatch.setattr("rich.console.Console.print_json", lambda c, data: print(data["name"]))
    assert call(*CONFIG) == 0
    assert out.getvalue().rstrip() == expected


def test_a_narrow_table_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core.cli.doctor import _tick

    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    prepare_streams()
    table = Table("a", "b", "c", "d")
    table.add_row(*map(_tick, ("yes", "no", "failed", "absent")))
    table.add_row("1 ≤ 2", "é", "[red]", ":smile:")
    console().print(table)
    sys.stdout.flush()
    lines = out.getvalue().decode("ascii").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.strip("| ").split() for line in lines[3:5]] == [
        ["y", "|", "-", "|", "x", "|", "."],
        ["1", "<", "2", "|", "?", "|", "[red]", "|", ":smile:"],
    ]


class Failing(io.StringIO):
    """Takes a few writes, as a terminal does before it is gone."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_run_goes_on_without_its_terminal() -> None:
    stream: Any = Failing(1)
    steady: Any = SteadyOutput(stream)
    out = console(steady)
    out.print("[/red] seen")
    out.print("lost")
    out.print("and silent")
    assert stream.getvalue() == "[/red] seen\n"
    assert steady.failure.errno == 5


def test_training_saves_though_nobody_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The header is printed, then the log's disk is full: the run ends, and says so at the end."""
    from olmo_core.cli import train_report

    header = train_report.print_header

    def then_fail(*args: Any) -> None:
        header(*args)
        sys.stdout.left = 0  # type: ignore[attr-defined]

    monkeypatch.setattr(train_report, "print_header", then_fail)
    monkeypatch.setattr(sys, "stdout", Failing(10**6))
    (tmp_path / "text.txt").write_text("mice and cats. " * 40)
    args = [
        "train", "--run", str(tmp_path / "r"), "--data", str(tmp_path / "text.txt"), "--steps=2",
        "--preset=tiny", "model.d_model=16", "model.n_layers=1", "data.sequence_length=32",
        "data.max_doc_len=null", "eval_batches=1", "model.blocks.0.sequence_mixer.n_heads=2",
        "device=cpu", "--sample=0",
    ]  # fmt: skip
    assert call(*args) == 1
    assert "Input/output error" in capfd.readouterr().err
    assert (tmp_path / "r" / "step-00000002" / "state.json").is_file()


@needs_full
def test_full_before_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(0))
    (tmp_path / "text.txt").write_text("mice and cats. " * 40)
    args = ["train", "--run", str(tmp_path / "r"), "--data", str(tmp_path / "text.txt")]
    assert call(*args, "--preset=tiny", "device=cpu") == 1
    assert not (tmp_path / "r").exists()


def test_an_empty_path_is_none() -> None:
    assert path_of("--json")("a/b") == Path("a/b")
    with pytest.raises(OLMoConfigurationError, match="--json: the path is empty"):
        path_of("--json")(" ")
