"""Why Triton can't run here, in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olmo_core.nn.attention.kernels import triton_driver
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    triton_driver._try_driver.cache_clear()
    yield
    triton_driver._try_driver.cache_clear()


ON_CUDA: Any = SimpleNamespace(is_cuda=True)


def refusal_with(monkeypatch: pytest.MonkeyPatch, target: Any) -> str | None:
    """The refusal on a GPU where Triton's driver answers by ``target``."""
    active = SimpleNamespace(get_current_target=target)
    triton: Any = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(triton_driver, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_driver, "INTERPRETED", False)
    return triton_refusal(ON_CUDA)


def test_a_cpu_tensor_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_driver, "INTERPRETED", False)
    monkeypatch.setattr(triton_driver, "find_spec", lambda name: None)
    assert "not on cpu" in str(triton_refusal(torch.ones(1)))
    assert "pip install triton" in str(triton_refusal(ON_CUDA))


def test_a_working_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal_with(monkeypatch, lambda: "cuda") is None


def test_a_broken_driver_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no C compiler\nand more")

    reason = refusal_with(monkeypatch, broken)
    assert reason == "Triton finds no working driver: RuntimeError: no C compiler"


def test_the_interpreter_needs_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_driver, "INTERPRETED", True)
    monkeypatch.setattr(triton_driver, "find_spec", lambda name: object())
    assert triton_refusal(torch.ones(1)) is None
