"""The gated delta rule over a cache: any number of tokens that continue the stored ones.

Shapes as in ``kernels.gated_delta_rule.chunks``; M is the cache's ``max_rollback``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.gated_delta_net.cache import RecurrentCache, replay
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule_step_, normalize


@torch.no_grad()
def advance(
    cache: RecurrentCache,
    conv_inputs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    choose_rule: Callable[[Tensor, Tensor], Any],
    leftpad: Tensor | None = None,
) -> Tensor:
    """The rule's output (B, T, HV, V) for T tokens that continue the cache's.

    A prompt goes through a chunked rule; a single token, and the last M ones, whose updates are
    kept, step by step. The cache changes last: what fails before leaves it as it was.

    :param conv_inputs: (B, T, channels), what the convolutions saw.
    :param q: And ``k``, ``v``, ``g``, ``beta``: as for :func:`.gated_delta_rule`, which
        normalises q and k.
    :param choose_rule: From q and v to a choice whose ``run`` is like
        :func:`.gated_delta_rule`.
    :param leftpad: The left padding that comes with first tokens, (B,) int32.
    """
    cache.check_fits(k, v)
    tokens, most = q.shape[1], cache.max_rollback
    stepped = 1 if tokens == 1 else min(tokens, most)
    head = tokens - stepped
    new = {"conv_inputs": _shifted(cache.conv_inputs, conv_inputs)}
    state = cache.state
    recent = cache.recent if most else ()
    outs: list[Tensor] = []
    if head:
        rule = choose_rule(q, v).run
        prompt = (x[:, :head] for x in (q, k, v, g, beta))
        out, state = rule(*prompt, initial_state=state, normalize_qk=True)
        outs.append(out)
        recent = tuple(torch.zeros_like(x) for x in recent)
    if most:
        base = state if head else cache.base_state
        state = state.clone()
    updates: list[Tensor] = []
    for t in range(head, tokens):
        q_, k_, v_, g_, beta_ = (x[:, t] for x in (q, k, v, g, beta))
        out, update = gated_delta_rule_step_(q_, k_, v_, g_, beta_, state, normalize_qk=True)
        outs.append(out.unsqueeze(1))
        updates.append(update)
    if most:
        wrote = (normalize(k[:, head:].to(state.dtype)), torch.stack(updates, 1), g[:, head:])
        joined = [torch.cat(pair, 1) for pair in zip(recent, wrote, strict=True)]
        # What falls out of the last M goes to the base state.
        new["base_state"] = replay(base, *(x[:, :-most] for x in joined))
        new |= {n: x[:, -most:] for n, x in zip(cache.recent_names, joined, strict=True)}
    if head or most:
        new["state"] = state
    out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    cache.replace(new)
    cache.update_seqlen(tokens, leftpad)
    return out


def _shifted(history: Tensor, new: Tensor) -> Tensor:
    """``new`` behind ``history`` along dim 1, without as many of the oldest."""
    joined = torch.cat((history, new.to(history.dtype)), 1)
    return joined[:, joined.shape[1] - history.shape[1] :]
