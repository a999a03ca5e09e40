"""``olmo-core train``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, cast

import typer

from olmo_core.cli.streams import SteadyOutput
from olmo_core.cli.tables import path_of
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from olmo_core.train.checkpoint import Checkpoint
    from olmo_core.train.config import TrainConfig
    from olmo_core.train.folder import RunFolder
    from olmo_core.train.parallel.ranks import Ranks
    from olmo_core.train.trainer import Summary, Trainer


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
            "--run",
            "--save-folder",
            metavar="FOLDER",
            parser=path_of("--run"),
            help="Folder for checkpoints, metrics and plot (under torchrun --save-folder: it "
            "takes --run for its own).  [default: runs/PRESET]",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="PATH", help="Text or .jsonl file, or a folder of them (also .gz)."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="A tokenizer.json, whose tokens the model learns instead of bytes.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Optimizer steps."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the folder's earlier run first.")
    ] = False,
    sample: Annotated[
        int,
        typer.Option(
            "--sample",
            min=0,
            max=100_000,
            help="Tokens (bytes) of the sample at the end; 0 is none.",
        ),
    ] = 250,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration and stop.")
    ] = False,
    cp: Annotated[
        str | None,
        typer.Option(
            "--cp",
            metavar="STYLE",
            help="Under torchrun, how ranks share sequences: zig_zag, llama3, balanced or ulysses.",
        ),
    ] = None,
    cp_degree: Annotated[
        int | None,
        typer.Option(
            "--cp-degree", help="How many ranks share a sequence.  [default: all that there are]"
        ),
    ] = None,
    ulysses_degree: Annotated[
        int | None,
        typer.Option(
            "--ulysses-degree", help="How many of them are a Ulysses group inside a ring."
        ),
    ] = None,
    tp_degree: Annotated[
        int | None,
        typer.Option("--tp-degree", help="Under torchrun, how many ranks share each layer."),
    ] = None,
) -> None:
    """Train a small language model on packed documents.

    Without --data it learns Shakespeare's plays, which come with the package. Stop it whenever you
    like: --resume goes on with the same losses. Under torchrun (torchrun --nproc-per-node 2 -m
    olmo_core train ...) the ranks share model and batch, and the losses stay those of one process.
    """
    _set_environment()

    from olmo_core.cli import tables
    from olmo_core.cli.launch import joined
    from olmo_core.train.folder import RunFolder
    from olmo_core.train.presets import DEFAULT_PRESET, get_preset
    from olmo_core.train.trainer import Trainer

    output = SteadyOutput(sys.stdout)
    console = tables.console(cast("IO[str]", output))
    name = DEFAULT_PRESET if preset is None else preset
    degrees = {"cp": cp, "cp_degree": cp_degree, "ulysses_degree": ulysses_degree}
    with joined(**degrees, tp_degree=tp_degree) as ranks:
        console.quiet = not ranks.is_first
        with ranks.together():
            if resume and overwrite:
                raise OLMoConfigurationError(
                    "--resume and --overwrite exclude each other: choose one"
                )
            changes = _changes(overrides, data, tokenizer, steps)
            if not resume or show_config:
                config = get_preset(name).merge(changes)
                config.check()
        if show_config:
            if ranks.is_first:
                tables.console().print_json(data=config.as_dict())
            return
        folder = RunFolder(
            Path("runs") / name if run is None else run,
            option="--run" if ranks.size == 1 else "--save-folder",
        )
        ranks.on_first(_check_folder, folder, resume, overwrite)
        with ranks.entered_by_first(folder.held()):
            checkpoint = None
            if resume:
                checkpoint = _last_checkpoint(folder.path, ranks, console)
                with ranks.together():
                    config = _config_of(checkpoint, preset, changes, folder.option)
            trainer = Trainer(
                config, folder, checkpoint=checkpoint, overwrite=overwrite, ranks=ranks
            )
            summary = _train(trainer, console)
    if ranks.is_first:
        _show_what_it_learned(trainer, summary, sample, console)
    if output.failure is not None:
        raise output.failure


def _changes(
    overrides: list[str] | None, data: str | None, tokenizer: str | None, steps: int | None
) -> list[str]:
    changes = list(overrides or [])
    if tokenizer is not None:
        from olmo_core.data import load_vocabulary

        path = str(Path(os.path.expanduser(tokenizer)).resolve())
        size = load_vocabulary(path).size
        # Before the others, so that a larger vocab_size can be asked for.
        changes = [f"data.tokenizer={json.dumps(path)}", f"model.vocab_size={size}", *changes]
    if data is not None:
        # An empty path stays one: resolved it would be the current folder.
        path = str(Path(os.path.expanduser(data)).resolve()) if data.strip() else data
        changes.append(f"data.path={json.dumps(path)}")
    if steps is not None:
        changes.append(f"steps={steps}")
    return changes


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


def _train(trainer: Trainer, console: Console) -> Summary:
    from olmo_core.cli import train_report as report
    from olmo_core.cli.launch import command_line

    ranks = trainer.ranks

    def begin() -> None:
        report.print_header(trainer, console)
        if (failure := cast("SteadyOutput", console.file).failure) is not None:
            raise failure  # later the run is worth more than its report

    ranks.on_first(begin)
    start, began = trainer.step, time.monotonic()
    progress = report.TrainingProgress(trainer, console)
    with _stopping_on_signals(trainer, console, launched=ranks.size > 1), progress:
        summary = trainer.fit(progress)
    seconds = time.monotonic() - began
    if ranks.is_first:
        report.print_summary(trainer, summary, summary.step - start, seconds, console)
    if summary.stopped_by is not None:
        again = f"{command_line(ranks)} {trainer.folder.option} {trainer.run} --resume"
        console.print(f"Stopped. Go on with: {again}", soft_wrap=True)
        raise typer.Exit(128 + summary.stopped_by)
    return summary


def _show_what_it_learned(
    trainer: Trainer, summary: Summary, sample: int, console: Console
) -> None:
    from olmo_core.cli import train_report as report

    if sample > 0:
        report.print_sample(trainer, summary, sample, console)
    console.print(f'More of it: olmo-core generate -c {trainer.run} "ROMEO:"', soft_wrap=True)


def _last_checkpoint(run: Path, ranks: Ranks, console: Console) -> Checkpoint:
    from olmo_core.train.parallel.storage import find

    checkpoint, problems = find(run, ranks)
    for problem in problems:
        message = f"{problem}; going on from {checkpoint.folder.name}"
        console.print(message, style="yellow", soft_wrap=True)
    return checkpoint


def _config_of(
    checkpoint: Checkpoint, preset: str | None, changes: list[str], option: str
) -> TrainConfig:
    from olmo_core.train.config import TrainConfig
    from olmo_core.train.presets import get_preset

    saved = TrainConfig.from_dict(checkpoint.config)
    if preset is not None and get_preset(preset).merge(changes).model != saved.merge(changes).model:
        raise OLMoConfigurationError(
            f"{checkpoint.folder.parent} was not trained as preset {preset!r}: leave --preset out, "
            f"or choose another {option}"
        )
    config = saved.merge(changes)
    if config.model != saved.model:
        raise OLMoConfigurationError(
            f"{checkpoint.folder} is of another model: leave out the overrides of model.*, or "
            f"choose another {option}"
        )
    return config


def _check_folder(folder: RunFolder, resume: bool, overwrite: bool) -> None:
    """What is in the folder must go with what was asked."""
    from olmo_core.train.checkpoint import checkpoint_folders

    run = folder.path
    if os.path.isfile(run):
        raise OLMoConfigurationError(f"{folder.option} {run} is a file: give a folder")
    exists = os.path.isdir(run)
    if resume and not (exists and checkpoint_folders(run)):
        why = "holds no checkpoint" if exists else "does not exist"
        raise OLMoConfigurationError(
            f"there is nothing to resume: {run} {why}. Leave out --resume to start a run in it"
        )
    if not exists or resume:
        return
    earlier = folder.earlier()
    if earlier and not overwrite:
        raise OLMoConfigurationError(
            f"{run} holds an earlier run: --resume goes on with it, --overwrite removes it, "
            f"another {folder.option} keeps both"
        )
    others = folder.others()
    if others and not earlier:
        raise OLMoConfigurationError(
            f"{run} is not empty ({', '.join(others[:3])}, ...): choose another folder with "
            f"{folder.option}"
        )


@contextmanager
def _stopping_on_signals(
    trainer: Trainer, console: Console, *, launched: bool = False
) -> Iterator[None]:
    """The first signal ends the run after its step; the second takes its usual course.

    :param launched: by ``torchrun``, which hands on signals that a terminal has sent to all
        processes already. A second one then has no effect; the launcher ends who takes too long.
    """
    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {number: signal.getsignal(number) for number in numbers}
    # What is ignored stays so: nohup, for example, means that a hangup is to be ignored.
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}

    def stop(number: int, _frame: object) -> None:
        trainer.stop_signal = number
        console.print(f"{signal.Signals(number).name}: saving a checkpoint after this step")
        for each, handler in before.items():
            signal.signal(each, signal.SIG_IGN if launched else handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
