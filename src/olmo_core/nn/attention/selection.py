"""Which kernel serves a call, and why: decided at the first call of its kind, as a value.

Device and dtype are not known when a layer is built (meta builds, ``.to(...)``, autocast), so a
choice in ``__init__`` would be wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from olmo_core.nn.attention.capabilities import (
    CAPABILITIES,
    Environment,
    Feature,
    Request,
    refusals,
)
from olmo_core.utils import compile_time_constant

__all__ = ["MEASURED", "Choice", "choose", "kernel_for"]

MEASURED: Mapping[tuple[int, int], Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        (9, 0): {
            "full": {"flash_4": 3.37, "te": 3.67, "torch": 3.89, "flash_2": 6.19},
            "window": {"flash_4": 1.13, "te": 1.30, "flash_2": 1.97, "torch": 2.01},
            "documents": {"flash_4": 0.85, "flash_2": 1.24, "te": 1.25, "torch": 1.32},
        }
    }
)
"""Forward + backward in ms per compute capability, case and backend: batch 2, 8192 tokens, 16 query
heads and 4 kv heads of 128, bf16, an H100; window and documents of 1024. One run of
``benchmarks/kernels_gpu.py``, replayed as CUDA graphs: what the kernels take."""

_UNMEASURED = ("flash_4", "te", "flash_2", "torch")


@dataclass(frozen=True)
class Choice:
    """A backend for a request, and how it came about."""

    name: str
    reason: str
    refused: Mapping[str, list[str]]
    """Why not, for each backend that can't serve the request here."""


def choose(env: Environment, request: Request, probe: bool = False) -> Choice:
    """The fastest backend that can serve a request on a machine.

    :param probe: Also run a tiny problem through the backend first, and pass over one that fails.
    """
    refused = {n: r for n, c in CAPABILITIES.items() if (r := refusals(c, env, request))}
    if env.device != "cuda" or env.compute_capability is None:
        return Choice("torch", f"the only backend that runs on {env.device}", refused)
    case = "full"
    for feature, name in ((Feature.documents, "documents"), (Feature.window, "window")):
        case = name if feature in request.features else case
    times = MEASURED.get(env.compute_capability, {}).get(case, {})
    order = sorted(times, key=times.__getitem__) if times else list(_UNMEASURED)
    for name in order:
        if name in refused:
            continue
        if probe and name != "torch" and (failure := _probe(name, env, request)):
            refused[name] = [failure]
            continue
        why = f"{times[name]} ms" if times else "by rank, not measured"
        gpu = "{}.{}".format(*env.compute_capability)
        return Choice(name, f"fastest of those that can ({case}, {why} on {gpu})", refused)
    return Choice("torch", "the only backend that can", refused)


def _probe(name: str, env: Environment, request: Request) -> str | None:
    from olmo_core.nn.attention.probe import probe

    return probe(name, env.device, request.dtype, request.head_dim, request.features)


@compile_time_constant
def kernel_for(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    features: tuple[str, ...],
    fallback: bool,
) -> str:
    """The kernel of a call. A constant to the compiler: its arguments are.

    :param backend: The backend's name, or None to choose one.
    :param fallback: Take torch, with a warning, where the machine has no GPU.
    :raises RuntimeError: With every reason, if the backend can't serve the call.
    """
    return _kernel_for(backend, device, dtype, head_dim, features, fallback)


@cache
def _kernel_for(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    features: tuple[str, ...],
    fallback: bool,
) -> str:
    env = Environment.detect(device)
    request = Request(dtype, head_dim, frozenset(map(Feature, features)))
    if backend is None:
        return choose(env, request, probe=True).name
    reasons = refusals(CAPABILITIES[backend], env, request)
    if reasons and fallback and env.compute_capability is None:
        warnings.warn(
            f"The backend {backend} {reasons[0]}. Falling back to the torch backend.",
            UserWarning,
            stacklevel=2,
        )
        return "torch"
    if reasons:
        raise RuntimeError(refusal(backend, reasons))
    return backend


def refusal(backend: str, reasons: list[str]) -> str:
    """A refusal as one message with every reason and the next step."""
    lines = "".join(f"\n  - {reason}" for reason in reasons)
    advice = "" if backend == "torch" else " Use backend='torch', or None to choose automatically."
    return f"The attention backend '{backend}' can't do this:{lines}\n{advice.strip()}".rstrip()
