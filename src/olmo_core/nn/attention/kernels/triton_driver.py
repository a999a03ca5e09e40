"""Whether Triton's kernels run here: asked before each launch, so the answer is kept."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from olmo_core.utils import compile_time_constant

_INTERPRETER_KIB = 227  # as the largest GPU

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on any device. Read once, as Triton reads it."""


def triton_refusal(x: Tensor) -> str | None:
    """Why Triton can't run a kernel on ``x``, or None if it can."""
    if not (x.is_cuda or INTERPRETED):
        return f"Triton's kernels run on CUDA tensors, not on {x.device.type}"
    return _failure()


@compile_time_constant
def _failure() -> str | None:
    return _try_driver()


@cache
def _try_driver() -> str | None:
    """Triton needs the driver's library and a C compiler, and says so when it first launches."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if INTERPRETED:
        return None
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as e:  # whatever is missing, the torch form does not need it
        lines = str(e).strip().splitlines() or [""]
        return f"Triton finds no working driver: {type(e).__name__}: {lines[0][:200]}"
    return None


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: what grids are cut for. 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory_kib(device: torch.device) -> int:
    """How much a program may have on a GPU; for a meta tensor's device, on the current one."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _shared_memory_kib(device)


@cache
def _shared_memory_kib(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_KIB
    properties = torch.cuda.get_device_properties(device)
    # torch's HIP builds do not name it: 48 KiB are what every GPU has.
    return int(getattr(properties, "shared_memory_per_block_optin", 48 << 10)) >> 10
