"""README.md: its example prints what it says, its tables follow the code, its links exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def test_the_example_prints_what_readme_says() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("example")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout == block("output")


def test_tables_are_current() -> None:
    assert load_tables().updated(README) == README, "run: python docs/tables.py"


@pytest.mark.parametrize("target", ["demo", "test", "test-full", "check", "bench", "docs"])
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


def test_ci_runs_the_readme_test_command() -> None:
    assert "make test" in README
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


def test_every_option_that_readme_names_exists() -> None:
    from typer.testing import CliRunner

    from olmo_core.cli.main import app

    for line in re.findall(r"^olmo-core (.+?)(?:  +#.*)?$", README, re.MULTILINE):
        command, *words = line.split()
        done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        for option in (word for word in words if word.startswith("--")):
            assert option in done.output, f"olmo-core {command} has no {option}"
