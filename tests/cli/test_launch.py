"""``olmo-core train`` under ``torchrun`` itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from olmo_core.cli import train as train_cli
from olmo_core.cli.launch import command_line
from olmo_core.cli.main import app
from olmo_core.train.checkpoint import checkpoint_folders, find_checkpoint
from olmo_core.train.metrics import read_metrics
from olmo_core.train.parallel.degrees import deal
from olmo_core.train.parallel.ranks import Ranks

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.d_model=16", "model.n_layers=2", "model.pattern=[0,1]", "model.dtype=float64",
    "model.blocks.0.sequence_mixer.head_dim=8", "data.sequence_length=64", "data.max_doc_len=48",
    "device=cpu", "eval_batches=1", "optimizer.warmup_steps=2", "log_every=1",
    "optimizer.final_lr_fraction=1",  # the same losses, however many steps follow
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{i} mice and {i * i} cats. " * (1 + i % 7)}) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


def readme_line(word: str) -> list[str]:
    """What README's line with this word gives to ``torchrun``."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^torchrun (.+? -m olmo_core train .+?)(?:  +#.*)?$", readme, re.MULTILINE)
    (line,) = [line for line in lines if word in line]
    return shlex.split(line)


def torchrun(*args: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *args]


PATHS = filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(*args), capture_output=True, text=True, cwd=folder,
        env={**os.environ, **ENVIRONMENT}, timeout=180,
    )  # fmt: skip


@contextmanager
def running(folder: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launcher whose ranks train, and their process ids by rank."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            torchrun(*args), stdout=log, stderr=log, text=True, cwd=folder,
            env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not list(folder.glob("runs/*/metrics.jsonl")) or not steps(folder):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, "no training within two minutes"
            time.sleep(0.02)
        yield process, ranks_of(process.pid)
    finally:
        process.kill()
        process.wait()


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        variables = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(child)
    return [found[rank] for rank in sorted(found)]


def steps(folder: Path) -> list[int]:
    (path,) = folder.glob("runs/*/metrics.jsonl")
    return [row["step"] for row in read_metrics(path)]


def losses(folder: Path) -> list[float]:
    (path,) = folder.glob("runs/*/metrics.jsonl")
    return [row["loss"] for row in read_metrics(path)]


def of_one_process(folder: Path, text: Path, n: int) -> list[float]:
    folder.mkdir()
    args = ["train", "--run", folder / "runs" / "one", "--data", text, "--steps", n, *SMALL]
    result = CliRunner().invoke(app, [str(arg) for arg in [*args, "--sample=0"]])
    assert result.exit_code == 0, result.output
    return losses(folder)


def test_torchrun_claims_no_option() -> None:
    """It takes ``--run`` and ``--log``, wherever they stand, for the beginnings of its own."""
    from torch.distributed.run import get_args_parser

    command = typer.main.get_command(_single(train_cli.command))
    names = [name for option in command.params for name in option.opts if name.startswith("-")]
    assert {"--save-folder", "--cp", "--tp-degree", "--resume", "-p"} <= {*names}
    for name in names:
        for argument in ([name, "x"], [f"{name}=x"]):
            line = ["--nproc-per-node", "2", "-m", "olmo_core", "train", *argument, "steps=3"]
            if name == "--run":
                with pytest.raises(SystemExit):
                    get_args_parser().parse_args(line)
                continue
            parsed = get_args_parser().parse_args(line)
            assert parsed.training_script == "olmo_core" and parsed.module
            assert parsed.training_script_args == ["train", *argument, "steps=3"]


def _single(command: Any) -> typer.Typer:
    single = typer.Typer(add_completion=False)
    single.command("train")(command)
    return single


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cp", "zig_zag"], "Start as many as you have devices: torchrun --nproc-per-node 2"),
        (["--tp-degree", "2"], "torchrun --nproc-per-node 2 -m olmo_core train"),
        (["--cp-degree", "2"], "--cp-degree=2 needs --cp"),
        (["--cp", "zagzig"], "--cp must be one of"),
    ],
)
def test_options_for_many_without_torchrun(
    tmp_path: Path, options: list[str], message: str
) -> None:
    args = ["train", "--save-folder", str(tmp_path / "r"), *options]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "r").exists()


def test_one_process_may_say_save_folder(tmp_path: Path, text: Path) -> None:
    args = ["train", "--save-folder", str(tmp_path / "r"), "--data", str(text), *SMALL]
    result = CliRunner().invoke(app, [*args, "--steps=1", "--sample=0"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r" / "step-00000001").is_dir()


def test_the_line_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    ranks = Ranks(deal(8, cp="llama3", cp_degree=4, ulysses_degree=2, tp_degree=2))
    ranks.size = 8
    assert command_line(ranks) == (
        "torchrun --nnodes 2 --nproc-per-node 4 -m olmo_core train --cp llama3 --cp-degree 4 "
        "--ulysses-degree 2 --tp-degree 2"
    )
    assert command_line(Ranks()) == "olmo-core train"


@pytest.mark.distributed
def test_readme_s_context_parallel_line_and_a_killed_rank(tmp_path: Path, text: Path) -> None:
    """Killed, the job ends; with --resume it goes on to the losses of one process, then speaks."""
    line = [*readme_line("--cp"), "--data", str(text), *SMALL, "save_every=2"]
    with running(tmp_path, *line, "--steps=100000") as (launcher, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    log = (tmp_path / "log").read_text()
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", log), log
    reached = steps(tmp_path)[-1]
    done = launch(tmp_path, *line, "--resume", "--steps", str(reached + 2), "--sample", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    want = of_one_process(tmp_path / "alone", text, reached + 2)
    assert losses(tmp_path) == pytest.approx(want, abs=1e-8)
    assert steps(tmp_path) == list(range(1, reached + 3))
    for words in ("ranks ", "2 of context by", "bits/byte", "a sample", "olmo-core generate"):
        assert done.stdout.count(words) == 1 or words == "bits/byte", done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    talk = CliRunner().invoke(app, ["generate", "-c", str(run), "-n", "5", "ROMEO:"])
    assert talk.exit_code == 0 and talk.stdout.startswith("ROMEO:")


@pytest.mark.distributed
def test_readme_s_tensor_parallel_line(tmp_path: Path, text: Path) -> None:
    line = [*readme_line("--tp-degree"), "--data", str(text), *SMALL]
    done = launch(tmp_path, *line, "--steps=3", "--sample=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path) == pytest.approx(of_one_process(tmp_path / "a", text, 3), abs=1e-8)
    assert "2 of tensors" in done.stdout and "Warning" not in done.stderr, done.stderr


FAILS = """
import os
from olmo_core.train.trainer import Trainer
take = Trainer._train_step
def step(trainer):
    if trainer.step == 5 and os.environ["RANK"] == "1":
        raise ValueError("this rank's own error")
    return take(trainer)
Trainer._train_step = step
from olmo_core.cli.main import app
app()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_an_exception_in_one_rank(tmp_path: Path, text: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    args = ["train", "--cp", "zig_zag", "--save-folder", "runs/r", "--data", str(text), *SMALL]
    args += ["--steps=10", "save_every=2", "--sample=0"]
    done = launch(tmp_path, "--nproc-per-node", "2", "fails.py", *args)
    assert done.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in done.stderr.split("Root Cause")[1], done.stderr
    assert "this rank's own error" in done.stderr.split("Root Cause")[1]
    done = launch(tmp_path, "--nproc-per-node", "2", "-m", "olmo_core", *args, "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(of_one_process(tmp_path / "a", text, 10), abs=1e-8)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("to", ["launcher", "rank 0", "rank 1"])
def test_a_signal_leaves_one_whole_checkpoint(tmp_path: Path, text: Path, to: str) -> None:
    args = ["--nproc-per-node", "2", "-m", "olmo_core", "train", "--tp-degree", "2", *SMALL]
    args += ["--save-folder", "runs/r", "--data", str(text), "save_every=100000", "--sample=0"]
    with running(tmp_path, *args, "--steps=100000") as (launcher, ranks):
        os.kill(launcher.pid if to == "launcher" else ranks[int(to[-1])], signal.SIGTERM)
        launcher.wait(timeout=60)
    log = (tmp_path / "log").read_text()
    again = "torchrun --nproc-per-node 2 -m olmo_core train --tp-degree 2 --save-folder runs/r"
    assert f"Stopped. Go on with: {again} --resume" in log
    assert len(checkpoint_folders(tmp_path / "runs" / "r")) == 2  # the run's start is the other
    checkpoint, problems = find_checkpoint(tmp_path / "runs" / "r")
    assert problems == []
    assert checkpoint.step == steps(tmp_path)[-1] > 0


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^Error: ([^:]+)", done.stderr, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_refusal_is_told_once(tmp_path: Path) -> None:
    args = ["--nproc-per-node", "2", "-m", "olmo_core", "train", "--save-folder", "r"]
    done = launch(tmp_path, *args, "data.batch_size=3")
    assert done.returncode != 0 and not (tmp_path / "r").exists()
    assert complaints(done) == ["data.batch_size=3 rows can't be dealt to 2 ranks of data"]
    done = launch(tmp_path, *args, "--cp", "zig_zag", "--cp-degree", "3")
    assert complaints(done) == ["2 ranks can't be dealt to --cp-degree 3, which must divide them"]
    done = launch(tmp_path, *args, "--cp", "zig_zag", "--show-config")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 800
