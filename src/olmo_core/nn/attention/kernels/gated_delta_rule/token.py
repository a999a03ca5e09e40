"""One token of a gated delta net between its projections and its norm: two launches, in place.

Legend of shapes: as in ``chunks``; k is the convolutions' kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.dispatch import on_its_device

from .step import DTYPES, MOST_KEYS, MOST_ROWS

_LONGEST = 8  # kernel size, as that of the convolution's other kernels


@dataclass(frozen=True)
class TokenWeights:
    """What a token meets on its way."""

    convolutions: Sequence[Tensor]
    """Of q, k and v: each (C, 1, k)."""
    biases: Sequence[Tensor | None]
    """(C,) each, or None for all."""
    A_log: Tensor
    """(HV,), and ``dt_bias`` likewise."""
    dt_bias: Tensor
    silu: bool = True
    double: bool = True
    """Whether beta is multiplied by 2."""


def token_refusal(
    projected: Sequence[Tensor], weights: TokenWeights, history: Tensor, state: Tensor
) -> str | None:
    """Why :func:`advance_token_` can't serve these inputs, or None if it can."""
    x = projected[0]
    if torch.compiler.is_compiling():
        return "a compiler traces and fuses the plain form"
    if (reason := triton_refusal(x)) is not None:
        return reason
    parameters = (*weights.convolutions, *weights.biases, weights.A_log, weights.dt_bias)
    if any(p is not None and type(p) not in (Tensor, nn.Parameter) for p in parameters):
        return "parameters are no plain tensors"
    tensors = [y for y in (*projected, *parameters, history) if y is not None]
    if state.dtype != torch.float32 or any(y.dtype not in DTYPES for y in tensors):
        return f"the kernels compute in float32 and take no {x.dtype} with {state.dtype}"
    if any(y.dtype != x.dtype for y in projected):
        return "projections have several dtypes"
    size = weights.convolutions[0].shape[2]
    channels = sum(y.shape[2] for y in projected)
    if history.shape != (x.shape[0], size - 1, channels) or state.shape[0] != x.shape[0]:
        return f"the history {tuple(history.shape)} is not that of one token's convolutions"
    if x.shape[1] != 1 or size > _LONGEST or not x.numel():
        return f"they take one token and a kernel_size up to {_LONGEST}"
    if not (state.is_contiguous() and history.is_contiguous()):
        return "the kernels take contiguous states"
    if state.shape[2] > MOST_KEYS or state.shape[0] * state.shape[1] > MOST_ROWS:
        return f"at most {MOST_KEYS} keys and {MOST_ROWS} rows x heads, not {tuple(state.shape)}"
    return None


@torch.no_grad()
@on_its_device
def advance_token_(
    a: Tensor,
    b: Tensor,
    projected: Sequence[Tensor],
    weights: TokenWeights,
    history: Tensor,
    state: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Convolutions, gates and state update of one token. ``history`` and ``state`` move on.

    :param a: (B, 1, HV), and ``b`` likewise.
    :param projected: What the convolutions of q, k and v read: (B, 1, H K) twice, (B, 1, HV V).
    :param history: (B, k - 1, channels of all): the convolutions' last inputs.
    :param state: (B, HV, K, V), float32.
    :param padding: (B, 1) bool, or None: where beta is 0.
    :returns: The rule's output (B, 1, HV, V), in v's dtype.
    """
    from .triton_step import launch_step
    from .triton_token import launch_convolution

    q, k, v = launch_convolution(
        [x[:, 0] for x in rows(*projected)],
        [w.contiguous() for w in weights.convolutions],
        weights.biases,
        history,
        weights.silu,
    )
    key_dim, value_dim = state.shape[2:]
    q, k = (x.unflatten(1, (-1, key_dim)) for x in (q, k))
    gates = weights.A_log, weights.dt_bias, padding, weights.double
    out, _ = launch_step(
        q, k, v.unflatten(1, (-1, value_dim)), a[:, 0], b[:, 0], state, key_dim**-0.5, True, gates
    )
    return out.unsqueeze(1)
