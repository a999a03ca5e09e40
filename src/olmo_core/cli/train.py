"""``olmo-core train``."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from olmo_core.train.checkpoint import Checkpoint
    from olmo_core.train.config import TrainConfig
    from olmo_core.train.trainer import Trainer


def command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Any value of the configuration, such as model.n_layers=6 optimizer.lr=1e-3.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            help="Where to start: tiny-hybrid (default), tiny, tiny-window or tiny-ngpt.",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", help="Folder for checkpoints, metrics and plot.  [default: runs/PRESET]"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Text or .jsonl file, or a folder of them (also .gz)."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Optimizer steps."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's last checkpoint, if any.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the folder's earlier run first.")
    ] = False,
    sample: Annotated[
        int, typer.Option("--sample", help="Tokens (bytes) of the sample at the end; 0 is none.")
    ] = 250,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration and stop.")
    ] = False,
) -> None:
    """Train a small language model on packed documents.

    Without --data it learns Shakespeare's plays, which come with the package. Stop it whenever you
    like: --resume goes on with the same losses.
    """
    _set_environment()

    from olmo_core.cli import tables
    from olmo_core.train.presets import DEFAULT_PRESET, get_preset
    from olmo_core.train.trainer import Trainer

    if resume and overwrite:
        raise OLMoConfigurationError("--resume and --overwrite exclude each other: choose one")
    run = Path("runs") / (preset or DEFAULT_PRESET) if run is None else run
    changes = list(overrides or [])
    if data is not None:
        changes.append(f"data.path={Path(data).expanduser().resolve()}")
    if steps is not None:
        changes.append(f"steps={steps}")

    console = tables.console()
    checkpoint = None
    if show_config:
        config = get_preset(preset or DEFAULT_PRESET).merge(changes)
    elif resume and (checkpoint := _last_checkpoint(run, console)):
        config = _config_of(checkpoint, preset, changes)
    else:
        config = get_preset(preset or DEFAULT_PRESET).merge(changes)
        _check_folder(run, resume, overwrite)
    config.check()
    if show_config:
        console.print_json(data=config.as_dict())
        return

    trainer = Trainer(config, run, checkpoint=checkpoint, overwrite=overwrite)
    _train(trainer, sample, console)


def _set_environment() -> None:
    """Settings that libraries read once, when they start."""
    # Without it cuBLAS's matrix products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A kernel may put both threads of a small model's short loops on one core, where they wait for
    # each other: up to 20 times slower on a virtual machine of two. A choice of the user's stands,
    # and so does the placement beside a GPU, where a bound thread would hold up its launches.
    chosen = {"OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"} & {*os.environ}
    if sys.platform == "linux" and not chosen and not Path("/proc/driver/nvidia").exists():
        os.environ["OMP_PROC_BIND"] = "true"


def _train(trainer: Trainer, sample: int, console: Console) -> None:
    from olmo_core.cli import train_report as report

    report.print_header(trainer, console)
    start, began = trainer.step, time.monotonic()
    progress = report.TrainingProgress(trainer, console)
    with _stopping_on_signals(trainer, console), progress:
        summary = trainer.fit(progress)
    seconds = time.monotonic() - began
    report.print_summary(trainer, summary, summary.step - start, seconds, console)
    if summary.stopped_by is not None:
        print(f"Stopped. Go on with: olmo-core train --run {trainer.run} --resume")
        raise typer.Exit(128 + summary.stopped_by)
    if sample > 0:
        report.print_sample(trainer, sample, console)
    print(f'More of it: olmo-core generate -c {trainer.run} "ROMEO:"')


def _last_checkpoint(run: Path, console: Console) -> Checkpoint | None:
    from olmo_core.train.checkpoint import checkpoint_folders, find_checkpoint

    if not checkpoint_folders(run):
        return None
    checkpoint, problems = find_checkpoint(run)
    for problem in problems:
        console.print(f"[yellow]{problem}; going on from {checkpoint.folder.name}[/yellow]")
    return checkpoint


def _config_of(checkpoint: Checkpoint, preset: str | None, changes: list[str]) -> TrainConfig:
    from olmo_core.train.config import TrainConfig
    from olmo_core.train.presets import get_preset

    saved = TrainConfig.from_dict(checkpoint.config)
    if preset is not None and get_preset(preset).merge(changes).model != saved.merge(changes).model:
        raise OLMoConfigurationError(
            f"{checkpoint.folder.parent} was not trained as preset {preset!r}: leave --preset out, "
            "or choose another --run"
        )
    config = saved.merge(changes)
    if config.model != saved.model:
        raise OLMoConfigurationError(
            f"{checkpoint.folder} is of another model: leave out the overrides of model.*, or "
            "choose another --run"
        )
    return config


def _check_folder(run: Path, resume: bool, overwrite: bool) -> None:
    from olmo_core.train.folder import run_files

    if not run.exists():
        return
    if not run.is_dir():
        raise OLMoConfigurationError(f"--run {run} is a file: give a folder")
    ours = run_files(run)
    if ours and not resume and not overwrite:
        raise OLMoConfigurationError(
            f"{run} holds an earlier run: --resume goes on with it, --overwrite removes it, "
            "another --run keeps both"
        )
    others = sorted(path.name for path in run.iterdir() if path not in ours)
    if others and not ours:
        raise OLMoConfigurationError(
            f"{run} is not empty ({', '.join(others[:3])}, ...): choose another folder with --run"
        )


@contextmanager
def _stopping_on_signals(trainer: Trainer, console: Console) -> Iterator[None]:
    """The first signal ends the run after its step; the second takes its usual course."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _frame: object) -> None:
        trainer.stop_signal = number
        console.print(f"{signal.Signals(number).name}: saving a checkpoint after this step")
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
