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

from .op import Form, form_of, saved_outputs
from .torch_forward import Saved


def span_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_doc_lens: Tensor | None,
    incoming: Callable[[Tensor, Tensor], Tensor],
    last_start: int,
    *,
    scale: float,
    normalize_qk: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """:func:`.op.gated_delta_rule`, for what that has already checked.

    :param cu_doc_lens: The pieces of documents of the span; None for one, or one in each row.
    :param incoming: From N (B, HV, K, V) and M (B, HV, K, K) of the last document to the initial
        state of the first one (B, HV, K, V). M is 0 if there are several documents.
    :param last_start: The last document's first token.
    :returns: The output (B, T, HV, V), M, and what :func:`span_backward` takes.
    """
    form = form_of(q, v)
    run = form.span_forward or partial(_forward_twice, form)
    with torch.autocast(q.device.type, enabled=False):
        out, m, saved = run(
            q,
            k,
            v,
            g,
            beta,
            cu_doc_lens,
            incoming,
            last_start,
            scale=scale,
            normalize_qk=normalize_qk,
            save=save,
        )
    return out, m, *saved_outputs(saved, m)


def span_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    saved: tuple[Tensor, ...],
    cu_doc_lens: Tensor | None,
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
    *,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, g and beta after :func:`span_forward`.

    :param outgoing: From the initial state's gradient (B, HV, K, V), without what later spans give
        it, to that of the last document's final state (B, HV, K, V).
    :param first_stop: One past the first document's last token.
    """
    form = form_of(q, v)
    run = form.span_backward or partial(_backward_twice, form)
    with torch.autocast(q.device.type, enabled=False):
        return run(
            dout,
            q,
            k,
            v,
            g,
            beta,
            Saved(*saved),
            cu_doc_lens,
            outgoing,
            first_stop,
            scale=scale,
            normalize_qk=normalize_qk,
        )


def _forward_twice(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_doc_lens: Tensor | None,
    incoming: Callable[[Tensor, Tensor], Tensor],
    last_start: int,
    *,
    scale: float,
    normalize_qk: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    inputs, options = (q, k, v, g, beta), {"scale": scale, "normalize_qk": normalize_qk}
    state = (q.shape[0], v.shape[2], q.shape[3])
    if cu_doc_lens is None:
        initial = torch.eye(q.shape[3], v.shape[3] + q.shape[3], device=q.device).roll(
            v.shape[3], 1
        )
        wide = torch.cat((v, v.new_zeros(*v.shape[:3], q.shape[3])), -1)
        both = form.forward(
            *(q, k, wide, g, beta), initial.expand(*state, -1), None, **options, save=False
        )[1]
        n, m = (x.contiguous() for x in both.split((v.shape[3], q.shape[3]), -1))
    else:
        last = [x[:, last_start:] for x in inputs]
        n = form.forward(*last, None, None, **options, save=False)[1]
        m = n.new_zeros(*state, q.shape[3])
    out, _, saved = form.forward(*inputs, incoming(n, m), cu_doc_lens, **options, save=save)
    return out, m, saved


def _backward_twice(
    form: Form,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    saved: Saved,
    cu_doc_lens: Tensor | None,
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
    *,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, ...]:
    def backward(dfinal: Tensor | None) -> tuple[Tensor, ...]:
        return form.backward(
            *(dout, dfinal, q, k, v, g, beta, saved, cu_doc_lens),
            scale=scale,
            normalize_qk=normalize_qk,
        )

    return backward(outgoing(backward(None)[-1]))[:5]
