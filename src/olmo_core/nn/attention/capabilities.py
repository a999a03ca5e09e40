"""What each backend can do, as data: read by ``assert_supports_*``, ``doctor``, skips and the docs.

Nothing here imports a backend's package or touches a device: the :class:`Environment` is a value,
so "an H100 without FlashAttention-3" is a test on a laptop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch

from olmo_core.config import StrEnum

__all__ = [
    "CAPABILITIES",
    "Capabilities",
    "Environment",
    "Feature",
    "Request",
    "feature_reasons",
    "installation_reasons",
    "refusals",
]


class Feature(StrEnum):
    """Something that can be asked of a backend."""

    window = "window"
    """Sliding window attention."""
    documents = "documents"
    """Intra-document masking of packed sequences."""
    packed_qkv = "packed_qkv"
    """Queries, keys and values as one tensor."""
    kv_cache = "kv_cache"
    """Prefill and decoding with a cache of keys and values."""
    left_padding = "left_padding"
    """Rows of different length, padded on the left."""
    dropout = "dropout"
    """Dropout of attention weights."""
    backward = "backward"
    """Gradients."""
    lse = "lse"
    """The log-sum-exp, and gradients from one that was merged over key blocks."""
    deterministic = "deterministic"
    """The same bits on each run, under ``torch.use_deterministic_algorithms``."""
    ring_cp = "ring_cp"
    """Ring context parallelism."""
    ulysses_cp = "ulysses_cp"
    """Ulysses context parallelism."""


_HALF = (torch.float16, torch.bfloat16)
_NO_CP = "context parallelism is not part of this version"
_NO_DROPOUT = "its kernels have no dropout"


@dataclass(frozen=True)
class Capabilities:
    """One backend's row of the table."""

    name: str
    title: str
    """The library's own name."""
    packages: tuple[str, ...] = ()
    """Modules, any one of which provides it; none if torch alone does."""
    install: str = ""
    """The command that installs it."""
    compute_capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    """The NVIDIA GPUs that run it, first and last included, or None for any device."""
    dtypes: tuple[torch.dtype, ...] = _HALF
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    missing: Mapping[Feature, str] = field(default_factory=dict)
    """Why, for each feature that it does not have."""


def _missing(**reasons: str) -> Mapping[Feature, str]:
    cp = {Feature.ring_cp: _NO_CP, Feature.ulysses_cp: _NO_CP}
    return MappingProxyType({**{Feature(k): v for k, v in reasons.items()}, **cp})


_NEWEST = (12, 9)

CAPABILITIES: Mapping[str, Capabilities] = MappingProxyType(
    {
        c.name: c
        for c in (
            Capabilities(
                name="torch",
                title="PyTorch's fused attention",
                dtypes=(*_HALF, torch.float32, torch.float64),
                missing=_missing(),
            ),
            Capabilities(
                name="flash_2",
                title="FlashAttention-2 (flash-attn, or torch's own copy)",
                install="pip install flash-attn --no-build-isolation",
                compute_capability=((8, 0), _NEWEST),
                max_head_dim=256,
                missing=_missing(),
            ),
            Capabilities(
                name="flash_3",
                title="FlashAttention-3",
                packages=("flash_attn_3", "flash_attn_interface"),
                install="build hopper/ of flash-attention, or pip install tokenspeed-fa3",
                compute_capability=((9, 0), (9, 0)),
                max_head_dim=256,
                head_dim_multiple=8,
                missing=_missing(dropout=_NO_DROPOUT),
            ),
            Capabilities(
                name="flash_4",
                title="FlashAttention-4 (CuTe)",
                packages=("flash_attn.cute",),
                install="pip install --pre flash-attn-4",
                compute_capability=((9, 0), _NEWEST),
                max_head_dim=128,
                head_dim_multiple=8,
                missing=_missing(dropout=_NO_DROPOUT),
            ),
            Capabilities(
                name="te",
                title="Transformer Engine",
                packages=("transformer_engine",),
                install='pip install --no-build-isolation "transformer_engine[pytorch]"',
                compute_capability=((9, 0), _NEWEST),
                max_head_dim=128,
                head_dim_multiple=8,
                missing=_missing(
                    dropout="its dropout draws from a state that can't be replayed block by block"
                ),
            ),
        )
    }
)


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
        capability = (
            torch.cuda.get_device_capability(device if device.type == "cuda" else None)
            if has_cuda
            else None
        )
        return cls(device.type, capability, _found_packages())


@lru_cache(maxsize=1)
def _found_packages() -> frozenset[str]:
    return frozenset(p for c in CAPABILITIES.values() for p in c.packages if _can_be_found(p))


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
