"""What the ops of context parallelism have in common: their arguments, and how they are registered.

Groups and kernels go by name and lengths as tensors, so that ops compile; what they decide on the
host they decide inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_core.nn.attention.parallel.agreement import Facts, agree
from olmo_core.nn.attention.parallel.exchange import accumulator
from olmo_core.nn.attention.parallel.plan import check_documents
from olmo_core.nn.attention.parallel.readings import Reading, read_documents
from olmo_core.nn.dispatch import refuse_second_derivative, register_differentiable

LIBRARY = torch.library.Library("olmo_core", "FRAGMENT")
TAGS = (torch.Tag.cudagraph_unsafe,)
ARGUMENTS = (
    "Tensor? lengths, str layout, bool local, SymInt window, SymInt head_stride, float scale, "
    "str kernel, str group, str everyone"
)
_QKV = "Tensor q, Tensor k, Tensor v"


class Shard(NamedTuple):
    """What an op is told beside its data: :data:`ARGUMENTS`, in their order."""

    lengths: Tensor | None
    """Cumulative lengths of the whole sequence, int32; None for one document a row."""
    layout: str
    """The name of a layout, or :data:`.WHOLE`."""
    local: bool
    """Whether ``lengths`` are a zig-zag shard's: the whole sequence's over the ranks."""
    window: int
    head_stride: int
    """How many of the kv heads are gathered at once."""
    scale: float
    kernel: str
    group: str
    """That the op's messages go over."""
    everyone: str
    """The group that first agrees on the lengths; "" if it has."""


def documents_of(shard: Shard, ranks: int, rows: int, device: torch.device) -> Reading:
    """The documents of the whole sequence, without a message.

    :param ranks: How many the layout deals to.
    :param rows: One rank's tokens.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Context parallelism plans its messages on the host, so it can't be captured in a CUDA "
            "graph. Capture around it, or compile without mode='reduce-overhead'."
        )
    factor = ranks if shard.local else 1
    return read_documents(shard.lengths, factor, ranks * rows, device)


def agreed_documents(
    shard: Shard, x: Tensor, heads: tuple[int, ...], ranks: int, rows: int
) -> Reading:
    """:func:`documents_of`, after all ranks agreed on them where they are new.

    :param x: ``(batch, t, h, d)``.
    :param heads: Of queries and keys.
    :raises ValueError: If they do not fit, or ranks differ.
    """
    reading = documents_of(shard, ranks, rows, x.device)
    batch, _, _, head_dim = x.shape

    def check() -> None:
        check_documents(shard.lengths, reading, shard.layout, ranks, batch, rows)

    if shard.everyone:
        facts = Facts(
            shard.layout, batch, rows, heads, head_dim, shard.head_stride, shard.window, x.dtype,
            shard.kernel,
        )  # fmt: skip
        remember = shard.lengths is not None
        agree(reading, facts, check, everyone=shard.everyone, remember=remember)
    return reading


Forward = Callable[[Tensor, Tensor, Tensor, Shard], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def register_attention(name: str, forward: Forward, backward: Backward) -> Callable[..., Any]:
    """Register an op ``(q, k, v, *shard) -> (out, lse)`` with its gradient.

    :param forward: ``(q, k, v, shard)``; the log-sum-exp is ``(1, h, b * t)``.
    :param backward: ``(dout, q, k, v, out, lse, shard) -> (dq, dk, dv)``, all contiguous.
    :returns: The op as a function of positional arguments.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, *shard: Any) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, Shard(*shard))

    def run_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*inputs[:6], Shard(*inputs[6:]))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, lengths, *ctx.rest = inputs
        ctx.save_for_backward(q, k, v, *output, lengths)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *saved, lengths = ctx.saved_tensors
        if dout is None:  # the other ranks wait for this one's part of theirs
            dout = torch.zeros_like(saved[3])
        return *call_backward(dout, *saved, lengths, *ctx.rest), *(None,) * (1 + len(ctx.rest))

    LIBRARY.define(f"{name}({_QKV}, {ARGUMENTS}) -> (Tensor, Tensor)", tags=TAGS)
    LIBRARY.define(
        f"{name}_backward(Tensor dout, {_QKV}, Tensor out, Tensor lse, {ARGUMENTS}) "
        "-> (Tensor, Tensor, Tensor)",
        tags=TAGS,
    )
    call_backward = register_differentiable(
        LIBRARY, f"{name}_backward", run_backward, _backward_fake, refuse_second_derivative(
            name, "torch's matmul and softmax on one rank"
        ),
    )  # fmt: skip
    return register_differentiable(LIBRARY, name, run, _forward_fake, differentiate, save)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((1, h, b * t), dtype=accumulator(q.dtype))


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv
