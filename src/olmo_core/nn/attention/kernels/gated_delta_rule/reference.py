"""
The gated delta rule as its recurrence, one token at a time: slow, obvious, differentiable twice.

Gated Delta Networks, https://arxiv.org/abs/2412.06464, equation 10, with the decay applied before
the error is taken. Shapes as in ``chunks``, whose code this checks and does not use.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_doc_lens: Tensor | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    The oracle for :func:`.op.gated_delta_rule`: the same arguments, the same result.

    For every token, with S the (K, V) state of a value head, 0 at a document's start::

        S = exp(g) * S
        S = S + outer(k, beta * (v - k @ S))
        o = scale * q @ S
    """
    batch, tokens, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    if cu_doc_lens is not None and batch > 1:
        flat = (x.reshape(1, batch * tokens, *x.shape[2:]) for x in (q, k, v, g, beta))
        out, state = gated_delta_rule_reference(
            *flat,
            scale=scale,
            initial_state=initial_state,
            cu_doc_lens=cu_doc_lens,
            normalize_qk=normalize_qk,
        )
        return out.view(v.shape), state

    dtype = torch.promote_types(q.dtype, torch.float32)
    qf, kf = (_expand(x.to(dtype), value_heads // key_heads, normalize_qk) for x in (q, k))
    vf, decay, bf = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    scale = key_dim**-0.5 if scale is None else scale

    starts = set() if cu_doc_lens is None else set(cu_doc_lens[1:-1].tolist())
    if initial_state is None:
        state = qf.new_zeros(batch, value_heads, key_dim, value_dim)
    else:
        state = initial_state.to(dtype)
    outs = []
    for t in range(tokens):
        state = torch.zeros_like(state) if t in starts else state * decay[:, t, :, None, None]
        error = vf[:, t] - torch.einsum("bhk,bhkv->bhv", kf[:, t], state)
        write = bf[:, t].unsqueeze(-1) * error
        state = state + kf[:, t].unsqueeze(-1) * write.unsqueeze(-2)
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", qf[:, t], state))
    return torch.stack(outs, 1).to(v.dtype), state


def _expand(x: Tensor, group: int, normalize: bool) -> Tensor:
    """x (B, T, H, K) normalised if asked, each head repeated for its G value heads."""
    if normalize:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(group, dim=2)
