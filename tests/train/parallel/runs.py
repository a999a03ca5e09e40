"""Small runs on ranks of the tests' pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olmo_core.train.config import TrainConfig
from olmo_core.train.metrics import Row, read_metrics
from olmo_core.train.parallel import storage
from olmo_core.train.parallel.degrees import deal
from olmo_core.train.parallel.many import ManyRanks
from olmo_core.train.parallel.ranks import Ranks
from olmo_core.train.presets import get_preset
from olmo_core.train.trainer import Summary, Trainer

HYBRID = [
    "model.pattern=[0,1]", "model.blocks.0.sequence_mixer.head_dim=8",
    "model.blocks.1.sequence_mixer.n_kv_heads=2",
]  # fmt: skip
SMALL = [
    "model.d_model=16", "model.n_layers=2", "model.dtype=float64", "device=cpu",
    "data.sequence_length=64", "data.batch_size=4", "data.max_doc_len=48",
    "optimizer.warmup_steps=2", "optimizer.grad_clip=0.3", "eval_batches=2", "eval_every=3",
    "save_every=4", "log_every=2",
]  # fmt: skip


class Watch:
    """Sees all."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def steps(self, rows: list[Row]) -> None:
        self.rows += rows

    def saved(self, folder: Path) -> None:
        pass


def write_corpus(folder: Path) -> Path:
    path = folder / "text.jsonl"
    lines = [json.dumps({"text": f"{i} mice and {i * i} cats. " * (1 + i % 7)}) for i in range(90)]
    path.write_text("\n".join(lines))
    return path


def small(corpus: Path, *changes: str, preset: str = "tiny-hybrid") -> TrainConfig:
    """Every shape odd enough to need padding; gradients are always clipped."""
    own = HYBRID if preset == "tiny-hybrid" else []
    return get_preset(preset).merge([*SMALL, *own, f"data.path={corpus}", *changes])


def train(
    rank: int, n: int, config: TrainConfig, run: Path, options: dict[str, Any],
    stop: tuple[int, int] | None = None,
) -> Summary:  # fmt: skip
    """A run on ``n`` ranks that goes on from what is in the folder.

    :param stop: (rank, step): who is told to stop, and when.
    """
    ranks = ManyRanks(deal(n, **options)) if n > 1 else Ranks()
    checkpoint = None
    if ranks.on_first(run.exists):
        checkpoint, problems = storage.find(run, ranks)
        assert problems == []
    trainer = Trainer(config, run, checkpoint=checkpoint, ranks=ranks)
    take = trainer._train_step

    def step() -> Row:
        if stop == (rank, trainer.step + 1):
            trainer.stop_signal = 15
        return take()

    trainer._train_step = step  # type: ignore[method-assign]
    watch = Watch()
    summary = trainer.fit(watch)
    assert (watch.rows != []) == (rank == 0)
    return summary


def curve(run: Path) -> list[Row]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
