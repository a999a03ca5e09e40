"""README.md: its example prints what it says, its tables follow the code, its links exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    assert found is not None
    return found[1]


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("prefix", ["", "hf-"])
def test_the_examples_print_what_readme_says(prefix: str, tmp_path: Path) -> None:
    if prefix:
        pytest.importorskip("transformers")
    strict = [] if prefix else ["-W", "error"]  # transformers warns of what it deprecates
    done = subprocess.run(
        [sys.executable, *strict, "-c", block(f"{prefix}example")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0 and (prefix or done.stderr == ""), done.stderr
    assert done.stdout == block(f"{prefix}output")


def test_tables_are_current() -> None:
    assert load_tables().updated(README) == README, "run: python docs/tables.py"


@pytest.mark.distributed
def test_the_context_parallel_example_runs_as_readme_says(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("cp-example"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "example.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Two processes write to one pipe, word by word where they do not buffer.
    assert sorted(re.findall(r"sharded = whole:|True|False", done.stdout)) == [
        *["True"] * 2,
        *["sharded = whole:"] * 2,
    ]
    assert "torchrun --nproc-per-node 2 example.py" in README


@pytest.mark.parametrize("target", ["demo", "talk", "test", "test-full", "check", "bench", "docs"])
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 3
    for link in links:
        assert (ROOT / link).exists(), link


def test_ci_runs_what_contributing_asks_for() -> None:
    assert "make test" in README
    assert "make check" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["make check", "exec make test"]


LAYERS: dict[str, SequenceMixerConfig] = {
    "Attention": AttentionConfig(
        n_heads=4, n_kv_heads=2, rope=RoPEConfig(), qk_norm=LayerNormConfig()
    ),
    "NormalizedAttention": AttentionConfig(name="normalized", n_heads=4, rope=RoPEConfig()),
    "FusedAttention": AttentionConfig(name="fused", n_heads=4, rope=RoPEConfig(name="fused")),
    "GatedDeltaNet": GatedDeltaNetConfig(n_heads=2, head_dim=16),
}
TOKENS, WIDTH = 48, 64
# That it works in half precision; how well, against the reference, the layers' own tests say.
HALF = 0.1


def build(name: str, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    config = LAYERS[name].replace(dtype=dtype)
    layer = config.build(WIDTH, layer_idx=0, n_layers=1, init_device=device)
    if device == "meta":
        layer = layer.to_empty(device="cpu")
    layer.init_weights(
        init_method=InitMethod.normal, d_model=WIDTH, block_idx=0, num_blocks=1, std=0.1,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return layer


def outcome(layer: Callable[..., Any], owner: nn.Module) -> list[Tensor]:
    """Output and gradients for two packed documents, of the input and of all parameters."""
    dtype = owner.w_out.weight.dtype  # type: ignore[union-attr]
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    x.requires_grad_()
    ends = torch.tensor([0, 17, TOKENS], dtype=torch.int32)
    out = layer(x, cu_doc_lens=ends, max_doc_len=31)
    return [out, *torch.autograd.grad(out.float().square().mean(), [x, *owner.parameters()])]


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        scale = b.double().norm().clamp(min=1e-12)
        assert (a.double() - b.double()).norm() / scale <= tolerance


@pytest.mark.parametrize("name", LAYERS)
def test_what_readme_claims_of_each_layer(name: str) -> None:
    claim = (
        "`torch.compile(fullgraph=True)`, autocast, activation checkpointing, meta-device builds "
        "and bf16, fp16, fp32 and true float64 all work."
    )
    assert claim in " ".join(README.split()) and f"`{name}`" in README
    layer = build(name)
    assert type(layer).__name__ == name
    eager = outcome(layer, layer)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(outcome(compiled, layer), eager, 1e-5)

    def checkpointed(x: Tensor, **keywords: Any) -> Any:
        return checkpoint(layer, x, use_reentrant=False, **keywords)

    close(outcome(checkpointed, layer), eager, 0)
    close(outcome(built := build(name, "meta"), built), eager, 0)

    with torch.autocast("cpu", torch.bfloat16):
        mixed = outcome(layer, layer)
    assert mixed[0].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in mixed[1:])
    close(mixed, eager, HALF)

    exact = build(name, dtype="float64")
    exact.load_state_dict(layer.state_dict())
    truth = outcome(exact, exact)
    assert truth[0].dtype == torch.float64
    close(eager, truth, 1e-5)
    assert (eager[0].double() - truth[0]).norm() > 0  # float64 is not float32 in disguise
    for dtype in ("bfloat16", "float16"):
        low = build(name, dtype=dtype)
        low.load_state_dict(layer.state_dict())
        half = outcome(low, low)
        assert str(half[0].dtype) == f"torch.{dtype}"
        close(half, eager, HALF)


def test_resume_goes_on_with_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's own lines, on a smaller model: interrupted and whole."""
    from olmo_core.cli.main import app
    from olmo_core.train.trainer import Trainer

    lines = re.findall(r"^olmo-core ((?:train|generate) .+?)(?:  +#.*)?$", README, re.MULTILINE)
    start, resume, talk = (shlex.split(line) for line in lines if "tiny-window" in line)
    assert resume == [*start, "--resume"]
    small = [
        "model.d_model=16", "model.blocks.0.sequence_mixer.n_heads=2", "data.sequence_length=32",
        "data.max_doc_len=null", "eval_batches=1", "steps=6", "device=cpu", "--sample=0",
    ]  # fmt: skip
    curves = []
    for stop in (None, 3):
        folder = tmp_path / str(stop)
        (folder / "my_texts").mkdir(parents=True)
        (folder / "my_texts" / "one.txt").write_text("Mice and cats. " * 60)
        monkeypatch.chdir(folder)
        take = Trainer._train_step

        def step(trainer: Trainer, stop: int | None = stop, take: Any = take) -> Any:
            if trainer.step + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_train_step", step)
            done = CliRunner().invoke(app, [*start, *small])
        assert done.exit_code == (0 if stop is None else 128 + signal.SIGTERM), done.output
        if stop is not None:
            done = CliRunner().invoke(app, [*resume, *small])
            assert done.exit_code == 0, done.output
        rows = (folder / "runs" / "tiny-window" / "metrics.jsonl").read_text().splitlines()
        curves.append([{**json.loads(row), "seconds": 0} for row in rows])
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == [1, 2, 3, 4, 5, 6]
    done = CliRunner().invoke(app, [*talk, "-n", "5"])
    assert done.exit_code == 0 and done.stdout.startswith("ROMEO:")


def test_every_option_that_readme_names_exists() -> None:
    from olmo_core.cli.main import app

    for line in re.findall(r"^olmo-core (.+?)(?:  +#.*)?$", README, re.MULTILINE):
        command, *words = line.split()
        done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        for option in (word for word in words if word.startswith("--")):
            assert option in done.output, f"olmo-core {command} has no {option}"
