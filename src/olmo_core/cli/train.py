"""``olmo-core train``."""

from __future__ import annotations

import os
import shutil
import signal
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
    from olmo_core.train.metrics import Row
    from olmo_core.train.trainer import Summary, Trainer

# What a run writes into its folder; --overwrite removes these and nothing else.
OURS = (
    "step-*", "damaged-step-*", ".writing-step-*", ".old-step-*",
    "metrics.jsonl", ".metrics.jsonl", "loss.png", ".lock",
)  # fmt: skip


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
        typer.Option("--preset", "-p", help="Where to start: tiny, tiny-window, tiny-ngpt, ..."),
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
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration and stop.")
    ] = False,
) -> None:
    """Train a small language model on packed documents.

    Without --data it learns Shakespeare's plays, which come with the package. Stop it whenever you
    like: --resume goes on with the same losses.
    """
    # cuBLAS reads this when CUDA starts; without it matrix products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from rich.console import Console

    from olmo_core.train.presets import DEFAULT_PRESET, get_preset

    if resume and overwrite:
        raise OLMoConfigurationError("--resume and --overwrite exclude each other: choose one")
    run = Path("runs") / (preset or DEFAULT_PRESET) if run is None else run
    changes = list(overrides or [])
    if data is not None:
        changes.append(f"data.path={Path(data).expanduser().resolve()}")
    if steps is not None:
        changes.append(f"steps={steps}")

    console = Console(soft_wrap=not os.isatty(1))
    checkpoint = None
    if show_config:
        config = get_preset(preset or DEFAULT_PRESET).merge(changes)
    elif resume and (checkpoint := _last_checkpoint(run, console)):
        config = _config_of(checkpoint, preset, changes)
    else:
        config = get_preset(preset or DEFAULT_PRESET).merge(changes)
        _prepare_folder(run, resume, overwrite)
    config.check()
    if show_config:
        console.print_json(data=config.as_dict())
        return
    _train(config, run, checkpoint, console)


def _train(config: TrainConfig, run: Path, checkpoint: Checkpoint | None, console: Console) -> None:
    from olmo_core.train.trainer import Trainer

    trainer = Trainer(config, run, checkpoint=checkpoint)
    _print_header(trainer, console)
    start, began = trainer.step, time.monotonic()
    with _stopping_on_signals(trainer, console), _Progress(trainer, console) as progress:
        summary = trainer.fit(progress)
    seconds = time.monotonic() - began
    _print_summary(trainer, summary, summary.step - start, seconds, console)
    if summary.stopped_by is not None:
        raise typer.Exit(128 + summary.stopped_by)


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


def _prepare_folder(run: Path, resume: bool, overwrite: bool) -> None:
    if not run.exists():
        return
    if not run.is_dir():
        raise OLMoConfigurationError(f"--run {run} is a file: give a folder")
    ours = [path for pattern in OURS for path in run.glob(pattern)]
    if overwrite:
        for path in ours:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return
    others = sorted(path.name for path in run.iterdir() if path not in ours)
    if ours and not resume:
        raise OLMoConfigurationError(
            f"{run} holds an earlier run: --resume goes on with it, --overwrite removes it, "
            "another --run keeps both"
        )
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


class _Progress:
    """A bar with loss, tokens/s and time left; a line for each look at the held-out text."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.tokens_of_step = trainer.config.data.batch_size * trainer.config.data.sequence_length
        self.last_step, self.last_time = trainer.step, time.monotonic()
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            "", total=trainer.config.steps, completed=trainer.step, loss="-", speed="-"
        )
        self.speed = 0.0

    def __enter__(self) -> _Progress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def steps(self, rows: list[Row]) -> None:
        now, row = time.monotonic(), rows[-1]
        if row["step"] > self.last_step:
            done = row["step"] - self.last_step
            self.speed = done * self.tokens_of_step / max(now - self.last_time, 1e-9)
            self.last_step, self.last_time = row["step"], now
        self.progress.update(
            self.task, completed=row["step"], loss=f"{row['loss']:.3f}", speed=f"{self.speed:,.0f}"
        )
        if "held_out" in row:
            self.console.print(
                f"step {row['step']:>6}  loss {row['loss']:.3f}  "
                f"held-out {row['held_out']:.3f} bits/byte  {self.speed:,.0f} tokens/s",
                highlight=False,
            )

    def saved(self, folder: Path) -> None:
        """Checkpoints come often: they need no line."""


def _print_header(trainer: Trainer, console: Console) -> None:
    config = trainer.config
    source = config.data.path or "the embedded corpus (Shakespeare)"
    flops = trainer.model.num_flops_per_token(config.data.sequence_length)
    console.print(
        f"{trainer.model.num_params():,} parameters, {flops / 1e6:.1f} MFLOP a token, on "
        f"{trainer.device}; {trainer.data.num_tokens:,} tokens of {source}, "
        f"{trainer.held_out.num_tokens:,} held out; {config.data.batch_size} rows of "
        f"{config.data.sequence_length} tokens a step"
        + (f"; going on from step {trainer.step}" if trainer.step else ""),
        highlight=False,
    )


def _print_summary(
    trainer: Trainer, summary: Summary, steps: int, seconds: float, console: Console
) -> None:
    from rich.table import Table

    from olmo_core.train.metrics import read_metrics
    from olmo_core.train.plot import plot_losses

    run = trainer.run
    table = Table(show_header=False, box=None, padding=(0, 2))
    tokens = steps * trainer.config.data.batch_size * trainer.config.data.sequence_length
    table.add_row("steps", f"{summary.step} of {trainer.config.steps}")
    if steps:
        speed = f"{tokens / seconds:,.0f} tokens/s"
        table.add_row("time", f"{seconds:.0f} s for {tokens:,} tokens: {speed}, looks included")
    if summary.held_out is not None:
        gain = summary.bigram - summary.held_out
        table.add_row("held-out text", f"{summary.held_out:.3f} bits/byte")
        words = "better" if gain > 0 else "worse"
        table.add_row("bigram model", f"{summary.bigram:.3f} bits/byte: {abs(gain):.3f} {words}")
    table.add_row("checkpoint", str(summary.checkpoint))
    plot = run / "loss.png"
    rows = read_metrics(run / "metrics.jsonl")
    if any("held_out" in row for row in rows):
        drawn = plot_losses(rows, summary.bigram, plot, f"{run.name}: loss")
        table.add_row("plot", str(plot) if drawn else "pip install 'olmo-attention[plot]' draws it")
    console.print(table, highlight=False, soft_wrap=True)
    if summary.stopped_by is not None:
        console.print(f"Stopped. Go on with: olmo-core train --run {run} --resume", soft_wrap=True)
        return
    console.rule("a sample", align="left")
    console.print(_sample(trainer), markup=False, highlight=False)
    console.rule()
    console.print(
        f'More of it: olmo-core generate --checkpoint {run} "ROMEO:"', highlight=False,
        soft_wrap=True,
    )  # fmt: skip


def _sample(trainer: Trainer, tokens: int = 400) -> str:
    from olmo_core.data import EOD, decode
    from olmo_core.nn.transformer import generate

    steps = generate(
        trainer.model, [[EOD]], max_new_tokens=tokens, temperature=0.8, top_p=0.95,
        seed=trainer.config.seed, end_token=EOD,
    )  # fmt: skip
    return decode(token for (token,) in steps if token is not None)
