"""Small helpers without a better home."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from olmo_core.exceptions import OLMoConfigurationError

__all__ = [
    "checked_device",
    "compile_time_constant",
    "get_default_device",
    "runs_eagerly",
    "seed_all",
]

F = TypeVar("F", bound=Callable[..., Any])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's (if it is loaded) and torch's generators on every device.

    Give every rank the same seed before ``init_weights``: sharded weights are drawn whole on each
    rank and then cut, so that they equal the weights of a single process.

    :param seed: From 0 to 2**32 - 1, the range that numpy accepts.
    :raises ValueError: For a seed outside that range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32 - 1], got {seed}")
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)


def compile_time_constant(function: F) -> F:
    """Let ``torch.compile`` call ``function`` while it compiles and keep what it returns.

    :func:`torch.compiler.assume_constant_result` without its import of the compiler, which takes a
    second. The arguments must be constants of the graph, and the result depend on them alone.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def runs_eagerly(device: torch.device) -> bool:
    """Whether code runs now, step by step: neither compiled nor captured into a CUDA graph.

    Only then may it read values on the host, count, or keep what it computes.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def get_default_device() -> torch.device:
    """The current CUDA device if there is one, otherwise the CPU.

    Apple's MPS is never chosen by itself, because it has no float64; name it to use it.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked_device(name: str | None) -> torch.device:
    """The device called ``name``, or the default one.

    :raises OLMoConfigurationError: If there is no such device here, or it holds no values.
    """
    if name is None:
        return get_default_device()
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it has no values to compute with")
        if device.type == "cpu" and device.index:
            raise RuntimeError("the CPU is one device: call it cpu")
        torch.zeros(1, device=device).add_(1)
    except Exception as error:  # torch raises AssertionError, RuntimeError and its own classes
        found = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise OLMoConfigurationError(
            f"device {name!r} can't be used here ({why}). Choose one of: {found}."
        ) from error
    return device
