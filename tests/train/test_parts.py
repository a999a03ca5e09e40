"""Bigram, schedule, metrics and plot, each by itself."""

from __future__ import annotations

import builtins
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo_core.data import EOD, VOCAB_SIZE, PackedDocuments
from olmo_core.train.bigram import Bigram
from olmo_core.train.metrics import Metrics, read_metrics
from olmo_core.train.plot import plot_losses
from olmo_core.train.schedule import cosine_with_warmup


def test_bigram_against_counting_by_hand() -> None:
    train, held_out = [b"abab", b"ba", b""], [b"abc", b"b"]
    stream = [EOD, *b"abab", EOD, *b"ba", EOD, EOD]
    pairs = Counter(itertools.pairwise(stream))
    first, second = Counter(stream[:-1]), Counter(stream[1:])
    n, k = len(stream) - 1, 2.5

    def probability(a: int, b: int) -> float:
        unigram = (second[b] + 1) / (n + VOCAB_SIZE)
        return (pairs[a, b] + k * unigram) / (first[a] + k)

    bits = sum(
        -math.log2(probability(a, b))
        for document in held_out
        for a, b in zip([EOD, *document], [*document, EOD], strict=True)
    )
    data = [PackedDocuments(d, batch_size=2, sequence_length=3) for d in (train, held_out)]
    bigram = Bigram(data[0].stream, k=k)
    # Four bytes; the pieces' padding and the ends of documents are no bytes.
    assert bigram.bits_per_byte(data[1].one_epoch()) == pytest.approx(bits / 4, rel=1e-12)
    firsts, seconds = torch.cartesian_prod(*[torch.arange(VOCAB_SIZE)] * 2).unbind(1)
    sums = bigram.log_probability(firsts, seconds).exp().view(VOCAB_SIZE, -1).sum(1)
    assert sums.allclose(sums.new_ones(VOCAB_SIZE))


def test_schedule() -> None:
    def lr(step: int, warmup_steps: int = 4) -> float:
        return cosine_with_warmup(
            step, lr=2.0, steps=25, warmup_steps=warmup_steps, final_fraction=0.1
        )

    assert [lr(i) for i in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert lr(14) == pytest.approx(1.1) and lr(24) == pytest.approx(0.2)
    assert lr(99) == pytest.approx(0.2)
    assert lr(0, warmup_steps=0) == 2.0


def test_metrics_end_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.append([{"step": i, "loss": 1 / i} for i in range(1, 6)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    resumed = Metrics(path, step=3)
    resumed.append([{"step": 4, "loss": 0.5}])
    assert read_metrics(path) == resumed.rows
    assert [row["loss"] for row in resumed.rows] == [1, 1 / 2, 1 / 3, 0.5]
    assert Metrics(path).rows == [] and path.read_text() == ""
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": i, "loss": 5 / i, "seconds": 0} for i in range(1, 9)]
    rows[-1]["held_out"] = 2.0
    assert plot_losses(rows, 3.5, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    imports = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert not plot_losses(rows, 3.5, tmp_path / "none.png", "a run")
    assert not (tmp_path / "none.png").exists()
