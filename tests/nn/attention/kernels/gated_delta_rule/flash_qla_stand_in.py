"""A stand-in for FlashQLA that computes by definition and asserts what the library asserts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

LENGTHS: list[Tensor] = []
"""All lengths that it was given."""


class TwoOutputs(torch.autograd.Function):
    """One node for both outputs, as the library's: hooks of one see the other's gradient alone."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return out.clone(), states.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        assert all(x.stride() == torch.empty(x.shape).stride() for x in grads)
        return grads


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Any = None,
    initial_state: Any = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None, head_first: bool = False,
    state_v_first: bool = False, auto_cp: bool = True, enable_fwd_cp_cache: bool = True,
    cp_context: Any = None, force_intra_cp: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The signature and the assertions of flash_qla 0.1.3."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[3] == k.shape[3] == v.shape[3] == 128 and v.shape[2] % k.shape[2] == 0
    assert g.dtype == beta.dtype == torch.float32 and g.shape == beta.shape == v.shape[:3]
    given_ = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    assert all(x.stride() == torch.empty(x.shape).stride() for x in given_)
    assert output_final_state and not (auto_cp or head_first or state_v_first or force_intra_cp)
    assert isinstance(scale, float) and not torch.is_autocast_enabled("cpu")
    spans = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    if cu_seqlens is not None:
        assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64
        # What is derived from lengths is kept by the identity of a tensor.
        assert all(cu_seqlens is not known for known in LENGTHS)
        LENGTHS.append(cu_seqlens)
        ends = cu_seqlens.tolist()
        assert all(a < b for a, b in pairwise(ends)), "no empty documents"
        spans = [(0, a, b) for a, b in pairwise(ends)]
    if initial_state is not None:
        assert initial_state.dtype == torch.float32
        assert initial_state.shape == (len(spans), v.shape[2], 128, 128)
    outs, states = [], []
    for i, (row, start, stop) in enumerate(spans):
        parts = (x[row : row + 1, start:stop].double() for x in (q, k, v, g, beta))
        state = None if initial_state is None else initial_state[i : i + 1].double()
        out, state = gated_delta_rule_reference(
            *parts, scale=scale, initial_state=state, normalize_qk=use_qk_l2norm_in_kernel
        )
        outs.append(out)
        states.append(state)
    out = torch.cat(outs, 1).view(v.shape).to(q.dtype)
    answer: tuple[Tensor, Tensor] = TwoOutputs.apply(out, torch.cat(states).float())
    return answer
