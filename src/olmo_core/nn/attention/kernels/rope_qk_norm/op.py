"""qk-norm and RoPE as one op: RMS statistic, weight and rotation in a single pass over q and k.

Around eager attention these element-wise steps cost more than the attention: each reads and writes
all of q and k. Here forward reads and writes them once, and backward reads two tensors and writes
one. The op has two phases. The *statistic*, a sum of squares, is taken inside the kernel, or passed
in by whoever shares the width of a norm with other ranks (:func:`row_stat`, then a differentiable
all-reduce). The rest is *apply*.

**Rounding.** All arithmetic is float32 and the result is rounded once, at the end. A norm module
followed by a RoPE module rounds to the inputs' dtype twice, so in half precision the two differ by
about one unit in the last place, this op being the closer to float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.rope_qk_norm.reference import (
    check_arguments,
    norm_widths,
    table_width,
)
from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_ROW = 32768  # elements of one token's heads that a program can hold in registers
_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}


def unsupported(q: Tensor, k: Tensor, *, rotary_dim: int | None = None) -> str | None:
    """Why the kernels can't serve these tensors, or None if they can.

    :param q: ``(B, T, H, D)``.
    :param k: ``(B, T, Hkv, D)``.
    :param rotary_dim: Width of the RoPE table, if there is one.
    """
    if (reason := triton_refusal(q)) is not None:
        return reason
    if q.dtype not in _DTYPES or k.dtype not in _DTYPES:
        return f"the kernels compute in float32 and take no {q.dtype}"
    if q.shape[3] % 2 or (rotary_dim is not None and rotary_dim % 2):
        return f"head_dim and rotary_dim must be even, got {q.shape[3]} and {rotary_dim}"
    if max(q.shape[2], k.shape[2]) * q.shape[3] > _MAX_ROW:
        return f"a token's heads must fit in {_MAX_ROW} elements, got {q.shape[2]} x {q.shape[3]}"
    return None


def row_stat(q: Tensor, k: Tensor) -> Tensor:
    """The first phase: sums of squares over each token's heads, ``(B, T, 2)`` float32, for q and k.

    Differentiable. Where heads are sharded, sum it over the ranks (differentiably) and pass it to
    :func:`qk_norm_rope` with the global widths.

    :param q: ``(B, T, H, D)``.
    :param k: ``(B, T, Hkv, D)``.
    """
    # vector_norm reduces half-precision inputs in float32 without a float32 copy of them.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(x, dim=(-2, -1), dtype=dtype) for x in (q, k)]
    return torch.stack(norms, dim=-1).square()


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None,
    per_head: bool,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
    positions: Tensor | None = None,
    rotary_dim: int | None = None,
    stats: Tensor | None = None,
    widths: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise q and k, multiply by the weights, rotate by position; each step is optional.

    ``y = x * rsqrt(mean(x^2) + eps) * weight``, then for the first ``R`` columns of each head
    ``y * cos + rotate_half(y) * sin``, where ``rotate_half([a, b]) = [-b, a]`` (Su et al.,
    RoFormer, 2021, in the layout of GPT-NeoX). The last dimension of q and k must be contiguous;
    other strides are free, so q and k may be slices of one projection. Differentiable once with
    respect to q, k, the weights and ``stats``.

    :param q: ``(B, T, H, D)``, bfloat16, float16 or float32.
    :param k: ``(B, T, Hkv, D)``.
    :param q_weight: ``(H * D,)``, or ``(D,)`` where ``per_head``; any float dtype.
    :param k_weight: ``(Hkv * D,)`` or ``(D,)``.
    :param eps: Added to the mean square; None to leave out the norm.
    :param per_head: Normalise each head by itself; otherwise all heads of a token together.
    :param sin: ``(L, R)`` or ``(L, R / 2)`` table. Only the first half of a row is read, since the
        second repeats it.
    :param cos: Likewise.
    :param positions: ``(T,)`` or ``(B, T)`` integers: the table's row for each token, below L (not
        checked). None takes row t for token t, which is also how tables that are already sharded by
        token are passed.
    :param rotary_dim: R, by default the table's width.
    :param stats: ``(B, T, 2)`` float32 sums of squares to use instead of the inputs' own.
    :param widths: How many elements ``stats`` sums over, for q and k.
    :returns: q and k, contiguous, each in its dtype.
    :raises ValueError: If shapes do not fit together.
    """
    rotary_dim = table_width(q, sin, rotary_dim)
    check_arguments(
        q, k, q_weight, k_weight, eps, per_head, sin, cos, positions, rotary_dim, stats, widths
    )
    width_q, width_k = norm_widths(q, k, per_head, widths)
    q_out, k_out, _ = _CALL["qk_norm_rope"](
        q, k, q_weight, k_weight, sin, cos, positions, stats, rotary_dim, width_q, width_k, eps,
        per_head,
    )  # fmt: skip
    return q_out, k_out


def rope_only(
    q: Tensor,
    k: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """RoPE alone, see :func:`qk_norm_rope`. Saves no activations: backward rotates the other way.

    :raises ValueError: If shapes do not fit together.
    """
    rotary_dim = table_width(q, sin, rotary_dim)
    check_arguments(q, k, None, None, None, False, sin, cos, positions, rotary_dim, None, None)
    return _CALL["rope"](q, k, sin, cos, positions, rotary_dim, False)


def _tables(sin: Tensor | None, cos: Tensor | None) -> tuple[Any, Any]:
    sin, cos = rows(sin, cos)
    if sin is not None and sin.stride() != cos.stride():
        sin, cos = sin.contiguous(), cos.contiguous()
    return sin, cos


def _statistics(q: Tensor, k: Tensor, eps: float | None, per_head: bool) -> Tensor:
    """Room for 1 / rms of each norm: ``(B, T, 2)``, ``(B, T, H + Hkv)`` per head, or nothing."""
    if eps is None:
        return q.new_empty((0,), dtype=torch.float32)
    count = q.shape[2] + k.shape[2] if per_head else 2
    return q.new_empty((*q.shape[:2], count), dtype=torch.float32)


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, sin: Tensor | None,
    cos: Tensor | None, positions: Tensor | None, stats: Tensor | None, rotary_dim: int,
    width_q: int, width_k: int, eps: float | None, per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from olmo_core.nn.attention.kernels.rope_qk_norm.triton_kernels import launch_forward

    rstd = _statistics(q, k, eps, per_head)
    squares = None if stats is None else stats.contiguous()
    args = [*rows(q, k, q_weight, k_weight), *_tables(sin, cos), *rows(positions), squares]
    args.append(None if eps is None else rstd)
    q_out, k_out = launch_forward(
        args, rotary_dim=rotary_dim, width_q=width_q, width_k=width_k, eps=eps or 0.0,
        per_head=per_head,
    )  # fmt: skip
    return q_out, k_out, rstd


def _forward_fake(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, sin: Tensor | None,
    cos: Tensor | None, positions: Tensor | None, stats: Tensor | None, rotary_dim: int,
    width_q: int, width_k: int, eps: float | None, per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), _statistics(q, k, eps, per_head)


def _backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, sin: Tensor | None, cos: Tensor | None, positions: Tensor | None,
    rstd: Tensor, given: bool, rotary_dim: int, width_q: int, width_k: int, per_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from olmo_core.nn.attention.kernels.rope_qk_norm.triton_kernels import launch_backward

    args = [*rows(dq_out, dk_out, q, k, q_weight, k_weight), *_tables(sin, cos)]
    args += [*rows(positions), rstd if rstd.dim() > 1 else None]
    grads = launch_backward(
        args, given=given, rotary_dim=rotary_dim, width_q=width_q, width_k=width_k,
        per_head=per_head,
    )  # fmt: skip
    dq, dk, *rest = grads
    dq_weight, dk_weight, dstats = (q.new_empty((0,)) if x is None else x for x in rest)
    return dq, dk, dq_weight, dk_weight, dstats


def _backward_fake(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, sin: Tensor | None, cos: Tensor | None, positions: Tensor | None,
    rstd: Tensor, given: bool, rotary_dim: int, width_q: int, width_k: int, per_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = [
        q.new_empty((0,)) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight)
    ]
    dstats = rstd.new_empty(rstd.shape) if given else q.new_empty((0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), weights[0], weights[1], dstats


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, stats, rotary_dim, width_q, width_k, _, per_head = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.rest = (stats is not None, rotary_dim, width_q, width_k, per_head)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # or the statistic is given a gradient of zeros


def _differentiate(
    ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, sin, cos, positions, rstd = ctx.saved_tensors
    if dq_out is None and dk_out is None:
        return (None,) * 13
    dq_out = torch.zeros_like(q) if dq_out is None else dq_out
    dk_out = torch.zeros_like(k) if dk_out is None else dk_out
    dq, dk, dq_weight, dk_weight, dstats = _CALL["qk_norm_rope_backward"](
        dq_out, dk_out, q, k, q_weight, k_weight, sin, cos, positions, rstd, *ctx.rest
    )
    return (
        dq,
        dk,
        None if q_weight is None else dq_weight,
        None if k_weight is None else dk_weight,
        *(None, None, None),
        dstats if ctx.rest[0] else None,
        *(None,) * 5,
    )


def _rope(
    q: Tensor, k: Tensor, sin: Tensor, cos: Tensor, positions: Tensor | None, rotary_dim: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from olmo_core.nn.attention.kernels.rope_qk_norm.triton_kernels import launch_forward

    args = [*rows(q, k), None, None, *_tables(sin, cos), *rows(positions), None, None]
    return launch_forward(args, rotary_dim=rotary_dim, inverse=inverse)


def _rope_fake(
    q: Tensor, k: Tensor, sin: Tensor, cos: Tensor, positions: Tensor | None, rotary_dim: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rope_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, sin, cos, positions, ctx.rotary_dim, ctx.inverse = inputs
    ctx.save_for_backward(sin, cos, positions)


def _rope_differentiate(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = _CALL["rope"](dq_out, dk_out, *ctx.saved_tensors, ctx.rotary_dim, not ctx.inverse)
    return dq, dk, *(None,) * 5


def _register() -> None:
    refuse = refuse_second_derivative("qk_norm_rope", "qk_norm_rope_reference")
    inputs = "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? sin, Tensor? cos"
    both = ("CPU", "CUDA")  # on the CPU only under Triton's interpreter: see `unsupported`
    _LIB.define(
        f"qk_norm_rope({inputs}, Tensor? positions, Tensor? stats, SymInt rotary_dim, "
        "SymInt width_q, SymInt width_k, float? eps, bool per_head) -> (Tensor, Tensor, Tensor)"
    )
    _LIB.define(
        f"qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, {inputs}, Tensor? positions, "
        "Tensor rstd, bool given, SymInt rotary_dim, SymInt width_q, SymInt width_k, "
        "bool per_head) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _LIB.define(
        "rope(Tensor q, Tensor k, Tensor sin, Tensor cos, Tensor? positions, SymInt rotary_dim, "
        "bool inverse) "
        "-> (Tensor, Tensor)"
    )
    ops = (
        ("qk_norm_rope", _forward, _forward_fake, _differentiate, _save),
        ("qk_norm_rope_backward", _backward, _backward_fake, refuse, None),
        ("rope", _rope, _rope_fake, _rope_differentiate, _rope_save),
    )
    for name, run, fake, differentiate, save in ops:
        _CALL[name] = register_differentiable(_LIB, name, run, fake, differentiate, save, keys=both)


_register()
