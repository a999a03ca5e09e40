"""``olmo-core train`` on two ranks that share one GPU, by way of gloo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli.test_launch import launch
from olmo_core.train.metrics import read_metrics

STEPS = 10
SETTINGS = [
    "-m", "olmo_core", "train", "--steps", str(STEPS), "--sample", "0", "data.batch_size=4",
    "data.sequence_length=256", "data.max_doc_len=200", "eval_batches=1", "log_every=1",
]  # fmt: skip
STYLES = {
    "rows": [],
    "zig_zag": ["--cp", "zig_zag"],
    "llama3": ["--cp", "llama3"],
    "balanced": ["--cp", "balanced"],
    "ulysses": ["--cp", "ulysses"],
    "tp": ["--tp-degree", "2"],
}


def losses(folder: Path, name: str, n: int, *options: str) -> list[float]:
    done = launch(folder, "--nproc-per-node", str(n), *SETTINGS, "--save-folder", name, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [row["loss"] for row in read_metrics(folder / name / "metrics.jsonl")]


def apart(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def compare(folder: Path, device: str, styles: dict[str, list[str]]) -> None:
    """Ranks in bfloat16 are as near to one process as that is to float32."""
    on, half = [f"device={device}"], ["autocast=bfloat16"]
    runs = {name: (2, [*options, *on, *half]) for name, options in styles.items()}
    runs |= {"alone": (1, [*on, *half]), "exact": (1, on)}
    with ThreadPoolExecutor() as pool:
        started = {
            name: pool.submit(losses, folder, name, n, *options)
            for name, (n, options) in runs.items()
        }
    found = {name: run.result() for name, run in started.items()}
    alone = found.pop("alone")
    spread = apart(alone, found.pop("exact"))
    differences = {name: apart(alone, losses) for name, losses in found.items()}
    assert max(differences.values()) <= 2 * max(spread, 1e-3), (differences, spread)


@pytest.mark.gpu
def test_two_ranks_on_one_gpu(tmp_path: Path) -> None:
    compare(tmp_path, "cuda", STYLES)


@pytest.mark.slow
def test_two_ranks_in_half_precision_on_a_cpu(tmp_path: Path) -> None:
    compare(tmp_path, "cpu", {name: STYLES[name] for name in ("zig_zag", "tp")})
