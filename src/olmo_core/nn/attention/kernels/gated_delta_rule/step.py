"""One token of the gated delta rule, for decoding: the state is updated in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.table import Choice, Row, choose
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.dispatch import on_its_device, without_autocast

from .chunks import QK_NORM_EPS

MOST_ROWS = 65535  # programs along a grid's second dimension
MOST_KEYS = 512  # a state's rows that a program holds in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def gated_delta_rule_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`.op.gated_delta_rule`, for decoding: ``state`` is updated in place.

    Compiles, and replays in a CUDA graph. Not differentiable.

    :param q: (B, H, K).
    :param k: Like ``q``.
    :param v: (B, HV, V).
    :param g: (B, HV).
    :param beta: (B, HV).
    :param state: (B, HV, K, V), float32, or float64 for float64 inputs.
    :returns: The output (B, HV, V) in v's dtype, and what was written along k: (B, HV, V) in the
        state's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return choose_step(q, v, state).run(q, k, v, g, beta, state, scale, normalize_qk)


def normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum(x**2) + 1e-6) over the last dimension: what ``normalize_qk`` does."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + QK_NORM_EPS)


def _refusal(q: Tensor, v: Tensor, state: Tensor) -> str | None:
    """Why the Triton kernel can't serve these inputs, or None if it can."""
    if torch.compiler.is_compiling():
        return "a compiler traces and fuses the plain form"
    if (reason := triton_refusal(q)) is not None:
        return reason
    if state.dtype != torch.float32 or q.dtype not in DTYPES or v.dtype not in DTYPES:
        return f"the kernel computes in float32 and takes no {q.dtype} with {state.dtype}"
    if not state.is_contiguous() or not state.numel():
        return f"the kernel takes a contiguous state that is not empty, not {tuple(state.shape)}"
    if state.shape[2] > MOST_KEYS or state.shape[0] * state.shape[1] > MOST_ROWS:
        return (
            f"the kernel takes at most {MOST_KEYS} keys and {MOST_ROWS} rows x heads, not "
            f"{tuple(state.shape)}"
        )
    return None


@on_its_device
def _triton_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton_step import launch_step

    q, k, v = rows(q, k, v)
    out, update = launch_step(q, k, v, g, beta, state, scale, normalize_qk)
    assert update is not None
    return out, update


def _torch_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, key_heads, _ = q.shape
    value_heads = v.shape[1]
    dtype = state.dtype
    qk = torch.stack((q, k), -2).to(dtype)  # (B, H, 2, K)
    if normalize_qk:
        qk = normalize(qk)
    qk = qk.unsqueeze(2).expand(-1, -1, value_heads // key_heads, -1, -1).flatten(1, 2)
    decay = g.to(dtype).exp().view(batch, value_heads, 1, 1)
    with without_autocast(state):
        read = (qk @ state) * decay  # (B, HV, 2, V): both reads of the decayed state in one pass
    update = beta.to(dtype).unsqueeze(-1) * (v.to(dtype) - read[:, :, 1])
    # q reads the new state: the decayed one plus outer(k, update).
    query, key = qk.unbind(2)
    out = read[:, :, 0] + (query * key).sum(-1, keepdim=True) * update
    out = (out * scale).to(v.dtype)
    # Last, so that a step which runs out of memory leaves the state as it was.
    state.mul_(decay).addcmul_(key.unsqueeze(-1), update.unsqueeze(-2))
    return out, update


STEPS: tuple[Row[Callable[..., tuple[Tensor, Tensor]]], ...] = (
    Row("triton", _triton_step, "reads and writes the state once", _refusal),
    Row("torch", _torch_step, "runs anywhere"),
)


def choose_step(
    q: Tensor, v: Tensor, state: Tensor
) -> Choice[Callable[..., tuple[Tensor, Tensor]]]:
    """Which row serves a step, and why."""
    return choose(STEPS, q, v, state)
