"""The command: it fits 100 columns, and ends well unless torch fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from olmo_core.cli.main import app
from olmo_core.nn.attention.kernels.softmax import get_kernel, register_kernel


@cache
def doctor(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", "--device", "cpu", *args])


def test_it_fits_and_names_everything() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 100 for line in result.output.splitlines())
    for word in (
        "torch",
        "flash_2",
        "flash_3",
        "flash_4",
        "te",
        "✓",
        "fla",
        "matplotlib",
        "window",
    ):
        assert word in result.output


def test_json_is_nothing_but_json() -> None:
    result = doctor("--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["machine"]["torch"] == torch.__version__
    assert {"machine", "backends", "extras", "choices"} == set(report)
    ticks = {name: tick["status"] for name, tick in report["backends"][0]["features"].items()}
    assert ticks["window"] == "yes" and ticks["ring_cp"] == "yes"


class Broken:
    """No kernel at all."""

    name = "torch"

    def __getattr__(self, name: str) -> Any:
        raise ImportError("cannot open shared object file")


@pytest.fixture
def broken_torch() -> Iterator[None]:
    good = get_kernel("torch")
    register_kernel(Broken())  # type: ignore[arg-type]
    yield
    register_kernel(good)


@pytest.mark.usefixtures("broken_torch")
def test_torch_must_work() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "ImportError: cannot open shared object file" in result.output
    assert "pip install --force-reinstall torch" in result.output


def test_an_unknown_device_costs_one_message() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "warp"])
    assert result.exit_code == 2
    assert "device 'warp' can't be used here" in result.output and "cpu" in result.output
    assert len(result.output.splitlines()) <= 3
