"""Whether FlashQLA can run on this machine, found out without importing it."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch


def machine_refusal(device: torch.device) -> str | None:
    """Why FlashQLA doesn't run on a device, or None if it may.

    It supports newer GPUs than Hopper too, on which nobody measured it here.
    """
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if (reason := _package_refusal(tuple(map(os.environ.get, _SEARCHED)))) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability != (9, 0):
        major, minor = capability
        return f"it is used on compute capability 9.0, and {device} has {major}.{minor}"
    return None


_SEARCHED = ("CUDA_HOME", "CUDA_PATH", "PATH")
"""The variables by which nvcc is found: who sets one afterwards gets another answer."""


@cache
def _package_refusal(searched: tuple[str | None, ...]) -> str | None:
    if find_spec("flash_qla") is None or find_spec("tilelang") is None:
        return 'it is not installed: pip install "olmo-attention[flash-qla]"'
    if (reason := _clash()) is not None:
        return reason
    if not _has_nvcc():
        return "it compiles with nvcc, and there is none: set CUDA_HOME to a CUDA toolkit"
    return None


def _clash() -> str | None:
    """Imported with another apache-tvm-ffi than it was built for, TileLang may end the process."""
    try:
        needs = metadata.requires("tilelang") or []
        version = metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError as e:
        return f"it needs {e.name or 'a package'}, which is not installed"
    spec = next((need for need in needs if need.startswith("apache-tvm-ffi")), "")
    bound = re.search(r"<\s*([\d.]+)", spec)
    if bound is None or _release(version) < _release(bound[1]):
        return None
    return (
        f"its TileLang needs apache-tvm-ffi older than {bound[1]}, and {version} is here, as "
        "flash-attn 4 wants it: give each of the two an environment of its own"
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _has_nvcc() -> bool:
    """Where TileLang looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if shutil.which("nvcc") or Path(home, "bin", "nvcc").is_file():
        return True
    try:
        return bool(metadata.version("nvidia-cuda-nvcc"))
    except metadata.PackageNotFoundError:
        return False
