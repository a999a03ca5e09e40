"""Several ranks have the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gloo_ranks import on_ranks
from olmo_core.train.checkpoint import find_checkpoint
from olmo_core.train.config import TrainConfig
from olmo_core.train.metrics import Row, read_metrics
from olmo_core.train.parallel.degrees import deal
from olmo_core.train.presets import get_preset
from olmo_core.train.trainer import Trainer

pytestmark = pytest.mark.distributed

SMALL = [
    "model.d_model=16", "model.n_layers=2", "model.pattern=[0,1]", "device=cpu",
    "model.blocks.0.sequence_mixer.head_dim=8", "model.blocks.1.sequence_mixer.n_kv_heads=2",
    "data.sequence_length=64", "data.batch_size=4", "data.max_doc_len=48", "model.dtype=float64",
    "optimizer.warmup_steps=2", "eval_batches=2", "eval_every=3", "save_every=4", "log_every=2",
]  # fmt: skip


class Watch:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def steps(self, rows: list[Row]) -> None:
        self.rows += rows

    def saved(self, folder: Path) -> None:
        pass


def small(corpus: Path, *changes: str) -> TrainConfig:
    return get_preset("tiny-hybrid").merge([*SMALL, f"data.path={corpus}", *changes])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [json.dumps({"text": f"{i} mice and {i * i} cats. " * (1 + i % 7)}) for i in range(90)]
    path.write_text("\n".join(lines))
    return path


def trained(rank: int, n: int, config: TrainConfig, run: Path, options: dict[str, Any]) -> Any:
    from olmo_core.train.parallel.many import ManyRanks

    watch = Watch()
    trainer = Trainer(config, run, ranks=ManyRanks(deal(n, **options)))
    summary = trainer.fit(watch)
    assert (watch.rows != []) == (rank == 0)
    return summary


def curve(run: Path) -> list[Row]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {}),
    "zig_zag": (2, {"cp": "zig_zag"}),
    "llama3": (2, {"cp": "llama3"}),
    "balanced": (2, {"cp": "balanced"}),
    "ulysses": (2, {"cp": "ulysses"}),
    "tp": (2, {"tp_degree": 2}),
    "hybrid": (4, {"cp": "zig_zag", "ulysses_degree": 2}),
    "data x cp": (4, {"cp": "balanced", "cp_degree": 2}),
    "data x tp": (4, {"tp_degree": 2}),
    "cp x tp": (4, {"cp": "llama3", "cp_degree": 2, "tp_degree": 2}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_one_process(corpus: Path, tmp_path: Path, name: str) -> None:
    n, options = OPTIONS[name]
    config = small(corpus, "steps=6")
    Trainer(config, tmp_path / "one").fit(Watch())
    summaries = on_ranks(n, trained, config, tmp_path / "many", options)
    want, got = curve(tmp_path / "one"), curve(tmp_path / "many")
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=1e-8, rel=1e-8)
    assert summaries == summaries[:1] * n
    print(max(abs(a["loss"] - b["loss"]) for a, b in zip(got, want)))
    one, many = (find_checkpoint(tmp_path / name)[0] for name in ("one", "many"))
    for part in ("model", "training"):
        a, b = getattr(one, part)(), getattr(many, part)()
        assert {k for k in a if not k.startswith("rng")} == set(b)
        for key, value in b.items():
            assert (value - a[key]).abs().max() < 1e-6, key
