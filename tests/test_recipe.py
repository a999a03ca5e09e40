"""CONTRIBUTING's recipe for a backend, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import olmo_core

PACKAGE = Path(olmo_core.__file__).parent
RECIPE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    text = RECIPE.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    return dedent(text).strip().removeprefix("```python\n").removesuffix("```")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the recipe's two blocks in it."""
    root = tmp_path_factory.mktemp("recipe")
    shutil.copytree(PACKAGE, root / "olmo_core", ignore=shutil.ignore_patterns("__pycache__"))
    attention = root / "olmo_core/nn/attention"
    (attention / "kernels/softmax/mine.py").write_text(block("kernel"), encoding="utf-8")
    member, cls = block("backend").split("\n\n", 1)
    source = (attention / "backend.py").read_text(encoding="utf-8")
    last = '    te = "te"\n'
    assert source.count(last) == 1
    source = source.replace(last, f"{member}\n{last}") + f"\n\n{cls}"
    (attention / "backend.py").write_text(source, encoding="utf-8")
    return root


def run(copy: Path, *args: str, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy)},
        cwd=copy,
        timeout=300,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def test_doctor_shows_it(copy: Path) -> None:
    rows = json.loads(run(copy, "-m", "olmo_core", "doctor", "--json"))
    row = {row["name"]: row for row in rows["backends"]}["mine"]
    assert row["works"] and row["title"] == "Dense products"
    assert row["features"]["documents"]["status"] == "yes"
    assert row["features"]["dropout"] == {"status": "no", "why": "it has none"}


def test_it_is_chosen_where_its_row_says_so_and_refused_with_its_reason(copy: Path) -> None:
    script = """
import torch
from olmo_core.nn.attention import Attention
from olmo_core.nn.attention.capabilities import Environment, Request
from olmo_core.nn.attention.kernels.softmax import Feature, get_kernel
from olmo_core.nn.attention.selection import choose

cpu = Environment()
print(choose(cpu, Request(torch.float32, 8), torch.device("cpu")).name)
print(choose(cpu, Request(torch.bfloat16, 8)).name)
print(choose(cpu, Request(torch.float32, 8, frozenset({Feature.dropout}))).name)
layer = Attention(d_model=16, n_heads=2, backend="mine", dropout=0.5)
x = torch.randn(1, 5, 16)
try:
    layer(x)
except RuntimeError as e:
    print(e)
called = []
kernel = get_kernel("mine")
forward = type(kernel).forward
type(kernel).forward = lambda *a, **k: called.append(1) or forward(*a, **k)
Attention(d_model=16, n_heads=2)(x)
print(len(called))
"""
    lines = run(copy, "-c", script).splitlines()
    assert lines[:3] == ["mine", "torch", "torch"]
    assert any("no dropout: it has none" in line for line in lines)
    assert int(lines[-1]) >= 1


def test_verify_passes_it(copy: Path) -> None:
    found = copy / "found.json"
    args = ["verify", "--backend", "mine", "--quick", "--mixer", "kernel", "--mixer", "fused"]
    run(copy, "-m", "olmo_core", *args, "--json", str(found))
    cells = json.loads(found.read_text(encoding="utf-8"))
    text = json.dumps(cells)
    assert "mine" in text and "kernel" in text
