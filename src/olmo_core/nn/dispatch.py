"""Differentiable dispatcher ops, at the price of a ``torch.autograd.Function`` in eager mode.

A dispatcher op is what compilers, selective checkpointing and other modes can see. In plain eager
mode nothing looks, and an op of ``torch.library`` with ``register_autograd`` costs some 0.2 ms for
forward and backward, about what short attention kernels take. So the callable made here goes
through the dispatcher only where somebody listens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

__all__ = [
    "autocast_dtype",
    "cast_for_autocast",
    "draws_of_stream",
    "is_heard",
    "is_observed",
    "is_plain",
    "on_its_device",
    "refuse_second_derivative",
    "register_differentiable",
    "register_inference",
    "without_autocast",
]


def register_differentiable(
    lib: torch.library.Library,
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    *,
    keys: Sequence[str] = ("CompositeExplicitAutograd",),
) -> Callable[..., Any]:
    """Implement an op, give it its gradient, and make the function to call it by.

    :param lib: The library that defined it.
    :param name: Without the namespace.
    :param implementation: What the op runs on plain tensors, with its first one's device current.
    :param fake: The same for tensors without data.
    :param differentiate: ``(ctx, *output_gradients) -> input_gradients``.
    :param save: ``(ctx, inputs, outputs)``, which keeps what ``differentiate`` needs.
    :param keys: The dispatch keys that ``implementation`` serves.
    :returns: The op as a function of positional arguments.
    """
    op, implementation = _implement(lib, name, implementation, fake, keys)

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    dispatched = _function(name, below_autograd, differentiate, save)
    direct = _function(name, implementation, differentiate, save)
    transformed = _transformable(name, op, differentiate, save)

    def with_autograd(*inputs: Any) -> Any:
        _refuse_tangents(name, inputs)
        return dispatched(*inputs) if _wants_gradient(inputs) else below_autograd(*inputs)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        _refuse_tangents(name, inputs)
        if _is_transformed() and _wants_gradient(inputs):
            return transformed(*inputs)
        if is_observed(inputs):
            return op(*inputs)
        return direct(*inputs) if _wants_gradient(inputs) else implementation(*inputs)

    lib.impl(name, with_autograd, "Autograd")
    return call


def _function(
    name: str,
    run: Callable[..., Any],
    differentiate: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None,
) -> Callable[..., Any]:
    """``run`` as a node of autograd's graph, at the least cost."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = run(*inputs)
            if save is not None:
                save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    Differentiable.__name__ = name  # what grad_fn and tracebacks show
    return Differentiable.apply


def _transformable(
    name: str,
    run: Callable[..., Any],
    differentiate: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None,
) -> Callable[..., Any]:
    """The same in the form that ``torch.func``'s grad, vjp and vmap know how to transform."""

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if save is not None:
                save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    Transformable.__name__ = name
    return Transformable.apply


def register_inference(
    lib: torch.library.Library,
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    keys: Sequence[str] = ("CompositeExplicitAutograd",),
) -> Callable[..., Any]:
    """:func:`register_differentiable` for an op without a gradient."""
    op, implementation = _implement(lib, name, implementation, fake, keys)

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _refuse_tangents(name, inputs)
        through = is_observed(inputs) or _wants_gradient(inputs)
        return op(*inputs) if through else implementation(*inputs)

    return call


def _implement(
    lib: torch.library.Library,
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    keys: Sequence[str],
) -> tuple[Any, Callable[..., Any]]:
    """The op, and its implementation as it is registered."""
    implementation = on_its_device(implementation)
    for key in keys:
        lib.impl(name, implementation, key)
    torch.library.register_fake(f"{lib.ns}::{name}", fake, lib=lib)
    return getattr(getattr(torch.ops, lib.ns), name).default, implementation


def on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first argument current: kernels launched from Python run on that."""

    @functools.wraps(implementation)
    def run(*inputs: Any) -> Any:
        x: Tensor = inputs[0]
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return implementation(*inputs)
        with torch.cuda.device(x.device):
            return implementation(*inputs)

    return run


def refuse_second_derivative(name: str, instead: str) -> Callable[..., Any]:
    """The gradient of a backward op: an error, where autograd's default is a wrong zero.

    :param name: Of the differentiable op.
    :param instead: What to use for double backward.
    """

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{name} is differentiable once, and a second derivative was asked for. For double "
            f"backward use {instead}."
        )

    return refuse


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of tensors on a device like ``x``'s, None where it is off. A meta tensor
    has no autocast, and torch raises if it is asked."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where torch's ops compute in the dtypes of their inputs, on ``x``'s device."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's dtype where it is on, as torch casts for its own ops: never float64."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _wants_gradient(inputs: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _refuse_tangents(name: str, inputs: tuple[Any, ...]) -> None:
    """Below autograd an op would drop its inputs' tangents: a wrong zero, without a word."""
    if forward_ad._current_level < 0:
        return
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name} has no forward-mode derivative (jvp, jacfwd, forward_ad). Use reverse "
                "mode: torch.func.vjp, jacrev or grad, or Tensor.backward()."
            )


@contextmanager
def draws_of_stream(device: torch.device, stream: int) -> Iterator[None]:
    """Draw random numbers of a stream's own: different for each ``stream`` where the seeds of all
    are equal.

    Outside, torch's generators go on the same for all streams, however much is drawn inside.
    """
    seed = int(torch.randint(2**62, ())) ^ (stream * 0x9E3779B97F4A7C15 % 2**62)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


def require_independent_draws(name: str) -> None:
    """Refuse to draw under a ``torch.vmap`` that does not ask for a draw of its own in each row,
    which is what an op gives there.

    :raises RuntimeError: If its randomness is "error" or "same".
    """
    if torch.compiler.is_compiling() or not _is_transformed():
        return
    from torch._functorch.pyfunctorch import (
        VmapInterpreter,
        retrieve_all_functorch_interpreters,
    )

    for interpreter in retrieve_all_functorch_interpreters():
        if isinstance(interpreter, VmapInterpreter) and interpreter.randomness() != "different":
            raise RuntimeError(
                f"{name} under torch.vmap draws anew for each row, and its randomness is "
                f"'{interpreter.randomness()}'. Use torch.vmap(..., randomness='different') or "
                "eval(), which ends dropout."
            )


def _is_transformed() -> bool:
    """Whether one of ``torch.func``'s transforms is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_observed(inputs: Sequence[Any]) -> bool:
    """Whether somebody must see an op: a compiler, mode, functorch transform, tensor subclass or
    meta tensor."""
    if torch.compiler.is_compiling():
        return True
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _is_transformed()
    ):
        return True
    for x in inputs:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            if x.is_meta:
                return True
        elif isinstance(x, Tensor):
            return True
    return False


def is_heard(module: nn.Module) -> bool:
    """Whether somebody sees that ``module`` is called: through a hook, or a forward of its own,
    which would not run where a kernel computes what it does."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a kernel may compute what calling ``module`` does: it has no hooks, which would not
    run, and plain parameters (no DTensor)."""
    if is_heard(module):
        return False
    for p in module._parameters.values():
        if p is not None and type(p) is not nn.Parameter:
            return False
    return True
