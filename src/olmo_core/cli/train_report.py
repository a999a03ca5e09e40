"""What ``olmo-core train`` shows: the run's size, a progress bar, and a table at the end."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from olmo_core.cli.tables import named
from olmo_core.data.documents import SUFFIXES
from olmo_core.nn.transformer import generate
from olmo_core.train.checkpoint import load_model
from olmo_core.train.folder import METRICS, PLOT
from olmo_core.train.metrics import Row, read_metrics
from olmo_core.train.plot import plot_losses
from olmo_core.train.trainer import Summary, Trainer

__all__ = ["TrainingProgress", "print_header", "print_sample", "print_summary"]


class TrainingProgress:
    """A bar with loss, tokens/s and time left; a line for each look at the held-out text."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.console = console
        self.tokens_of_step = trainer.config.data.batch_size * trainer.config.data.sequence_length
        self.last_step, self.last_time, self.speed = trainer.step, time.monotonic(), 0.0
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

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def steps(self, rows: list[Row]) -> None:
        now, row = time.monotonic(), rows[-1]
        done = row["step"] - self.last_step
        self.speed = done * self.tokens_of_step / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = row["step"], now
        self.progress.update(
            self.task, completed=row["step"], loss=f"{row['loss']:.3f}", speed=f"{self.speed:,.0f}"
        )
        if "held_out" in row:
            self.console.print(
                f"step {row['step']:>6}  loss {row['loss']:.3f}  "
                f"held-out {row['held_out']:.3f} bits/byte"
            )

    def saved(self, folder: Path) -> None:
        """Checkpoints come often: they need no line."""


def print_header(trainer: Trainer, console: Console) -> None:
    """The model's and the data's size."""
    data = trainer.config.data
    flops = trainer.model.num_flops_per_token(trainer.data.max_doc_len)
    rows: dict[str, str] = {}
    rows["model"] = (
        f"{trainer.model.num_params():,} parameters, {flops / 1e6:.1f} MFLOP a token, on "
        f"{trainer.device}"
    )
    rows["text"] = data.path or "the embedded corpus: Shakespeare's plays"
    if trainer.skipped:
        rows["skipped"] = _names(trainer.skipped, data.path or "")
    rows["tokens"] = (
        f"{trainer.data.num_tokens:,} to train on, {trainer.held_out.num_tokens:,} held out"
    )
    rows["batch"] = (
        f"{data.batch_size} x {data.sequence_length} tokens of packed documents, at most "
        f"{trainer.data.max_doc_len} each"
    )
    if trainer.ranks.size > 1:
        rows["ranks"] = f"{trainer.ranks.size}: {trainer.ranks.degrees}"
    if trainer.step:
        rows["from"] = f"step {trainer.step}"
    _print_rows(rows, console)


def print_summary(
    trainer: Trainer, summary: Summary, steps: int, seconds: float, console: Console
) -> None:
    """How the run ended, with the plot drawn.

    :param steps: that this process made, in ``seconds``.
    """
    run = trainer.run
    tokens = steps * trainer.config.data.batch_size * trainer.config.data.sequence_length
    rows: dict[str, str] = {}
    rows["steps"] = f"{summary.step} of {trainer.config.steps}"
    if steps:
        rows["time"] = f"{seconds:.0f} s, {tokens / seconds:,.0f} tokens/s with all interruptions"
    if summary.held_out is not None:
        gain = summary.bigram - summary.held_out
        words = "better than" if gain > 0 else "worse than"
        rows["held-out text"] = (
            f"{summary.held_out:.3f} bits/byte: {abs(gain):.3f} {words} the bigram model's "
            f"{summary.bigram:.3f}"
        )
    rows["checkpoint"] = str(summary.checkpoint)
    metrics = read_metrics(run / METRICS)
    if any("held_out" in row for row in metrics):
        plot = run / PLOT
        with named(plot):
            drawn = plot_losses(metrics, summary.bigram, plot, f"{run.name}: loss")
        rows["plot"] = str(plot) if drawn else "pip install 'olmo-attention[plot]' draws it"
    _print_rows(rows, console)


def print_sample(trainer: Trainer, summary: Summary, tokens: int, console: Console) -> None:
    """Text that the model makes from nothing: a whole one, read from the checkpoint if the
    trainer's is a rank's part."""
    vocabulary = trainer.vocabulary
    model = trainer.model
    if trainer.ranks.size > 1:
        _, weights, _ = load_model(summary.checkpoint)
        model = trainer.config.model.build(init_device="meta")
        model.load_state_dict(weights, assign=True)
        model = model.to(trainer.device)
    steps = generate(
        model,
        [[vocabulary.end]],
        max_new_tokens=tokens,
        temperature=0.8,
        top_p=0.95,
        seed=trainer.config.seed,
        end_token=vocabulary.end,
    )
    console.rule("a sample", align="left")
    console.print(vocabulary.decode(token for (token,) in steps if token is not None))
    console.rule()


def _names(files: list[Path], folder: str) -> str:
    names = ", ".join(os.path.relpath(file, folder) for file in files[:5])
    more = f" and {len(files) - 5:,} more" if len(files) > 5 else ""
    return f"{names}{more}: no file of {', '.join(SUFFIXES)}, with or without .gz"


def _print_rows(rows: dict[str, str], console: Console) -> None:
    """Two columns; a line may be longer than the terminal, so that a path stays whole."""
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:{width}}  {value}", soft_wrap=True)
