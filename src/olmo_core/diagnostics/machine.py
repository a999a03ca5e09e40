"""The machine in a few facts, and devices by name."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from olmo_core import __version__
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.utils import get_default_device

__all__ = [
    "Machine",
    "checked_backend",
    "checked_device",
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


def checked_device(name: str | None) -> torch.device:
    """The device called ``name``, or the default one.

    :raises OLMoConfigurationError: If there is no such device here.
    """
    if name is None:
        return get_default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1)
    except Exception as e:  # torch raises AssertionError, RuntimeError and its own classes
        found = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
        raise OLMoConfigurationError(
            f"--device {name} can't be used here ({why}). Choose one of: {found}."
        ) from e
    if device.type == "meta":
        raise OLMoConfigurationError("--device meta has no values to compute with.")
    return device


def checked_backend(name: str) -> str:
    """:raises OLMoConfigurationError: If there is no backend called ``name``."""
    from olmo_core.nn.attention.capabilities import CAPABILITIES

    if name not in CAPABILITIES:
        raise OLMoConfigurationError(
            f"There is no attention backend {name!r}. Choose from {', '.join(CAPABILITIES)}."
        )
    return name


def checked_output(option: str, path: Path) -> Path:
    """A file that can be written at the end of a long run.

    :raises OLMoConfigurationError: If its folder does not exist, or it is a folder itself.
    """
    if path.is_dir():
        raise OLMoConfigurationError(f"{option} {path} is a folder; give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise OLMoConfigurationError(f"{option} {path}: the folder {path.parent} does not exist.")
    return path


def probe_head_dim(device: torch.device) -> int:
    """The heads of small problems: what every GPU library has, and something small elsewhere."""
    return 64 if device.type == "cuda" else 16
