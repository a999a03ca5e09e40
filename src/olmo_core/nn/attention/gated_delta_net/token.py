"""A gated delta net's decoding step by kernels that go from the projections to the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_core.nn.attention.gated_delta_net.cache import RecurrentCache
from olmo_core.nn.attention.kernels.gated_delta_rule.token import (
    TokenWeights,
    advance_token_,
    token_refusal,
)
from olmo_core.nn.convolution import CausalConv1d
from olmo_core.nn.dispatch import is_heard
from olmo_core.nn.sharded import local


def advance_token(
    cache: RecurrentCache,
    projected: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    convolutions: Sequence[CausalConv1d],
    head_dims: tuple[int, int],
    double: bool,
    padding: Tensor | None,
    leftpad: Tensor | None,
) -> Tensor | None:
    """:func:`.step.advance` for a single token, from the projections, in two launches; None where
    those kernels can't serve: what is wrong with a call, the longer way says.

    :param projected: The inputs of the convolutions of q, k and v, (B, 1, channels).
    :param a: And ``b``, ``A_log``, ``dt_bias``, ``double``: as for :func:`.decay_gates`.
    :param head_dims: K and V.
    :param padding: (B, 1) bool, or None: which rows' token is padding.
    """
    if torch.compiler.is_compiling() or projected[0].shape[1] != 1 or cache.max_rollback:
        return None
    if any(is_heard(conv) for conv in convolutions):
        return None
    if cache.state.shape[1:] != (a.shape[2], *head_dims):
        return None
    weights = TokenWeights(
        [local(conv.weight) for conv in convolutions],
        [local(conv.bias) for conv in convolutions],
        A_log,
        dt_bias,
        silu=convolutions[0].activation == "silu",
        double=double,
    )
    if token_refusal(projected, weights, cache.conv_inputs, cache.state) is not None:
        return None
    out: Tensor = advance_token_(a, b, projected, weights, cache.conv_inputs, cache.state, padding)
    cache.update_seqlen(1, leftpad)
    return out
