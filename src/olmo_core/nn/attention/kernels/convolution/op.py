"""The short causal depthwise convolution as a dispatcher op, by the first row that can serve.

Legend of shapes: B batch, T tokens, C channels, K kernel size. Tap ``lag`` reads the input ``lag``
tokens back; its weights are ``weight[:, 0, K - 1 - lag]``, as in ``torch.nn.Conv1d``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import compile_ahead, shaped_like
from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.table import Choice, Row, choose
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable

from .torch_form import torch_backward, torch_forward

_LIB = torch.library.Library("olmo_core", "FRAGMENT")
_CALL: dict[str, Callable[..., Any]] = {}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST = 8  # kernel sizes whose past inputs a thread can hold
_MOST = 3


@dataclass(frozen=True)
class Stream:
    """One input with its weights."""

    x: Tensor
    """(B, T, C)."""
    weight: Tensor
    """(C, 1, K)."""
    bias: Tensor | None = None
    """(C,)."""
    state: Tensor | None = None
    """(B, K - 1, C): the inputs before ``x``; zeros if not given."""


def short_convolution(
    streams: Sequence[Stream],
    *,
    seen: Tensor | None = None,
    silu: bool = True,
    outgoing: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Convolve one to three inputs of equal B, T, K and dtype, in one launch each way on a GPU.

    Sums are float32 at least. Differentiable once, with respect to inputs, weights, biases and
    states; the same bits each run.

    :param streams: The inputs. All have a bias or none, and all a state or none.
    :param seen: (T,) int32, with B = 1: how many earlier tokens each token sees. All that there are
        if not given. A NaN that is not seen changes nothing.
    :param silu: Whether SiLU follows.
    :param outgoing: Whether to return the state after the last token, each (B, K - 1, C).
    :returns: The outputs (B, T, C) in their inputs' dtype, and the outgoing states.
    """
    n, padding = len(streams), [None] * (_MOST - len(streams))
    columns = zip(*((s.x, s.weight, s.bias, s.state) for s in streams), strict=True)
    inputs = [x for column in columns for x in (*column, *padding)]
    outputs = _CALL["short_convolution"](*inputs, seen, silu, outgoing)
    return list(outputs[:n]), list(outputs[_MOST : _MOST + n]) if outgoing else []


def _refusal(streams: Sequence[Stream]) -> str | None:
    """Why the Triton kernels can't serve these inputs, or None if they can."""
    return triton_refusal(streams[0].x) or _unfit(streams)


def _unfit(streams: Sequence[Stream]) -> str | None:
    """The same on any device."""
    x, size = streams[0].x, streams[0].weight.shape[2]
    if x.dtype not in _DTYPES or any(s.x.dtype != x.dtype for s in streams):
        return f"the kernels compute in float32 and take no {x.dtype}"
    if size > _LARGEST:
        return f"kernel_size is at most {_LARGEST}, not {size}"
    if not x.numel():
        return f"there are no tokens in {tuple(x.shape)}"
    return None


@dataclass(frozen=True)
class _Form:
    """A forward and a backward over streams."""

    forward: Callable[..., list[Tensor]]
    backward: Callable[..., tuple[Any, Any, Any, Any]]


def _columns(streams: Sequence[Stream]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    return (
        rows(*(s.x for s in streams)),
        [s.weight.contiguous() for s in streams],
        [s.bias for s in streams],
        [None if s.state is None else s.state.contiguous() for s in streams],
    )


def _compile_ahead(
    device: torch.device, streams: Sequence[Stream], seen: Tensor | None, silu: bool, save: bool
) -> None:
    """Start to compile the forward kernel, and backward's for ``save``. The class names neither the
    batch, nor the length, nor the documents."""

    def call() -> None:
        from .triton_walk import launch_backward, launch_forward

        xs, *columns = (shaped_like(*column) for column in _columns(streams))
        rest = *columns, *shaped_like(seen), silu
        launch_forward(xs, *rest)
        if save:
            launch_backward([y.new_empty(y.shape) for y in xs], xs, *rest)

    s = streams[0]
    dtypes = s.x.dtype, s.weight.dtype, s.bias is None or s.bias.dtype, s.state is None
    shapes = (s.weight.shape for s in streams)
    compile_ahead(("convolution", *shapes, *dtypes, seen is None, silu, save), device, call)


def convolution_ahead(
    device: torch.device, streams: Sequence[Stream], seen: Tensor | None, silu: bool, save: bool
) -> None:
    """Start to compile what :func:`short_convolution` of meta tensors like these will launch."""
    if _unfit(streams) is None:
        _compile_ahead(device, streams, seen, silu, save)


def _triton_forward(streams: Sequence[Stream], seen: Tensor | None, silu: bool) -> list[Tensor]:
    from .triton_walk import launch_forward

    x = streams[0].x
    if x.requires_grad:
        _compile_ahead(x.device, streams, seen, silu, save=True)
    return launch_forward(*_columns(streams), seen, silu)


def _triton_backward(
    dys: Sequence[Tensor], streams: Sequence[Stream], seen: Tensor | None, silu: bool
) -> tuple[Any, Any, Any, Any]:
    from .triton_walk import launch_backward

    return launch_backward(rows(*dys), *_columns(streams), seen, silu)


def _torch_forward(streams: Sequence[Stream], seen: Tensor | None, silu: bool) -> list[Tensor]:
    return [torch_forward(s.x, s.weight, s.bias, s.state, seen, silu) for s in streams]


def _torch_backward(
    dys: Sequence[Tensor], streams: Sequence[Stream], seen: Tensor | None, silu: bool
) -> tuple[Any, Any, Any, Any]:
    grads = (
        torch_backward(dy, s.x, s.weight, s.bias, s.state, seen, silu)
        for dy, s in zip(dys, streams, strict=True)
    )
    dxs, dweights, dbiases, dstates = zip(*grads, strict=True)
    return dxs, dweights, dbiases, dstates


ROWS: tuple[Row[_Form], ...] = (
    Row("triton", _Form(_triton_forward, _triton_backward), "reads each input once", _refusal),
    Row("torch", _Form(_torch_forward, _torch_backward), "runs anywhere"),
)


def choice(streams: Sequence[Stream]) -> Choice[_Form]:
    """Which row serves, and why. Fake tensors get the same answer."""
    return choose(ROWS, streams)


def _streams(inputs: Sequence[Any]) -> list[Stream]:
    xs, weights, biases, states = (inputs[i * _MOST : (i + 1) * _MOST] for i in range(4))
    return [
        Stream(*each)
        for each in zip(xs, weights, biases, states, strict=True)
        if each[0] is not None
    ]


def _outgoing(s: Stream, seen: Tensor | None) -> Tensor:
    """The last K - 1 inputs of what the last token's document has seen (B, K - 1, C)."""
    past = s.weight.shape[2] - 1
    if s.x.shape[1] >= past:
        tail = s.x[:, s.x.shape[1] - past :]
    else:
        before = s.x.new_zeros(s.x.shape[0], past, s.x.shape[2]) if s.state is None else s.state
        tail = torch.cat((before.to(s.x.dtype), s.x), 1)[:, -past:]
    if seen is None or not past:
        return tail.clone(memory_format=torch.contiguous_format)
    return tail.masked_fill(_forgotten(past, seen).unsqueeze(-1), 0)


def _forgotten(past: int, seen: Tensor) -> Tensor:
    """Which of the last inputs (K - 1,) belong to documents that ended."""
    return torch.arange(past - 1, -1, -1, device=seen.device) > seen[-1]


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, seen, silu, outgoing = inputs
    streams = _streams(tensors)
    ys = choice(streams).run.forward(streams, seen, silu)
    states = [_outgoing(s, seen) for s in streams] if outgoing else []
    return _filled(streams[0].x, ys, states)


def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, outgoing = inputs
    streams = _streams(tensors)
    ys = [s.x.new_empty(s.x.shape) for s in streams]
    states = [
        s.x.new_empty(s.x.shape[0], s.weight.shape[2] - 1, s.x.shape[2])
        for s in (streams if outgoing else ())
    ]
    return _filled(streams[0].x, ys, states)


def _filled(x: Tensor, *columns: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The columns one after another, with empty tensors like x for what is not there."""
    return tuple(
        x.new_empty(0) if y is None else y
        for column in columns
        for y in (*column, *[None] * (_MOST - len(column)))
    )


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    dys, dstates_out = inputs[:_MOST], inputs[_MOST : 2 * _MOST]
    *tensors, seen, silu = inputs[2 * _MOST :]
    streams = _streams(tensors)
    run = choice(streams).run.backward
    dxs, dweights, dbiases, dstates = run(dys[: len(streams)], streams, seen, silu)
    for dx, dstate, out, s in zip(dxs, dstates, dstates_out, streams, strict=False):
        past, tokens = s.weight.shape[2] - 1, s.x.shape[1]
        if out is None or not past:
            continue
        if seen is not None:
            out = out.masked_fill(_forgotten(past, seen).unsqueeze(-1), 0)
        kept = min(past, tokens)
        dx[:, tokens - kept :] += out[:, past - kept :]
        if dstate is not None and kept < past:
            dstate[:, kept:] += out[:, : past - kept]
    return _filled(streams[0].x, dxs, dweights, dbiases, dstates)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    tensors = inputs[2 * _MOST : 6 * _MOST]
    grads = [None if x is None else x.new_empty(x.shape) for x in tensors]
    return _filled(tensors[0], *(grads[i * _MOST : (i + 1) * _MOST] for i in range(4)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu, ctx.outgoing = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seen = ctx.saved_tensors  # checkpointing lets them be read once
    xs = tensors[:_MOST]
    dys = [
        None if x is None else torch.zeros_like(x) if dy is None else dy
        for x, dy in zip(xs, grads[:_MOST], strict=True)
    ]
    dstates = [
        d if ctx.outgoing and x is not None else None
        for x, d in zip(xs, grads[_MOST:], strict=True)
    ]
    results = _CALL["short_convolution_backward"](*dys, *dstates, *tensors, seen, ctx.silu)
    given = (None if x is None else dx for x, dx in zip(tensors, results, strict=True))
    return (*given, None, None, None)


def _register() -> None:
    def three(name: str, optional: bool = True) -> str:
        marks = ["?" if optional or i else "" for i in range(_MOST)]
        return ", ".join(f"Tensor{mark} {name}_{i}" for i, mark in enumerate(marks))

    inputs = f"{three('x', False)}, {three('weight', False)}, {three('bias')}, {three('state')}"
    results = ", ".join(["Tensor"] * 2 * _MOST)
    _LIB.define(
        f"short_convolution({inputs}, Tensor? seen, bool silu, bool outgoing) -> ({results})"
    )
    _LIB.define(
        f"short_convolution_backward({three('dy', False)}, {three('dstate')}, {inputs}, "
        f"Tensor? seen, bool silu) -> ({results}, {results})"
    )
    refuse = refuse_second_derivative("causal_conv1d", "torch.nn.functional.conv1d with groups")
    for name, run, fake, differentiate, save in (
        ("short_convolution", _forward, _forward_fake, _differentiate, _save),
        ("short_convolution_backward", _backward, _backward_fake, refuse, None),
    ):
        _CALL[name] = register_differentiable(_LIB, name, run, fake, differentiate, save)


_register()
