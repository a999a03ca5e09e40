"""Work on a device that nothing of the caller's reaches: probes, which may run inside any call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where Triton launches is the thread's current device, not a tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def apart(device: torch.device, work: Callable[[], R]) -> R:
    """What ``work`` returns or raises in a thread of its own with ``device`` current: no mode of
    the caller's is at work there, neither fake tensors nor autocast nor inference."""
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with on_device(device):
                results.append(work())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
