"""Several ranks have the losses of one process, and go on with each other's checkpoints."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gloo_ranks import on_ranks
from olmo_core.nn.attention import AttentionConfig, SlidingWindowAttentionConfig
from olmo_core.nn.sharded import is_sharded
from olmo_core.train.checkpoint import find_checkpoint
from olmo_core.train.config import TrainConfig
from olmo_core.train.parallel.degrees import deal
from olmo_core.train.parallel.many import ManyRanks
from olmo_core.train.presets import DEFAULT_PRESET, get_preset
from olmo_core.train.trainer import Trainer
from train.parallel.runs import curve, small, train, write_corpus

pytestmark = pytest.mark.distributed

Options = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def near(got: Path, want: Path, bound: float) -> None:
    for a, b in zip(curve(got), curve(want), strict=True):
        assert a == pytest.approx(b, abs=bound, rel=bound)


OPTIONS: dict[str, Options] = {
    "data": (2, {}),
    "zig_zag": (2, {"cp": "zig_zag"}),
    "llama3": (2, {"cp": "llama3"}),
    "balanced": (2, {"cp": "balanced"}),
    "ulysses": (2, {"cp": "ulysses"}),
    "tp": (2, {"tp_degree": 2}),
    "hybrid": (4, {"cp": "zig_zag", "ulysses_degree": 2}),
    "cp x tp": (4, {"cp": "llama3", "cp_degree": 2, "tp_degree": 2}),
}
MORE: dict[str, Options] = {
    "data x cp": (4, {"cp": "balanced", "cp_degree": 2}),
    "data x tp": (4, {"tp_degree": 2}),
    "hybrid, balanced": (4, {"cp": "balanced", "ulysses_degree": 2}),
    "hybrid, llama3": (4, {"cp": "llama3", "ulysses_degree": 2}),
    "a ring of one": (2, {"cp": "zig_zag", "ulysses_degree": 2}),
    "three": (3, {"cp": "balanced"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_one_process(corpus: Path, tmp_path: Path, name: str) -> None:
    """Weights and the optimizer's state, too."""
    n, options = OPTIONS[name]
    config = small(corpus, "steps=6")
    one = train(0, 1, config, tmp_path / "one", {})
    summaries = on_ranks(n, train, config, tmp_path / "many", options)
    near(tmp_path / "many", tmp_path / "one", 1e-8)
    assert summaries == summaries[:1] * n
    assert summaries[0].held_out == pytest.approx(one.held_out, rel=1e-10)
    assert summaries[0].bigram == one.bigram
    whole, shared = (find_checkpoint(tmp_path / name)[0] for name in ("one", "many"))
    for part in ("model", "training"):
        a, b = getattr(whole, part)(), getattr(shared, part)()
        assert {"rng.cpu", *b} == {"rng.seed", *a} if part == "training" else set(a) == set(b)
        for key in {*a} & {*b}:
            assert (a[key] - b[key]).abs().max() < 1e-7, key


# At the presets' learning rate so small a model drifts apart from itself: moved by 1e-15 it is
# 1e-5 away after 25 steps.
CALM = "optimizer.lr=5e-4"
PRESETS = ["tiny-hybrid", "tiny", "tiny-window", "tiny-ngpt"]
ALL = [(name, preset) for name in OPTIONS for preset in PRESETS]
ALL += [(name, "tiny-hybrid") for name in MORE]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), ALL)
def test_thirty_steps(corpus: Path, tmp_path: Path, name: str, preset: str) -> None:
    n, options = (OPTIONS | MORE)[name]
    changes = [CALM, "steps=30", "model.n_layers=4", f"data.batch_size={12 if n == 3 else 4}"]
    if preset == "tiny-hybrid":
        changes.append("model.pattern=[0,0,0,1]")
    config = small(corpus, *changes, preset=preset)
    train(0, 1, config, tmp_path / "one", {})
    on_ranks(n, train, config, tmp_path / "many", options, timeout=300)
    for key in ("loss", "held_out"):
        got, want = ([row.get(key) for row in curve(tmp_path / run)] for run in ("many", "one"))
        assert got == pytest.approx(want, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIONS, *MORE])
def test_float32(corpus: Path, tmp_path: Path, name: str) -> None:
    """Rounding makes runs drift apart later."""
    n, options = (OPTIONS | MORE)[name]
    changes = [CALM, "steps=15", "model.dtype=float32", f"data.batch_size={12 if n == 3 else 4}"]
    config = small(corpus, *changes)
    train(0, 1, config, tmp_path / "one", {})
    on_ranks(n, train, config, tmp_path / "many", options, timeout=300)
    losses = [[row["loss"] for row in curve(tmp_path / run)] for run in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["balanced", "tp"])
def test_the_whole_demo(tmp_path: Path, name: str) -> None:
    """In float32: ten minutes on two cores."""
    n, options = OPTIONS[name]
    config = get_preset(DEFAULT_PRESET).merge(["device=cpu"])
    one = train(0, 1, config, tmp_path / "one", {})
    many = on_ranks(n, train, config, tmp_path / "many", options, timeout=3000)[0]
    losses = [[row["loss"] for row in curve(tmp_path / run)] for run in ("one", "many")]
    assert losses[0][:15] == pytest.approx(losses[1][:15], abs=1e-4)
    assert one.held_out == pytest.approx(many.held_out, rel=0.02)


def compiled(rank: int, n: int, backend: str, *args: Any) -> tuple[list[str], int]:
    """What the compiler warns of, and how many graphs it makes."""
    from torch._dynamo.utils import counters

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch._dynamo")
    torch._dynamo.reset()
    counters.clear()
    logger.addHandler(handler)
    try:
        with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
            train(rank, n, *args)
    finally:
        logger.removeHandler(handler)
    return warnings, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["data", "zig_zag", "tp"])
def test_compiled(corpus: Path, tmp_path: Path, name: str, backend: str) -> None:
    """Three kinds of layers, shapes that change (with ``zig_zag``), and looks at held-out text."""
    n, options = OPTIONS[name]
    changes = [CALM, "steps=6", "model.dtype=float32", "model.n_layers=6"]
    config = small(corpus, *changes, "model.pattern=[0,1,0,1,0,1]")
    attention = config.model.blocks[1].sequence_mixer
    assert isinstance(attention, AttentionConfig)
    attention.sliding_window = SlidingWindowAttentionConfig([9, 9, 9, 9, 9, -1])
    train(0, 1, config, tmp_path / "one", {})
    config = config.merge(["compile=true"])
    for warnings, graphs in on_ranks(
        n, compiled, backend, config, tmp_path / "many", options, timeout=500
    ):
        assert warnings == [] and graphs > 3
    losses = [[row["loss"] for row in curve(tmp_path / run)] for run in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


HALF: dict[str, Options] = {
    "data": (2, {}),
    "balanced": (2, {"cp": "balanced"}),
    "ulysses": (2, {"cp": "ulysses"}),
    "cp x tp": (4, {"cp": "llama3", "cp_degree": 2, "tp_degree": 2}),
}


@pytest.mark.parametrize(
    "name", ["data", "balanced", "ulysses", pytest.param("cp x tp", marks=pytest.mark.slow)]
)
def test_bfloat16_beside_float32(corpus: Path, tmp_path: Path, name: str) -> None:
    """Gates, norms and ``A_log`` of a delta net stay float32, which FSDP2 gathers apart."""
    n, options = HALF[name]
    curves = []
    for dtype in ("float64", "bfloat16"):
        config = small(corpus, "steps=3", f"model.dtype={dtype}")
        train(0, 1, config, tmp_path / dtype, {})
        curves.append([row["loss"] for row in curve(tmp_path / dtype)])
    on_ranks(n, train, config, tmp_path / "many", options)
    truth, half = curves
    rounding = max(abs(a - b) for a, b in zip(truth, half, strict=True))
    assert rounding > 0
    got = [row["loss"] for row in curve(tmp_path / "many")]
    assert got == pytest.approx(truth, abs=3 * rounding)


def looked(rank: int, n: int, config: TrainConfig, run: Path) -> list[bool]:
    trainer = Trainer(config, run, ranks=ManyRanks(deal(n, cp="zig_zag")))
    trainer.evaluate(1)
    return [is_sharded(parameter) for parameter in trainer.model.parameters()]


def test_a_look_leaves_the_parameters_sharded(corpus: Path, tmp_path: Path) -> None:
    """FSDP2 gathers the outermost ones for a backward pass, which does not come."""
    assert all(map(all, on_ranks(2, looked, small(corpus), tmp_path)))


def test_going_on_with_another_number(corpus: Path, tmp_path: Path) -> None:
    """Two ranks, then one process, four, and two that share layers: as if never interrupted. The
    signal comes to a rank that does not write."""
    config = small(corpus, "steps=8")
    train(0, 1, config, tmp_path / "one", {})
    run = tmp_path / "many"
    summaries = on_ranks(2, train, config, run, {"cp": "zig_zag"}, (1, 2))
    assert [(s.step, s.stopped_by) for s in summaries] == [(2, 15)] * 2
    assert train(0, 1, config, run, {}, (0, 4)).step == 4
    on_ranks(4, train, config, run, {"cp": "llama3", "ulysses_degree": 2}, (3, 6))
    assert on_ranks(2, train, config, run, {"tp_degree": 2})[1].stopped_by is None
    near(run, tmp_path / "one", 1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"cp": "ulysses"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"tp_degree": 2}, marks=pytest.mark.slow),
    ],
)
def test_dropout_goes_on_to_the_bit(corpus: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    dropout = "model.blocks.0.sequence_mixer.dropout=0.2"
    config = small(corpus, dropout, "steps=4", preset="tiny")
    on_ranks(2, train, config, tmp_path / "whole", options)
    for stop in ((0, 2), None):
        on_ranks(2, train, config, tmp_path / "broken", options, stop)
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    plain = small(corpus, "steps=4", preset="tiny")
    on_ranks(2, train, plain, tmp_path / "plain", options)
    assert curve(tmp_path / "plain") != curve(tmp_path / "whole")
