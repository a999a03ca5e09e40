"""The gated delta rule of a span of longer sequences, whose incoming state is not known at first.

It follows from the span's own map of the state, S' = M S + N, and those of other spans: a call
gives N and M to a function, and goes on with the state that this returns. Backward is alike, with
the gradients of the incoming and of the outgoing state. For the inside of ops: nothing is checked,
and what is returned has no gradient.

A form of the rule may have passes of its own for this, which share what both ends need. Without
them its forward and backward are called twice: values [v | 0] and the initial state [0 | I] give
[N | M] in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .chunks import RuleInputs
from .op import Form, form_of, saved_outputs
from .torch_forward import Saved


def span_forward(
    x: RuleInputs, incoming: Callable[[Tensor, Tensor], Tensor], last_start: int, *, save: bool
) -> tuple[Tensor, ...]:
    """:func:`.op.gated_delta_rule`, for what that has already checked.

    :param x: With the pieces of documents of the span as ``cu_doc_lens``; None for one, or one in
        each row.
    :param incoming: From N (B, HV, K, V) and M (B, HV, K, K) of the last document to the initial
        state of the first one (B, HV, K, V). M is 0 if there are several documents.
    :param last_start: The last document's first token.
    :returns: The output (B, T, HV, V), M, and what :func:`span_backward` takes.
    """
    form = form_of(x.q, x.v)
    run = form.span_forward or partial(_forward_twice, form)
    with torch.autocast(x.q.device.type, enabled=False):
        out, m, saved = run(x, incoming, last_start, save=save)
    return out, m, *saved_outputs(saved, m)


def span_backward(
    dout: Tensor,
    x: RuleInputs,
    saved: tuple[Tensor, ...],
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, g and beta after :func:`span_forward`.

    :param outgoing: From the initial state's gradient (B, HV, K, V), without what later spans give
        it, to that of the last document's final state (B, HV, K, V).
    :param first_stop: One past the first document's last token.
    """
    form = form_of(x.q, x.v)
    run = form.span_backward or partial(_backward_twice, form)
    with torch.autocast(x.q.device.type, enabled=False):
        return run(dout, x, Saved(*saved), outgoing, first_stop)


def _forward_twice(
    form: Form,
    x: RuleInputs,
    incoming: Callable[[Tensor, Tensor], Tensor],
    last_start: int,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    q, v = x.q, x.v
    state = (q.shape[0], v.shape[2], q.shape[3])
    if x.cu_doc_lens is None:
        initial = torch.eye(q.shape[3], v.shape[3] + q.shape[3], device=q.device).roll(
            v.shape[3], 1
        )
        wide = x._replace(v=torch.cat((v, v.new_zeros(*v.shape[:3], q.shape[3])), -1))
        both = form.forward(wide, initial.expand(*state, -1), save=False)[1]
        n, m = (y.contiguous() for y in both.split((v.shape[3], q.shape[3]), -1))
    else:
        ends = (y[:, last_start:] for y in x.tensors)
        last = RuleInputs.of(ends, None, x.scale, x.normalize_qk)
        n = form.forward(last, None, save=False)[1]
        m = n.new_zeros(*state, q.shape[3])
    out, _, saved = form.forward(x, incoming(n, m), save=save)
    return out, m, saved


def _backward_twice(
    form: Form,
    dout: Tensor,
    x: RuleInputs,
    saved: Saved,
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
) -> tuple[Tensor, ...]:
    def backward(dfinal: Tensor | None) -> tuple[Tensor, ...]:
        return form.backward(dout, dfinal, x, saved)

    return backward(outgoing(backward(None)[-1]))[:5]
