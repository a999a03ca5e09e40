"""Autograd for dispatcher ops, at the price of a ``torch.autograd.Function``.

``torch.library.register_autograd`` reads the op's schema anew in each call, some 0.1 ms. With fast
kernels and a few thousand tokens, launching is what a layer's step takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_differentiable"]


def register_differentiable(
    lib: torch.library.Library,
    name: str,
    differentiate: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Give an op its gradient; parameters as of ``torch.library.register_autograd``.

    The op must be defined already, and be called with positional arguments alone.

    :param lib: The library that defined it.
    :param name: Without the namespace.
    :param differentiate: ``(ctx, *output_gradients) -> input_gradients``.
    :param save: ``(ctx, inputs, outputs)``, which keeps what ``differentiate`` needs.
    """
    op = getattr(getattr(torch.ops, lib.ns), name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*inputs)
            if save is not None:
                save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    Differentiable.__name__ = f"{name}_op"  # what a traceback and grad_fn show

    def run(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    lib.impl(name, run, "Autograd")
