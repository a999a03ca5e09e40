"""The machine in a few facts, and devices by name."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from olmo_core import __version__
from olmo_core.exceptions import OLMoConfigurationError

__all__ = [
    "Machine",
    "checked_backend",
    "checked_output",
    "describe",
    "probe_head_dim",
]


@dataclass(frozen=True)
class Machine:
    """What every report begins with."""

    olmo_core: str
    python: str
    torch: str
    platform: str
    device: str
    device_name: str
    compute_capability: str | None
    cuda: str | None
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        device = self.device
        if self.device_name != device:
            device = f"{self.device_name} ({device})"
        if self.compute_capability is not None:
            device += f", compute capability {self.compute_capability}, CUDA {self.cuda}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"olmo-core {self.olmo_core}, Python {self.python}, torch {self.torch}, "
            f"{self.platform}\n{device}, {threads}"
        )


def describe(device: torch.device) -> Machine:
    """This machine, as far as ``device`` is concerned."""
    name, capability = _processor(), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return Machine(
        __version__,
        platform.python_version(),
        torch.__version__,
        f"{platform.system()} {platform.machine()}",
        str(device),
        name if device.type in ("cpu", "cuda") else str(device),
        capability,
        torch.version.cuda,
        torch.get_num_threads(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def checked_backend(name: str) -> str:
    """:raises OLMoConfigurationError: If there is no backend called ``name``."""
    from olmo_core.nn.attention.capabilities import CAPABILITIES

    if name not in CAPABILITIES:
        raise OLMoConfigurationError(
            f"There is no attention backend {name!r}. Choose from {', '.join(CAPABILITIES)}."
        )
    return name


def checked_output(option: str, path: Path) -> Path:
    """A file that can be written at the end of a long run: it is tried, and left as it was.

    :raises OLMoConfigurationError: If it can't be made or written.
    """
    try:
        if path.is_dir():
            raise OLMoConfigurationError(f"{option} {path} is a folder; give the name of a file.")
        there = path.exists()
        with path.open("ab") as file:
            if not there:
                file.write(bytes(4096))
        if not there:
            path.unlink()
        elif path.is_file() and shutil.disk_usage(path).free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if not path.absolute().parent.is_dir():
            why = f"the folder {path.parent} does not exist"
        else:
            why = error.strerror or str(error)
        raise OLMoConfigurationError(f"{option} {path} can't be written: {why}.") from error
    return path


def probe_head_dim(device: torch.device) -> int:
    """The heads of small problems: what every GPU library has, and something small elsewhere."""
    return 64 if device.type == "cuda" else 16
