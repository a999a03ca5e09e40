"""The commands, in this process where that is enough and in one of their own where it is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from olmo_core.cli.main import COMMANDS, app
from olmo_core.cli.train import _set_environment, _stopping_on_signals
from olmo_core.train.checkpoint import checkpoint_folders
from olmo_core.train.metrics import read_metrics

SMALL = [
    "--preset=tiny",
    "model.d_model=16", "model.n_layers=2", "model.blocks.0.sequence_mixer.n_heads=2",
    "data.sequence_length=32", "data.batch_size=2", "data.max_doc_len=null", "device=cpu",
    "eval_batches=1", "optimizer.warmup_steps=2", "--sample=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{i} mice and {i * i} cats. " * (1 + i % 7)}) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = invoke("train", "--run", folder, "--data", text, "--steps", 6, *SMALL)
    assert result.exit_code == 0, result.output
    return folder


def invoke(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="olmo-core")


def error(result: Result) -> str:
    """The message of a command that failed: one, without a traceback."""
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    return " ".join(result.output.replace("│", " ").split())


def test_help_names_every_command_and_does_not_import_torch() -> None:
    code = (
        "import sys; from olmo_core.cli.main import app\n"
        "try: app(['--help'], prog_name='olmo-core')\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(name in output for name in COMMANDS) and output.split()[-1] == "False"


def test_version_and_unknown_command() -> None:
    assert invoke("--version").output.startswith("olmo-core ")
    assert "No such command 'trian'" in error(invoke("trian"))


@pytest.mark.parametrize("command", ["train", "generate"])
def test_help_of_a_command(command: str) -> None:
    assert "Usage: olmo-core" in invoke(command, "--help").output


def test_train_leaves_checkpoint_metrics_and_plot(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"step-00000006", "metrics.jsonl"} <= names
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 7))
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_train_reports_within_a_hundred_columns(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["train", "--run", "r", "--data", text, "--steps", 2, *SMALL[:-1], "--sample", 20]
    result = invoke(*args)
    for word in ("held-out text", "bigram model", "checkpoint", "plot", "a sample", "generate"):
        assert word in result.output
    # A path is not broken, and may be longer than anyone's terminal.
    lines = [line for line in result.output.splitlines() if str(text) not in line]
    assert max(len(line.rstrip()) for line in lines) <= 100


def test_generate_is_seeded_and_needs_no_cache(run: Path) -> None:
    args = ["generate", "--checkpoint", run, "--max-tokens", 40, "4 mice"]
    one = invoke(*args)
    assert one.exit_code == 0 and one.stdout.startswith("4 mice")
    # Six bytes, their start, and the new ones: more than the rows of 32 it was trained on.
    assert "at most 32 tokens, this text may reach 47" in one.stderr
    assert not invoke("generate", "-c", run, "--max-tokens", 25, "4 mice").stderr
    assert invoke(*args).output == one.output != invoke(*args, "--seed", 1).output
    greedy = invoke(*args, "--temperature", 0)
    assert greedy.output == invoke(*args, "--temperature", 0, "--no-cache").output
    assert greedy.output == invoke(*args[:2], run / "step-00000006", *args[3:], "-t", 0).output


def test_generate_several_prompts_as_each_alone(run: Path) -> None:
    options = ["-c", run, "-n", 30, "-t", 0]
    both = invoke("generate", *options, "4 mice and", "é").stdout
    alone = [invoke("generate", *options, prompt).stdout for prompt in ("4 mice and", "é")]
    assert both == f"--- 1 ---\n{alone[0]}--- 2 ---\n{alone[1]}"


def test_generate_reads_standard_input(run: Path) -> None:
    args = ["generate", "-c", str(run), "-n", "5", "-"]
    assert CliRunner().invoke(app, args, input="from a pipe").output.startswith("from a pipe")


def test_earlier_runs_are_not_overwritten_by_accident(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "r"
    args = ["train", "--run", folder, "--data", text, *SMALL, "--steps"]
    assert invoke(*args, 2).exit_code == 0
    message = error(invoke(*args, 2))
    assert "--resume" in message and "--overwrite" in message
    assert invoke(*args, 4, "--resume").exit_code == 0
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    (folder / "notes.txt").write_text("mine")
    for mistake in (["optimizer.lr=0"], ["--data", "/nowhere"]):
        error(invoke(*args, 1, *mistake, "--overwrite"))
        assert len(read_metrics(folder / "metrics.jsonl")) == 4
    assert invoke(*args, 1, "--overwrite").exit_code == 0
    assert len(read_metrics(folder / "metrics.jsonl")) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_resume_where_there_is_nothing(tmp_path: Path, text: Path) -> None:
    args = ["train", "--run", tmp_path / "r", "--data", text, "--steps", 1, *SMALL]
    assert "nothing to resume: " in (message := error(invoke(*args, "--resume")))
    assert "does not exist" in message and not (tmp_path / "r").exists()
    # What a process leaves that dies before its first checkpoint.
    (tmp_path / "r" / ".writing-step-00000000").mkdir(parents=True)
    (tmp_path / "r" / ".lock").touch()
    assert "holds no checkpoint" in error(invoke(*args, "--resume"))
    assert invoke(*args).exit_code == 0
    assert invoke(*args, "--resume").exit_code == 0  # a run that is complete is reported again


def test_resume_says_which_checkpoint_was_damaged(tmp_path: Path, text: Path) -> None:
    args = ["train", "--run", tmp_path, "--data", text, "save_every=1", *SMALL, "--steps"]
    assert invoke(*args, 3).exit_code == 0
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"torn")
    result = invoke(*args, 4, "--resume")
    assert result.exit_code == 0
    assert "step-00000003 is damaged" in result.output and "step-00000002" in result.output


def test_hybrid_trains_resumes_and_generates(tmp_path: Path, text: Path) -> None:
    small = [*SMALL[1:], "model.blocks.1.sequence_mixer.n_heads=2", "model.n_layers=4"]
    args = ["train", "--run", tmp_path, "--data", text, *small, "--steps"]
    for more in ([2], [3, "--resume"]):
        result = invoke(*args, *more)
        assert result.exit_code == 0, result.output
    weights = load_file(tmp_path / "step-00000003" / "model.safetensors")
    assert [f"blocks.{i}.sequence_mixer.A_log" in weights for i in range(4)] == [True] * 3 + [False]
    args = ["generate", "-c", tmp_path, "-t", 0, "-n", 30, "4 mice and", "é"]
    assert invoke(*args).output == invoke(*args, "--no-cache").output


def test_show_config_round_trips(tmp_path: Path) -> None:
    from olmo_core.train.config import TrainConfig
    from olmo_core.train.presets import get_preset

    result = invoke("train", "-p", "tiny-window", "--show-config", "optimizer.lr=0.5")
    shown = TrainConfig.from_dict(json.loads(result.output))
    assert shown == get_preset("tiny-window").merge(["optimizer.lr=0.5"])


BAD_TRAIN: dict[str, tuple[list[str], str]] = {
    "unknown key": (["optimizer.lrr=1"], "'lrr'; did you mean 'lr'?"),
    "unknown key of the model": (["model.layers=2"], "did you mean 'n_layers'?"),
    "no value": (["steps"], "expected 'field=value'"),
    "not a number": (["steps=many"], "expected int, got 'many'"),
    "zero steps": (["--steps", "0"], "steps must be at least 1"),
    "not an integer": (["--steps", "x"], "Invalid value for '--steps'"),
    "unknown option": (["--step", "3"], "No such option"),
    "unknown preset": (["-p", "tiny-windows"], "did you mean 'tiny-window'?"),
    "no data": (["--data", "/nowhere"], "/nowhere does not exist"),
    "unknown device": (["device=abacus"], "device 'abacus' can't be used"),
    "no values": (["device=meta"], "device 'meta' can't be used"),
    "seventh CPU": (["device=cpu:7"], "device 'cpu:7' can't be used"),
    "other vocabulary": (["model.vocab_size=300"], "model.vocab_size must be 257"),
    "smaller vocabulary": (["model.vocab_size=100"], "model.vocab_size must be 257"),
    "wider than memory": (["model.d_model=10000000"], "GiB of memory"),
    "wider than torch": (["model.d_model=100000000000000"], "GiB of memory"),
    "deeper than memory": (["model.n_layers=1000000000000000"], "GiB of memory"),
    "longer than memory": (["data.sequence_length=10000000000000"], "GiB of memory"),
    "more than memory": (["data.batch_size=10000000000000"], "GiB of memory"),
    "past 64 bits": (["data.batch_size=99999999999999999999"], "integer of 64 bits"),
    "seed past 64 bits": (["seed=99999999999999999999"], "seed must be an integer of 64 bits"),
    "negative steps": (["--steps", "-3"], "steps must be at least 1, got -3"),
    "infinite rate": (["optimizer.lr=inf"], "optimizer.lr must be finite"),
    "no number deep inside": (["model.blocks.0.layer_norm.eps=nan"], "eps must be finite"),
    "autocast to float64": (["autocast=float64"], "autocast must be bfloat16, float16 or null"),
    "empty path": (["--data", ""], "data.path is empty"),
    "blank path": (["data.path= "], "data.path is empty"),
    "a device as data": (["--data", "/dev/null"], "/dev/null is a device or pipe"),
    "nobody's home": (["--data", "~nobody-at-all/x"], "~nobody-at-all/x does not exist"),
    "empty preset": (["-p", ""], "unknown preset ''"),
    "empty run": (["--run", ""], "the path is empty"),
    "negative sample": (["--sample", "-5"], "Invalid value for '--sample'"),
    "endless sample": (["--sample", "99999999999"], "Invalid value for '--sample'"),
    "markup": (["[/red]=1"], "no field '[/red]'"),
    "resume and overwrite": (["--resume", "--overwrite"], "exclude each other"),
    "bad mixer": (["model.blocks.0.sequence_mixer.type=mamba"], "unknown type 'mamba'"),
    "no such block": (["model.blocks.7.name=ngpt"], "index"),
    "heads do not divide": (["-p", "tiny", "model.blocks.0.sequence_mixer.n_heads=3"], "128"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr must be positive"),
    "half a block": (["-p", "tiny", "model.blocks.0.name=ngpt"], "ngpt block needs"),
    "ngpt among others": (["model.blocks.1.name=ngpt"], "do not mix"),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_bad_train_calls(tmp_path: Path, name: str) -> None:
    args, message = BAD_TRAIN[name]
    assert message in error(invoke("train", "--run", tmp_path / "r" / "deep", *args))
    assert not (tmp_path / "r").exists()


def test_bad_folders(tmp_path: Path, run: Path, text: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in error(invoke("train", "--run", tmp_path / "file"))
    assert "is not empty (file" in error(invoke("train", "--run", tmp_path))
    assert "holds no checkpoint" in error(invoke("train", "--run", tmp_path, "--resume"))
    message = error(invoke("train", "--run", run, "--resume", "model.d_model=32"))
    assert "is of another model" in message
    message = error(invoke("train", "--run", run, "--resume", *SMALL, "-p", "tiny-window"))
    assert "was not trained as preset 'tiny-window'" in message


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data nor model may be touched."""
    from olmo_core.train.trainer import Trainer

    def touched(*args: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(Trainer, "_load_data", touched)
    monkeypatch.setattr(Trainer, "_init_weights", touched)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("where", ["file/r", "file/a/b", "x" * 300, "x" * 300 + "/r", "locked"])
def test_a_run_folder_that_can_not_be_used(tmp_path: Path, text: Path, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    message = error(invoke("train", "--run", tmp_path / where, "--data", text, *SMALL))
    assert "the run folder" in message and "Choose another with --run" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.batch_size=4", "data.batch_size=4 (was 2)"),
        ("data.sequence_length=64", "data.sequence_length=64 (was 32)"),
        ("data.max_doc_len=16", "data.max_doc_len=16 (was None)"),
        ("data.held_out=0.1", "data.held_out=0.1 (was 0.05)"),
        ("seed=1", "seed=1 (was 0)"),
        ("steps=3", "it is beyond steps=3"),
    ],
)
def test_resume_with_other_batches(run: Path, change: str, message: str) -> None:
    assert message in error(invoke("train", "--run", run, "--resume", change))


def test_names_that_look_like_markup(tmp_path: Path, text: Path) -> None:
    data = tmp_path / "[bold]d"
    data.mkdir()
    (data / "[").mkdir()
    (data / "[/red].JSONL").write_bytes(text.read_bytes())
    (data / "[/red]picture:smile:.png").touch()
    folder = tmp_path / "[/bold]" / "$\\frac$"
    args = ["train", "--run", folder, "--data", data, *SMALL, "--steps"]
    result = invoke(*args, 2)
    assert result.exit_code == 0, result.output
    for name in (folder, data, "[/red]picture:smile:.png", folder / "loss.png"):
        assert str(name) in result.output
    (folder / "step-00000002" / "state.json").write_text("[1]")
    result = invoke(*args, 3, "--resume")
    assert "step-00000002 is damaged: state.json is a list" in result.output
    assert "[/red]" in error(invoke("generate", "-c", tmp_path / "[/red]"))


BAD_GENERATE: dict[str, tuple[list[str], str]] = {
    "hot": (["--temperature", "-1"], "temperature must be 0"),
    "infinitely hot": (["--temperature", "inf"], "temperature"),
    "no nucleus": (["--top-p", "0"], "top_p must lie in (0, 1]"),
    "too large a nucleus": (["--top-p", "1.5"], "top_p"),
    "no tokens": (["--max-tokens", "0"], "max_new_tokens must be at least 1"),
    "not a number": (["--max-tokens", "few"], "Invalid value for"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "no values": (["--device", "meta"], "no values"),
    "no device": (["--device", ""], "device '' can't be used"),
    "seed past 64 bits": (["--seed", "99999999999999999999"], "seed must lie in"),
    "second seed past 64 bits": (["--seed", str(2**64 - 1), "a", "b"], "2**64 - 2"),
    "past int32": (["--max-tokens", "99999999999"], "leads beyond position 2147483647"),
    "hotter than numbers": (["--temperature", "nan"], "temperature"),
    "no mass": (["--top-p", "nan"], "top_p"),
    "empty path": (["-c", ""], "the path is empty"),
}


@pytest.mark.parametrize("name", BAD_GENERATE)
def test_bad_generate_calls(run: Path, name: str) -> None:
    args, message = BAD_GENERATE[name]
    assert message in error(invoke("generate", "-c", run, *args))


def test_a_cache_that_can_not_fit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core import memory

    monkeypatch.setattr(memory, "memory_of", lambda device: 10**6)
    assert "--max-tokens) need at least" in error(invoke("generate", "-c", run, "-n", 9000))
    assert invoke("generate", "-c", run, "-n", 9).exit_code == 0


def test_out_of_memory_is_one_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from olmo_core.nn.transformer import Transformer

    monkeypatch.setattr(Transformer, "init_kv_cache", lambda *_, **__: torch.empty(2**60))
    assert "out of memory, choose smaller sizes" in error(invoke("generate", "-c", run))


def test_weights_that_are_not_finite_generate_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from olmo_core.train import checkpoint
    from olmo_core.train.trainer import Trainer

    def spoil(trainer: Trainer, *args: Any) -> float:
        with torch.no_grad():
            trainer.model.lm_head.w_out.weight[3, 4] = float("inf")  # type: ignore[union-attr]
        return 8.0

    monkeypatch.setattr(Trainer, "evaluate", spoil)
    args = ["train", "--run", tmp_path, "--data", text, *SMALL, "--steps", 1]
    message = error(invoke(*args))
    assert "step 1: 1 of 4,112 values of lm_head.w_out.weight are not finite" in message
    assert "lower optimizer.lr" in message
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "not_finite", lambda tensors: "")
        assert invoke(*args, "--overwrite").exit_code == 0
    for command in (["generate", "-c", tmp_path], [*args, "--resume", "--steps", 2]):
        assert "of lm_head.w_out.weight are not finite" in error(invoke(*command))


def test_generate_reads_standard_input_as_it_comes(run: Path) -> None:
    args = ["generate", "-c", str(run), "-n", "5", "-"]
    result = CliRunner().invoke(app, args, input=b"\xff\xc3\xa9")
    assert result.exit_code == 0 and result.stdout_bytes.startswith(b"\xff\xc3\xa9")


def test_generate_without_a_checkpoint(tmp_path: Path) -> None:
    assert "does not exist" in error(invoke("generate", "-c", tmp_path / "nowhere"))
    assert "holds no checkpoint" in error(invoke("generate", "-c", tmp_path))


# Processes of their own without an import of torch for each: this one forks them and reports
# their ends.
FORKER = """
import json, os, sys
from olmo_core.cli.main import app
from olmo_core.cli import train
from olmo_core.train import presets, trainer
for line in sys.stdin:
    args, log = json.loads(line)
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        app(args, prog_name="olmo-core")
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, args: list[Any], log: Path) -> int:
        """The id of a process that runs ``olmo-core args``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([list(map(str, args)), str(log)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.process.communicate(timeout=60)


def again(folder: Path) -> list[str]:
    """What goes on with a run, or starts it."""
    return ["--resume"] if folder.exists() and checkpoint_folders(folder) else []


def long_run(folder: Path, text: Path, *options: Any) -> list[Any]:
    return [
        "train", "--run", folder, "--data", text, "--steps", 150, *again(folder),
        "save_every=10", "log_every=5", "eval_every=50", *SMALL, *options,
    ]  # fmt: skip


def losses(folder: Path) -> list[tuple[Any, ...]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"], row.get("held_out")) for row in rows]


def wait_for_rows(folder: Path, before: int = 0) -> None:
    until = time.monotonic() + 60
    while len(losses(folder)) <= before:
        assert time.monotonic() < until, "no training within a minute"
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_ends_with_the_same_losses(
    tmp_path: Path, text: Path, forker: Forker, kills: int
) -> None:
    assert invoke(*long_run(tmp_path / "whole", text)).exit_code == 0
    expected = losses(tmp_path / "whole")
    assert len(expected) == 150

    folder, rng, reached = tmp_path / "killed", random.Random(kills), []
    for _ in range(kills):
        child = forker.start(long_run(folder, text), tmp_path / "log")
        wait_for_rows(folder)
        time.sleep(rng.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        assert forker.wait() in (-signal.SIGKILL, 0)
        reached.append(len(losses(folder)))
    assert reached[0] < 150, "the first process ended before it was killed"
    result = invoke(*long_run(folder, text))
    assert result.exit_code == 0, result.output
    assert losses(folder) == expected


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_leaves(
    tmp_path: Path, text: Path, forker: Forker, number: signal.Signals
) -> None:
    child = forker.start(long_run(tmp_path / "r", text, "steps=100000"), tmp_path / "log")
    wait_for_rows(tmp_path / "r")
    os.kill(child, number)
    assert forker.wait() == 128 + number
    output = (tmp_path / "log").read_text()
    assert f"{number.name}: saving a checkpoint" in output and "--resume" in output
    assert "Traceback" not in output
    last = losses(tmp_path / "r")[-1][0]
    assert (tmp_path / "r" / f"step-{last:08d}" / "state.json").is_file()


def test_nohup_stays_so() -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen: list[Any] = []

        class Trainer:
            stop_signal: int | None = None

        with _stopping_on_signals(Trainer(), Console()):  # type: ignore[arg-type]
            seen = [signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)]
        assert seen[0] is signal.SIG_IGN and callable(seen[1])
    finally:
        signal.signal(signal.SIGHUP, ignored)


@pytest.mark.parametrize(
    ("given", "bound"),
    [({}, "true"), ({"OMP_NUM_THREADS": "1"}, None), ({"OMP_PROC_BIND": "false"}, "false")],
)
def test_threads_are_bound_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], bound: str | None
) -> None:
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    _set_environment()
    assert environment.get("OMP_PROC_BIND") == bound
    monkeypatch.setattr(Path, "exists", lambda path: True)
    environment.clear()
    _set_environment()
    assert "OMP_PROC_BIND" not in environment and environment["CUBLAS_WORKSPACE_CONFIG"]
