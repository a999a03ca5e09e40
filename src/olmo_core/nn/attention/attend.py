"""``attend``: attention over a named kernel, as one differentiable dispatcher op.

An op carries its kernel by name and its lengths as tensors, so it is one node of a graph: it
compiles without breaks, selective checkpointing can name it, and its lengths are read on the host
only inside it. Dropout has an op of its own, tagged as seeded: recomputing it must draw again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.softmax import get_kernel
from olmo_core.nn.attention.segments import Segments
from olmo_core.nn.dispatch import (
    cast_for_autocast,
    draws_of_stream,
    refuse_second_derivative,
    register_differentiable,
    require_independent_draws,
)

__all__ = ["attend"]

_PROBLEM = (
    "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, bool causal, SymInt window, "
    "float scale, float dropout_p, str kernel"
)
_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    dropout_p: float = 0.0,
    kernel: str,
    stream: int = 0,
) -> Tensor:
    """Scaled dot-product attention, differentiable once.

    Under autocast the inputs are cast to its dtype, as in torch's own attention.

    :param q: ``(b, t_q, h, d)``. If ``segments`` has lengths, they are about the flattened batch.
    :param k: ``(b, t_k, g, d)``, where g divides h. With lengths, b may differ from q's.
    :param v: Like ``k``.
    :param scale: Factor of the scores.
    :param kernel: The name of a kernel, see :func:`get_kernel`.
    :param stream: Of dropout's draws: ranks with equal seeds and different streams draw different
        masks, and go on with equal seeds. 0 draws as torch does.
    :returns: Like ``q``, contiguous.
    :raises ValueError: If shapes, dtypes or devices do not fit together.
    """
    q, k, v = cast_for_autocast(q, k, v)
    s = segments
    _check(q, k, v, s)
    problem = (s.cu_q, s.cu_k, s.max_q, s.max_k, s.causal, s.window, scale, dropout_p, kernel)
    if dropout_p:
        require_independent_draws("Dropout of attention weights")
        out, _, _ = _CALL["attend_dropout"](q, k, v, *problem, stream)
    else:
        out, _, _ = _CALL["attend"](q, k, v, *problem)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "Expected q (batch, queries, heads, head_dim) and k, v (batch, keys, kv heads, "
            f"head_dim), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    same_batch = q.shape[0] == k.shape[0] or s.cu_q is not None
    if not same_batch or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q and k must agree in batch and head_dim, and the query heads must be a multiple of "
            f"the kv heads, got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must share a floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}. Cast "
            "them, or use torch.autocast."
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must share a device, got {q.device}, {k.device}, {v.device}.")


def _forward(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, scale, dropout_p, kernel = problem
    s = Segments(*lengths)
    q, k, v = rows(q, k, v)
    return get_kernel(kernel).forward(q, k, v, s, scale=scale, dropout_p=dropout_p)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, t, h, _ = q.shape
    if problem[0] is not None:
        b, t = 1, b * t
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rng = q.new_empty((2 if problem[-2] else 0,), dtype=torch.int64)
    return out, q.new_empty((b, h, t), dtype=lse_dtype), rng


def _forward_dropout(q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *problem, stream = inputs
    with draws_of_stream(q.device, stream) if stream else nullcontext():
        return _forward(q, k, v, *problem)


def _forward_dropout_fake(q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _forward_fake(q, k, v, *inputs[:-1])


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    *problem: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, scale, dropout_p, kernel = problem
    s = Segments(*lengths)
    q, k, v = rows(q, k, v)
    grads = get_kernel(kernel).backward(
        dout.contiguous(), q, k, v, out, lse, rng, s, scale=scale, dropout_p=dropout_p
    )
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (2 + len(ctx.rest))
    if dout is None:
        return None, None, None, *nothing
    q, k, v, out, lse, rng, cu_q, cu_k = ctx.saved_tensors
    grads = _CALL["attend_backward"](dout, q, k, v, out, lse, rng, cu_q, cu_k, *ctx.rest)
    return *grads, *nothing


def _save_dropout(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, inputs[:-1], output)


def _differentiate_dropout(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    return *_differentiate(ctx, *grads), None


def _register() -> None:
    inputs, outputs = "Tensor q, Tensor k, Tensor v", "(Tensor, Tensor, Tensor)"
    _LIB.define(f"attend({inputs}, {_PROBLEM}) -> {outputs}")
    _CALL["attend"] = register_differentiable(
        _LIB, "attend", _forward, _forward_fake, _differentiate, _save
    )
    _LIB.define(
        f"attend_dropout({inputs}, {_PROBLEM}, int stream) -> {outputs}",
        tags=(torch.Tag.nondeterministic_seeded,),
    )
    _CALL["attend_dropout"] = register_differentiable(
        _LIB, "attend_dropout", _forward_dropout, _forward_dropout_fake, _differentiate_dropout,
        _save_dropout,
    )  # fmt: skip
    _LIB.define(
        f"attend_backward(Tensor dout, {inputs}, Tensor out, Tensor lse, Tensor rng, {_PROBLEM}) "
        f"-> {outputs}"
    )
    refuse = refuse_second_derivative("attend", "torch's matmul and softmax")
    _CALL["attend_backward"] = register_differentiable(
        _LIB, "attend_backward", _backward, _backward_fake, refuse
    )


_register()
