"""The gated delta rule on any device, in linear time and memory both ways.

By the first row of ``FORMS`` that can serve: Triton kernels, or plain torch.

``gated_delta_rule`` is a dispatcher op, so it is one node of a compiled graph and selective
checkpointing can name it (``torch.ops.olmo_core.gated_delta_rule``). The recurrence that it
computes stands in ``reference``, with the same signature; the legend of the shapes
in ``chunks``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.table import Row, choose
from olmo_core.nn.dispatch import (
    cast_for_autocast,
    refuse_second_derivative,
    register_differentiable,
)
from olmo_core.nn.lengths import check_cu_doc_lens

from .chunks import ChunkGrid, RuleInputs, accumulation_dtype
from .torch_backward import chunked_backward
from .torch_forward import Saved, chunked_forward
from .torch_span import chunked_span_backward, chunked_span_forward
from .triton_rule import (
    saved_like,
    triton_backward,
    triton_forward,
    triton_span_backward,
    triton_span_forward,
    unsupported,
)

_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}
SAVED = len(fields_of(Saved))
"""How many tensors forward keeps for backward."""


def gated_delta_rule(
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
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mix each value head's tokens through a (K, V) state that decays and corrects itself.

    For every token, with S starting at 0 or ``initial_state``::

        S = exp(g) * S
        S = S + outer(k, beta * (v - k @ S))
        o = scale * q @ S

    Gated Delta Networks, https://arxiv.org/abs/2412.06464. Sums are float32, or float64 for float64
    inputs. Differentiable once. Under autocast q, k and v are cast to its dtype; g and beta never
    are: their rounding would be raised to the power of the sequence length.

    The Triton kernels multiply in q's dtype. Where all keys are alike and beta is near 2, they are
    ten times as far from float64 as the torch form. They are tested on Hopper; on other GPUs of
    compute capability 8.0 and up the first call of a shape tries them, forward and backward,
    against the torch form.

    Documents are kept apart by zeros in products, and 0 * NaN is NaN: a NaN or an infinity in one
    document reaches everything from its chunk's first token on (chunks have 64 tokens, on a CPU 32,
    and end with the sequence), other documents too; in backward, everything before its chunk's end.

    :param q: (B, T, H, K), floating point; strides are free.
    :param k: Like ``q``.
    :param v: (B, T, HV, V) of q's dtype; HV is a multiple of H, and value head h reads key head
        ``h // (HV / H)``. Nothing is repeated in memory for that.
    :param g: (B, T, HV), the logarithm of the decay: finite and at most 0. Best in float32.
    :param beta: (B, T, HV), the step size, between 0 and 2. Best in float32.
    :param scale: Factor of the queries, ``K ** -0.5`` by default.
    :param initial_state: (B, HV, K, V). With ``cu_doc_lens`` (1, HV, K, V), the first document's,
        even if that is empty.
    :param cu_doc_lens: (documents + 1,), int32: cumulative document lengths over the flattened
        B * T tokens. The state is 0 at each document's start.
    :param normalize_qk: Divide q and k by ``sqrt(sum(x**2) + 1e-6)`` first.
    :param checked: ``cu_doc_lens`` is known to describe the tokens.
    :returns: The output (B, T, HV, V) in v's dtype, and the final state (B, HV, K, V), or with
        ``cu_doc_lens`` the last document's (1, HV, K, V), float32 or float64.
    :raises ValueError: If shapes, dtypes, devices or lengths do not fit together.
    :raises TypeError: If ``cu_doc_lens`` is not int32.
    """
    check_inputs(q, k, v, g, beta, initial_state, cu_doc_lens, scale)
    q, k, v = cast_for_autocast(q, k, v)
    inputs = (q, k, v, g, beta, initial_state)
    batch, tokens = q.shape[:2]
    if cu_doc_lens is not None:
        if not checked:
            check_cu_doc_lens(cu_doc_lens, batch * tokens, None)
        q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state, *_ = _CALL["gated_delta_rule"](
        q, k, v, g, beta, initial_state, cu_doc_lens, scale, normalize_qk, save
    )
    return (out if cu_doc_lens is None else out.view(batch, tokens, *out.shape[2:])), state


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_doc_lens: Tensor | None,
    scale: float | None,
) -> None:
    """Refuse what :func:`gated_delta_rule` can't compute.

    :raises ValueError: With what was expected and what came.
    """
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            "Expected q and k (batch, tokens, key heads, key_dim) and v (batch, tokens, value "
            f"heads, value_dim), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if min(*q.shape[2:], *v.shape[2:]) < 1 or v.shape[2] % q.shape[2]:
        raise ValueError(
            "The value heads must be a multiple of the key heads and no dimension empty, got q "
            f"{tuple(q.shape)} and v {tuple(v.shape)}."
        )
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != v.shape[:3]:
            raise ValueError(
                f"{name} must be (batch, tokens, value heads), {tuple(v.shape[:3])} here, got "
                f"{tuple(gate.shape)}."
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}. Cast them."
        )
    if not all(x.is_floating_point() for x in (q, g, beta)):
        raise ValueError(
            f"All inputs must be floating point, got q, k and v of {q.dtype}, g of {g.dtype} and "
            f"beta of {beta.dtype}."
        )
    optional = [x for x in (initial_state, cu_doc_lens) if isinstance(x, Tensor)]
    devices = {str(x.device) for x in (q, k, v, g, beta, *optional)}
    if len(devices) > 1:
        raise ValueError(f"All tensors must share a device, got {', '.join(sorted(devices))}.")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    if initial_state is not None:
        rows = q.shape[0] if cu_doc_lens is None else 1
        expected = (rows, v.shape[2], q.shape[3], v.shape[3])
        if initial_state.shape != expected or not initial_state.is_floating_point():
            raise ValueError(
                "initial_state must be floating point of shape (batch, or 1 with cu_doc_lens; "
                f"value heads, key_dim, value_dim), {expected} here, got "
                f"{tuple(initial_state.shape)} of {initial_state.dtype}."
            )


@dataclass(frozen=True)
class Form:
    """One implementation: forward, backward, and room for what goes from one to the other."""

    forward: Callable[..., tuple[Tensor, Tensor, Saved | None]]
    backward: Callable[..., tuple[Tensor, ...]]
    saved: Callable[[Tensor, Tensor], Saved]
    span_forward: Callable[..., tuple[Tensor, Tensor, Saved | None]] | None = None
    """As :func:`.torch_span.chunked_span_forward`; without it, :mod:`.span` calls the two above."""
    span_backward: Callable[..., tuple[Tensor, ...]] | None = None
    """Likewise."""


def _torch_saved(q: Tensor, v: Tensor) -> Saved:
    dtype = accumulation_dtype(q.dtype)
    shapes = Saved.shapes(ChunkGrid.of(q, v))
    return Saved(*(q.new_empty(shape, dtype=dtype) for shape in shapes))


FORMS: tuple[Row[Form], ...] = (
    Row(
        "triton",
        Form(
            triton_forward, triton_backward, saved_like, triton_span_forward, triton_span_backward
        ),
        "its kernels serve these inputs here",
        unsupported,
    ),
    Row(
        "torch",
        Form(
            chunked_forward,
            chunked_backward,
            _torch_saved,
            chunked_span_forward,
            chunked_span_backward,
        ),
        "runs anywhere, in any dtype",
    ),
)


def form_of(q: Tensor, v: Tensor) -> Form:
    """A function of what forward, backward and fake tensors know alike."""
    return choose(FORMS, q, v).run


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, initial_state, cu_doc_lens, scale, normalize_qk, save = args
    x = RuleInputs.of(tensors, cu_doc_lens, scale, normalize_qk)
    with torch.autocast(x.q.device.type, enabled=False):
        out, state, saved = form_of(x.q, x.v).forward(x, initial_state, save=save)
    return out, state, *saved_outputs(saved, state)


def saved_outputs(saved: Saved | None, like: Tensor) -> list[Tensor]:
    """What is saved, with empty tensors for what is not."""
    fields = [None] * SAVED if saved is None else [getattr(saved, f.name) for f in fields_of(Saved)]
    return [like.new_empty(0) if x is None else x for x in fields]


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grid, save = ChunkGrid.of(q, v), args[-1]
    dtype = accumulation_dtype(q.dtype)
    state = q.new_empty((grid.batch, grid.value_heads, grid.key_dim, grid.value_dim), dtype=dtype)
    saved = form_of(q, v).saved(q, v) if save else None
    return v.new_empty(v.shape), state, *saved_outputs(saved, state)


def _backward(dout: Tensor, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    x, saved = RuleInputs.of(args[:5], *args[5 + SAVED :]), Saved(*args[5 : 5 + SAVED])
    with torch.autocast(x.q.device.type, enabled=False):
        return form_of(x.q, x.v).backward(dout, dfinal, x, saved)


def _backward_fake(dout: Tensor, dfinal: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    q, _, v, _, _, states = inputs[:6]
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    state = states.new_empty(shape, dtype=accumulation_dtype(q.dtype))
    return (*(x.new_empty(x.shape) for x in inputs[:5]), state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, initial_state, cu_doc_lens, ctx.scale, ctx.normalize_qk, _ = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, g, beta, *output[2:], cu_doc_lens)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dfinal: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(v)
    *grads, dinitial = _CALL["gated_delta_rule_backward"](
        dout, dfinal, q, k, v, *rest, ctx.scale, ctx.normalize_qk
    )
    dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return *grads, dinitial, None, None, None, None


def _register() -> None:
    inputs = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"
    options = "float scale, bool normalize_qk"
    saved = "Tensor states, Tensor updates, Tensor inverses, Tensor scores, Tensor erasers"
    _LIB.define(
        f"gated_delta_rule({inputs}, Tensor? initial_state, Tensor? cu_doc_lens, {options}, "
        f"bool save) -> ({', '.join(['Tensor'] * (2 + SAVED))})"
    )
    _LIB.define(
        f"gated_delta_rule_backward(Tensor dout, Tensor? dfinal, {inputs}, {saved}, "
        f"Tensor? cu_doc_lens, {options}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    refuse = refuse_second_derivative(
        "gated_delta_rule", "gated_delta_rule_reference, which autograd differentiates"
    )
    for name, run, fake, differentiate, save in (
        ("gated_delta_rule", _forward, _forward_fake, _differentiate, _save),
        ("gated_delta_rule_backward", _backward, _backward_fake, refuse, None),
    ):
        _CALL[name] = register_differentiable(_LIB, name, run, fake, differentiate, save)


_register()
