"""A tiny attention problem through a kernel, forward and backward: what a tick is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from olmo_core.nn.attention.capabilities import Feature
from olmo_core.nn.attention.ops import attend
from olmo_core.nn.attention.segments import Segments

__all__ = ["probe", "relative_error", "sdpa_reference"]

_TOKENS, _WINDOW = 40, 7
_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def probe(
    kernel: str, device: str, dtype: torch.dtype, head_dim: int, features: Iterable[Feature] = ()
) -> str | None:
    """Why a kernel does not work here, or None if it does. Never raises; remembers the answer."""
    return _probe(kernel, device, dtype, head_dim, frozenset(features) & _TRIED)


_TRIED = frozenset({Feature.window, Feature.documents})


@cache
def _probe(
    kernel: str, device: str, dtype: torch.dtype, head_dim: int, features: frozenset[Feature]
) -> str | None:
    try:
        error = _measure(kernel, device, dtype, head_dim, features)
    except Exception as e:  # whatever a library does wrong is the answer
        lines = str(e).strip().splitlines() or [""]
        return f"its probe failed: {type(e).__name__}: {lines[0][:200]}"
    if not error <= _BOUNDS[dtype]:
        return f"its probe is off by {error:.1e}, more than {_BOUNDS[dtype]:.0e}"
    return None


def _measure(
    kernel: str, device: str, dtype: torch.dtype, head_dim: int, features: frozenset[Feature]
) -> float:
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
        exact = sdpa_reference(q, k, v, segments, scale)
        want = (exact, *torch.autograd.grad(exact, (q, k, v), dout.double()))
    return max(relative_error(a, b) for a, b in zip(got, want))


def sdpa_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention by its definition, with a dense mask: quadratic, and differentiable by autograd.

    Takes and gives what :func:`attend` does.
    """
    rep = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rep, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    hidden = ~segments.materialize(q.shape[1], k.shape[1]).to(q.device)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of ``want``; NaN if ``got`` has any."""
    want = want.detach().double()
    return ((got.detach().double() - want).norm() / want.norm().clamp_min(1e-300)).item()
