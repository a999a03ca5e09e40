"""What each backend can do, as data: read by ``assert_supports_*``, ``doctor``, skips and the docs.

Nothing here imports a backend's package or touches a device: the :class:`Environment` is a value,
so "an H100 without FlashAttention-3" is a test on a laptop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from olmo_core.nn.attention.kernels.softmax import (
    Capabilities,
    Feature,
    capabilities_of,
    kernel_names,
)


class Table(Mapping[str, Capabilities]):
    """The rows of all declared kernels, by name. A row is read from its kernel's file when it is
    first asked for, so that importing a layer loads none."""

    def __getitem__(self, name: str) -> Capabilities:
        if name not in kernel_names():
            raise KeyError(name)
        return capabilities_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(kernel_names())

    def __len__(self) -> int:
        return len(list(kernel_names()))


CAPABILITIES: Mapping[str, Capabilities] = Table()


@dataclass(frozen=True)
class Environment:
    """What a machine has, as far as backends are concerned."""

    device: str = "cpu"
    """The type of the device that attention runs on."""
    compute_capability: tuple[int, int] | None = None
    """Of the NVIDIA GPU, or None without one."""
    packages: frozenset[str] = frozenset()
    """Which of the table's modules can be found."""

    @classmethod
    def detect(cls, device: torch.device | str | None = None) -> Environment:
        """This machine; for ``device``, or for its GPU if it has one."""
        has_cuda = torch.cuda.is_available()
        device = torch.device(device or ("cuda" if has_cuda else "cpu"))
        gpu = device if device.type == "cuda" else None
        capability = torch.cuda.get_device_capability(gpu) if has_cuda else None
        packages = {p for c in CAPABILITIES.values() for p in c.packages}
        return cls(device.type, capability, frozenset(filter(_can_be_found, packages)))


@cache
def _can_be_found(module: str) -> bool:
    """Whether a module exists, without importing the package that it is in."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not rest:
        return spec is not None
    folders = spec.submodule_search_locations or ()
    return any(Path(folder, *rest).is_dir() for folder in folders)


@dataclass(frozen=True)
class Request:
    """What is asked of a backend: the features, and of which tensors."""

    dtype: torch.dtype
    head_dim: int
    features: frozenset[Feature] = frozenset()


def feature_reasons(c: Capabilities, features: Iterable[Feature]) -> list[str]:
    """Why ``c`` can't do some of ``features`` on any machine; empty if it can."""
    return [f"no {f}: {c.missing[f]}" for f in features if f in c.missing]


def installation_reasons(c: Capabilities, env: Environment) -> list[str]:
    """Why ``c`` can't run on a machine; empty if it can."""
    reasons = []
    if c.compute_capability is not None:
        first, last = c.compute_capability
        needs = f"needs an NVIDIA GPU of compute capability {_dotted(first)}"
        needs += "" if first == last else " or newer"
        if env.compute_capability is None:
            reasons.append(f"{needs}; this machine has none")
        elif not first <= env.compute_capability <= last:
            reasons.append(f"{needs}; this one has {_dotted(env.compute_capability)}")
        elif env.device != "cuda":
            reasons.append(f"runs on CUDA tensors only; these are on {env.device}")
    if c.packages and not env.packages & set(c.packages):
        reasons.append(f"{' or '.join(c.packages)} is not installed: {c.install}")
    return reasons


def refusals(c: Capabilities, env: Environment, request: Request) -> list[str]:
    """Every reason why ``c`` can't serve a request on a machine; empty if it can."""
    reasons = installation_reasons(c, env) + feature_reasons(c, sorted(request.features))
    if request.dtype not in c.dtypes:
        names = ", ".join(_short(d) for d in c.dtypes)
        reasons.append(f"takes {names}, not {_short(request.dtype)}: cast, or use torch.autocast")
    if c.max_head_dim is not None and request.head_dim > c.max_head_dim:
        reasons.append(f"head_dim is at most {c.max_head_dim}, not {request.head_dim}")
    if request.head_dim % c.head_dim_multiple:
        reasons.append(f"head_dim is a multiple of {c.head_dim_multiple}, not {request.head_dim}")
    return reasons


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
