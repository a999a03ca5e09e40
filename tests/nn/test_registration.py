"""Ops run on the device of their tensors, whichever is current."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olmo_core.nn.registration import on_its_device


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_another_device_becomes_current(
    monkeypatch: pytest.MonkeyPatch, index: int, entered: list[int]
) -> None:
    seen: list[int] = []
    inside: list[bool] = []

    @contextmanager
    def device(where: Any) -> Any:
        seen.append(where.index)
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    x: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index))
    run = on_its_device(lambda x, y: (y, bool(inside)))
    assert run(x, 3) == (3, bool(entered))
    assert seen == entered and not inside


def test_a_cpu_asks_no_gpu() -> None:
    assert on_its_device(lambda x: x + 1)(torch.zeros(1)) == 1
