"""Linear layers that read one input: their gradients of it add up inside the matrix products.

Autograd adds six gradients of an input in five passes over memory; here each product adds to what
the one before it wrote. Layers of few outputs share a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.nn.dispatch import (
    cast_for_autocast,
    is_plain,
    refuse_second_derivative,
    register_differentiable,
)
from olmo_core.nn.linear import apply_linears

__all__ = ["project"]

_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}
_COUNTS = range(2, 7)
_NARROW = 64  # outputs below which a product costs as much as reading its input


def project(linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """``[linear(x) for linear in linears]``, differentiable once where that is faster.

    Those are two to six layers without bias on a GPU; not where one has hooks or a parameter that
    is no plain tensor, which are called one by one.

    :param x: (..., inputs).
    """
    together = (
        x.is_cuda
        and len(linears) in _COUNTS
        and all(type(w) is nn.Linear and w.bias is None and is_plain(w) for w in linears)
    )
    if not together:
        return apply_linears(linears, x)
    return _project(x, [linear.weight for linear in linears])


def _project(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    x, *weights = cast_for_autocast(x, *weights)
    return list(_CALL[f"project_{len(weights)}"](x, *weights))


def _groups(weights: Sequence[Tensor]) -> list[list[int]]:
    """Which weights share a product: all narrow ones, and each other by itself, narrow ones last.

    The first product writes the gradient that the others add to."""
    narrow = [i for i, w in enumerate(weights) if w.shape[0] < _NARROW]
    wide = [[i] for i in range(len(weights)) if i not in narrow]
    return [*wide, narrow] if narrow else wide


def _joined(tensors: Sequence[Tensor], group: list[int], dim: int) -> Tensor:
    return tensors[group[0]] if len(group) == 1 else torch.cat([tensors[i] for i in group], dim)


def _forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    outs: dict[int, Tensor] = {}
    for group in _groups(weights):
        out = F.linear(x, _joined(weights, group, 0))
        sizes = [weights[i].shape[0] for i in group]
        parts = [out] if len(group) == 1 else [y.contiguous() for y in out.split(sizes, -1)]
        outs |= dict(zip(group, parts, strict=True))
    return tuple(outs[i] for i in range(len(weights)))


def _forward_fake(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights)


def _backward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tensors, needs = rest
    weights, douts = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    rows = x.reshape(-1, x.shape[-1])
    douts = [dout.reshape(-1, dout.shape[-1]) for dout in douts]
    dx = None
    dweights: dict[int, Tensor] = {}
    for group in _groups(weights):
        dout = _joined(douts, group, 1)
        if needs[0]:
            weight = _joined(weights, group, 0)
            dx = dout @ weight if dx is None else dx.addmm_(dout, weight)
        if any(needs[1 + i] for i in group):
            dweight = dout.t() @ rows
            sizes = [weights[i].shape[0] for i in group]
            parts = [dweight] if len(group) == 1 else [p.clone() for p in dweight.split(sizes)]
            dweights |= dict(zip(group, parts, strict=True))
    return (
        x.new_empty(0) if dx is None else dx.view(x.shape),
        *(dweights.get(i, x.new_empty(0)) if needs[1 + i] else x.new_empty(0)
          for i in range(len(weights))),
    )  # fmt: skip


def _backward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tensors, needs = rest
    inputs = (x, *tensors[: len(tensors) // 2])
    return tuple(
        y.new_empty(y.shape if need else (0,)) for y, need in zip(inputs, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad)
    grads = _CALL[f"project_{len(douts)}_backward"](*inputs, *douts, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _register() -> None:
    for count in _COUNTS:
        name = f"project_{count}"
        weights = ", ".join(f"Tensor weight_{i}" for i in range(count))
        douts = ", ".join(f"Tensor dout_{i}" for i in range(count))
        results = ", ".join(["Tensor"] * count)
        _LIB.define(f"{name}(Tensor x, {weights}) -> ({results})")
        _LIB.define(
            f"{name}_backward(Tensor x, {weights}, {douts}, bool[] needs) -> (Tensor, {results})"
        )
        refuse = refuse_second_derivative("project", "torch.nn.functional.linear")
        for op, run, fake, differentiate, save in (
            (name, _forward, _forward_fake, _differentiate, _save),
            (f"{name}_backward", _backward, _backward_fake, refuse, None),
        ):
            _CALL[op] = register_differentiable(_LIB, op, run, fake, differentiate, save)


_register()
