"""How much memory a device has, so that what can't fit is refused before it is tried."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["expect_room", "memory_of", "ran_out_of_memory"]

# Where Linux says what a container may use (cgroups version 2 and 1).
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device) -> int | None:
    """The bytes that this process may have on ``device`` at most; ``None`` where unknown.

    For the CPU this is the least of the machine's memory and what its container and ``ulimit -v``
    leave.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(_host_limits(), default=None) if device.type == "cpu" else None


def expect_room(what: str, n_bytes: int, device: torch.device) -> None:
    """Refuse what needs more memory than there is at all.

    :param what: the subject of the message, in the plural: "--tokens 8 and --batch 9".
    :param n_bytes: a lower bound of what is needed.
    :raises OLMoConfigurationError: if ``device`` is known to have less.
    """
    there = memory_of(device)
    if there is not None and n_bytes > there:
        raise OLMoConfigurationError(
            f"{what} need at least {_gib(n_bytes)} of memory, and {device} has {_gib(there)}: "
            "choose smaller sizes"
        )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says so, in Python's way or one of torch's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text
        or "not enough memory" in text
        or "out of memory" in text
        or "Storage size calculation overflowed" in text
        or "numel: integer multiplication overflow" in text
    )


def _host_limits() -> Iterator[int]:
    with suppress(AttributeError, OSError, ValueError):  # Windows
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CGROUPS:
        with suppress(OSError, ValueError):  # absent, or "max"
            yield int(Path(path).read_text(encoding="ascii"))
    try:
        import resource
    except ImportError:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft


def _gib(n_bytes: int) -> str:
    gib = n_bytes / 2**30 if n_bytes < 2**1000 else float("inf")
    return f"{gib:.1f} GiB" if gib < 1e5 else f"{gib:.1e} GiB"
