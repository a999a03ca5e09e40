"""The gates as dispatcher ops over Triton kernels, and the tables that choose between those and
plain torch.

A table is asked with the function's own arguments. Its torch row runs plain expressions, which a
compiler fuses and which can be differentiated twice; its triton row is an op, differentiable once.
Shapes: B batch, T tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import compile_ahead, shaped_like
from olmo_core.nn.attention.kernels.table import Row, choose
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable

from .torch_form import torch_decay_gates, torch_gated_rms_norm, torch_sigmoid_gate

_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 8192  # elements of a row that a program holds in registers


def decay_gates(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    padding: Tensor | None = None,
    *,
    double: bool,
) -> tuple[Tensor, Tensor]:
    """The log decays ``g = -exp(A_log) softplus(a + dt_bias)`` and step sizes ``beta = sigmoid(b)``
    of a gated delta net, in float32 at least.

    :param a: (B, T, H).
    :param b: (B, T, H).
    :param A_log: (H,).
    :param dt_bias: (H,).
    :param padding: (B, T), bool: where beta is 0.
    :param double: Multiply beta by 2.
    """
    inputs = (a, b, A_log, dt_bias, padding, double)
    return choose(GATES, *inputs).run(*inputs)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight * silu(gate)`` over the last dimension, in gate's dtype.

    Computed in float32 at least, none of which is written to memory by the kernel.

    :param x: (..., D).
    :param gate: (..., D).
    :param weight: (D,).
    """
    return choose(GATED_NORM, x, gate, weight, eps).run(x, gate, weight, eps)


def sigmoid_gate(x: Tensor, gate: Tensor, *, rounded: bool) -> Tensor:
    """``x * sigmoid(gate)`` in x's dtype.

    :param x: (..., D).
    :param gate: (..., D), or (..., 1).
    :param rounded: Round the sigmoid to the gate's dtype first, as torch does in low precision;
        otherwise all is computed in float32 at least.
    """
    return choose(SIGMOID_GATE, x, gate, rounded).run(x, gate, rounded)


def _refusal(*inputs: Any) -> str | None:
    """Why the Triton kernels can't serve these inputs, or None if they can."""
    x = inputs[0]
    if torch.compiler.is_compiling() and not x.is_cuda:
        return "a compiler fuses the plain form for a CPU"
    return triton_refusal(x) or _unfit(*inputs)


def _unfit(*inputs: Any) -> str | None:
    """The same on any device."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    x = tensors[0]
    for y in tensors:
        if y.is_floating_point() and y.dtype not in _DTYPES:
            return f"the kernels compute in float32 and take no {y.dtype}"
    if not x.numel():
        return f"there is nothing in {tuple(x.shape)}"
    if x.shape[-1] > _WIDEST:
        return f"rows are at most {_WIDEST} wide, not {x.shape[-1]}"
    return None


def _sigmoid_refusal(x: Tensor, gate: Tensor, rounded: bool) -> str | None:
    if gate.dtype != x.dtype:
        return f"the kernel takes one dtype, not {x.dtype} and {gate.dtype}"
    return _refusal(x, gate)


def _call(name: str) -> Callable[..., Any]:
    return lambda *inputs: _CALL[name](*inputs)


_ONE_PASS = "each tensor is read and written once"
GATES: tuple[Row[Callable[..., tuple[Tensor, Tensor]]], ...] = (
    Row("triton", _call("decay_gates"), _ONE_PASS, _refusal),
    Row("torch", torch_decay_gates, "runs anywhere"),
)
GATED_NORM: tuple[Row[Callable[..., Tensor]], ...] = (
    Row("triton", _call("gated_rms_norm"), _ONE_PASS, _refusal),
    Row("torch", torch_gated_rms_norm, "runs anywhere"),
)
SIGMOID_GATE: tuple[Row[Callable[..., Tensor]], ...] = (
    Row("triton", _call("sigmoid_gate"), _ONE_PASS, _sigmoid_refusal),
    Row("torch", torch_sigmoid_gate, "runs anywhere"),
)


def _compile_ahead(
    device: torch.device,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None,
    inputs: Sequence[Tensor | None],
    option: object,
) -> None:
    """Start to compile what ``forward`` will launch, and ``backward`` for contiguous gradients. The
    class does not name the rows."""

    def call() -> None:
        shapes = shaped_like(*inputs)
        outputs = forward(*shapes, option)
        if backward is not None:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            backward(*outputs, *shapes, option)

    each = ((None, 0) if x is None else (x.dtype, x.shape[-1]) for x in inputs)
    compile_ahead((forward.__name__, *each, option, backward is None), device, call)


def decay_gates_ahead(
    device: torch.device, inputs: Sequence[Tensor | None], double: bool, save: bool
) -> None:
    """Start to compile what :func:`decay_gates` of meta tensors like these will launch."""
    if _unfit(*inputs) is None:
        from .triton_gates import decay_backward, decay_forward

        _compile_ahead(device, decay_forward, decay_backward if save else None, inputs, double)


def gated_norm_ahead(
    device: torch.device, inputs: Sequence[Tensor], eps: float, save: bool
) -> None:
    """Start to compile what :func:`gated_rms_norm` of meta tensors like these will launch."""
    if _unfit(*inputs) is None:
        from .triton_gates import norm_backward, norm_forward

        _compile_ahead(device, norm_forward, norm_backward if save else None, inputs, eps)


def _tokens(x: Tensor) -> Tensor:
    """(B, T, H) such that token ``b * T + t`` lies ``t * stride`` after the first."""
    even = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if even else x.contiguous()


def _decay_forward(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, padding: Tensor | None, double: bool
) -> tuple[Tensor, Tensor]:
    from .triton_gates import decay_backward, decay_forward

    padding = None if padding is None else padding.contiguous()
    inputs = (_tokens(a), _tokens(b), A_log, dt_bias, padding)
    if a.requires_grad:
        _compile_ahead(a.device, decay_forward, decay_backward, inputs, double)
    return decay_forward(*inputs, double)


def _decay_fake(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    g, beta = (a.new_empty(a.shape, dtype=torch.float32) for _ in range(2))
    return g, beta


def _decay_backward(
    dg: Tensor, dbeta: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    padding: Tensor | None, double: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from .triton_gates import decay_backward

    padding = None if padding is None else padding.contiguous()
    inputs = (_tokens(a), _tokens(b), A_log, dt_bias, padding)
    return decay_backward(dg.contiguous(), dbeta.contiguous(), *inputs, double)


def _norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    from .triton_gates import norm_backward, norm_forward

    inputs = (x.contiguous(), gate.contiguous(), weight.contiguous())
    if x.requires_grad:
        _compile_ahead(x.device, norm_forward, norm_backward, inputs, eps)
    return norm_forward(*inputs, eps)


def _norm_backward(
    dout: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_gates import norm_backward

    inputs = (x.contiguous(), gate.contiguous(), weight.contiguous())
    return norm_backward(dout.contiguous(), *inputs, eps)


def _sigmoid_forward(x: Tensor, gate: Tensor, rounded: bool) -> Tensor:
    from .triton_gates import sigmoid_backward, sigmoid_forward

    inputs = (x.contiguous(), gate.contiguous())
    if x.requires_grad:
        _compile_ahead(x.device, sigmoid_forward, sigmoid_backward, inputs, rounded)
    return sigmoid_forward(*inputs, rounded)


def _sigmoid_backward(
    dout: Tensor, x: Tensor, gate: Tensor, rounded: bool
) -> tuple[Tensor, Tensor]:
    from .triton_gates import sigmoid_backward

    inputs = (x.contiguous(), gate.contiguous())
    return sigmoid_backward(dout.contiguous(), *inputs, rounded)


def _grads_fake(n_gradients: int) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of the inputs that follow those of the outputs, each like its input."""

    def fake(*inputs: Any) -> tuple[Tensor, ...]:
        tensors = inputs[n_gradients:]
        return tuple(
            x.new_empty(x.shape) for x in tensors if isinstance(x, Tensor) and x.is_floating_point()
        )

    return fake


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.option = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(name: str) -> Callable[..., tuple[Any, ...]]:
    def differentiate(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads = _CALL[name](*douts, *tensors, ctx.option)
        return (*grads, *[None] * (len(tensors) + 1 - len(grads)))

    return differentiate


def _register() -> None:
    decay = "Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor? padding, bool double"
    norm = "Tensor x, Tensor gate, Tensor weight, float eps"
    gate = "Tensor x, Tensor gate, bool rounded"

    def empty_like_gate(x: Tensor, gate: Tensor, *_: Any) -> Tensor:
        return gate.new_empty(gate.shape)

    def empty_like_x(x: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape)

    for name, inputs, outputs, grads, run, fake, back in (
        ("decay_gates", decay, 2, 4, _decay_forward, _decay_fake, _decay_backward),
        ("gated_rms_norm", norm, 1, 3, _norm_forward, empty_like_gate, _norm_backward),
        ("sigmoid_gate", gate, 1, 2, _sigmoid_forward, empty_like_x, _sigmoid_backward),
    ):
        results = "Tensor" if outputs == 1 else "(Tensor, Tensor)"
        douts = ", ".join(f"Tensor dout_{i}" for i in range(outputs))
        _LIB.define(f"{name}({inputs}) -> {results}")
        _LIB.define(f"{name}_backward({douts}, {inputs}) -> ({', '.join(['Tensor'] * grads)})")
        backward = f"{name}_backward"
        refuse = refuse_second_derivative(name, f"torch_{name}, which autograd differentiates")
        _CALL[name] = register_differentiable(
            _LIB, name, run, fake, _differentiate(backward), _save
        )
        _CALL[backward] = register_differentiable(
            _LIB, backward, back, _grads_fake(outputs), refuse
        )


_register()
