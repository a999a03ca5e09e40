"""Which kernel serves a call, and why: decided when the first call of its kind comes, as a value.

Device and dtype are not known when a layer is built (meta builds, ``.to(...)``, autocast), so a
choice in ``__init__`` would be wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.capabilities import (
    CAPABILITIES,
    Environment,
    Request,
    refusals,
)
from olmo_core.nn.attention.kernels.softmax import Feature
from olmo_core.nn.attention.kernels.softmax.reference import dense_attention
from olmo_core.nn.attention.segments import Segments
from olmo_core.nn.functional import largest_row_error
from olmo_core.utils import compile_time_constant

_TOKENS, _WINDOW = 40, 7
_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_PROBED = frozenset({Feature.window, Feature.documents, Feature.deterministic})
"""The features that a probe tries, besides forward and backward."""


@dataclass(frozen=True)
class Choice:
    """A backend for a request, and how it came about."""

    name: str
    reason: str
    refused: Mapping[str, list[str]]
    """Why not, for each backend that can't serve the request here."""
    lasting: bool = True
    """Whether the same request will be answered so again."""


def choose(env: Environment, request: Request, device: torch.device | None = None) -> Choice:
    """The fastest backend that can serve a request on a machine.

    :param device: Also run a tiny problem through the backend there first, and pass over one that
        fails.
    """
    refused = {n: r for n, c in CAPABILITIES.items() if (r := refusals(c, env, request))}
    case = "full"
    for feature, name in ((Feature.documents, "documents"), (Feature.window, "window")):
        case = name if feature in request.features else case
    place, times = _times(env, case)
    lasting = True
    # On another GPU than the measured one, torch's time says least: there it is another kernel's.
    elsewhere = env.compute_capability not in (None, place)
    for name in sorted(times, key=lambda n: (elsewhere and n == "torch", times[n])):
        if name in refused:
            continue
        if device is not None and name != "torch":
            failure, remembered = probe(
                name, device, request.dtype, request.head_dim, request.features
            )
            lasting = lasting and remembered
            if failure:
                refused[name] = [failure]
                continue
        where = place if isinstance(place, str) else "{}.{}".format(*place)
        why = f"{case}, {times[name]} ms on {where}"
        return Choice(name, f"fastest of those that can ({why})", refused, lasting)
    return Choice("torch", f"the only backend that can on {env.device}", refused, lasting)


def _times(env: Environment, case: str) -> tuple[tuple[int, int] | str, dict[str, float]]:
    """A place, and the backends' times there: of this device, or of the GPU most like it."""
    places: set[tuple[int, int] | str] = {p for c in CAPABILITIES.values() for p in c.measured}
    here: tuple[int, int] | str = env.device
    if env.device == "cuda" and env.compute_capability is not None:
        major, minor = env.compute_capability
        gpus = [p for p in places if not isinstance(p, str)]
        here = min(gpus, key=lambda p: math.hypot(p[0] - major, (p[1] - minor) / 10))
    times = {n: c.measured[here][case] for n, c in CAPABILITIES.items() if here in c.measured}
    return here, times


@compile_time_constant
def kernel_for(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: tuple[str, ...],
    fallback: bool,
) -> str:
    """The kernel of a call. A constant to the compiler: its arguments are.

    :param backend: The backend's name, or None to choose one.
    :param device: Of the tensors. Two GPUs of one machine may differ.
    :param fallback: Take torch, with a warning, where the machine has no GPU.
    :raises RuntimeError: With every reason, if the backend can't serve the call.
    """
    key = (backend, device, dtype, head_dim, features, fallback)
    name = _CHOSEN.get(key)
    if name is None:
        name, lasting = _choose_kernel(*key)
        if lasting:
            _CHOSEN[key] = name
    return name


_CHOSEN: dict[tuple[object, ...], str] = {}
"""What a machine's devices and packages have led to: neither changes in a process."""


def _choose_kernel(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: tuple[str, ...],
    fallback: bool,
) -> tuple[str, bool]:
    env = Environment.detect(device)
    request = Request(dtype, head_dim, frozenset(map(Feature, features)))
    if backend is None:
        choice = choose(env, request, device)
        if reasons := choice.refused.get(choice.name):
            raise RuntimeError(refusal(choice.name, reasons))
        return choice.name, choice.lasting
    reasons = refusals(CAPABILITIES[backend], env, request)
    needs_gpu = CAPABILITIES[backend].compute_capability is not None
    if reasons and fallback and needs_gpu and env.compute_capability is None:
        warnings.warn(
            f"The backend {backend} {reasons[0]}. Falling back to the torch backend.",
            UserWarning,
            stacklevel=2,
        )
        return "torch", True
    if reasons:
        raise RuntimeError(refusal(backend, reasons))
    return backend, True


def refusal(backend: str, reasons: list[str]) -> str:
    """A refusal as one message with every reason and the next step."""
    lines = "".join(f"\n  - {reason}" for reason in reasons)
    advice = "" if backend == "torch" else " Use backend='torch', or None to choose automatically."
    return f"The attention backend '{backend}' can't do this:{lines}\n{advice.strip()}".rstrip()


_PROBES: dict[tuple[object, ...], str | None] = {}


def probe(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: Iterable[Feature] = (),
) -> tuple[str | None, bool]:
    """Why a kernel does not work on a device, or None if it does; and whether that is remembered.

    Never raises. What failed for want of memory may work later.
    """
    asked = frozenset(features)
    key = (kernel, device, dtype, head_dim, asked & _PROBED)
    if key not in _PROBES:
        try:
            error = _measure(kernel, device, dtype, head_dim, asked)
        except torch.OutOfMemoryError:
            return "its probe found no memory", False
        except Exception as e:  # whatever a library does wrong is the answer
            lines = str(e).strip().splitlines() or [""]
            _PROBES[key] = f"its probe failed: {type(e).__name__}: {lines[0][:200]}"
        else:
            right = error <= _BOUNDS[dtype]
            wrong = f"its probe is off by {error:.1e}, more than {_BOUNDS[dtype]:.0e}"
            _PROBES[key] = None if right else wrong
    return _PROBES[key], True


def _measure(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: frozenset[Feature],
) -> float:
    """The largest error of a row of a small problem's output and gradients."""
    window = _WINDOW if Feature.window in features else -1
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, _TOKENS, h, head_dim) for h in (2, 1, 1, 2)]
    q, k, v, dout = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes
    )
    if Feature.documents in features:
        cu = torch.tensor([0, 1, 14, _TOKENS, _TOKENS], dtype=torch.int32, device=device)
        segments = Segments.documents(cu, _TOKENS, window=window)
    else:
        segments = Segments.dense(_TOKENS, _TOKENS, window=window)
    scale = head_dim**-0.5
    with (
        torch.enable_grad(),
        torch.inference_mode(False),
        torch.autocast(q.device.type, enabled=False),
    ):
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = attend(q, k, v, segments, scale=scale, kernel=kernel)
        got = (out, *torch.autograd.grad(out, (q, k, v), dout))
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
        mask = segments.materialize(_TOKENS, _TOKENS).to(device)
        exact, _ = dense_attention(q, k, v, mask, scale)
        want = (exact, *torch.autograd.grad(exact, (q, k, v), dout.double()))
    return largest_row_error(got, want)
