"""The short convolution in plain torch, on any device and in any dtype, forward and backward.

Works through the tokens in blocks that stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.functional import compute_dtype

# Floats of a block on a CPU: its k + 2 passes then run in the second-level cache.
_CPU_BLOCK = 128 << 10


def torch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seen: Tensor | None,
    silu: bool,
) -> Tensor:
    """The output (B, T, C) of one input; arguments as of :func:`.op.short_convolution`."""
    past = 0 if state is None else state.shape[1]
    x, seen = _after_state(x, state, seen)
    dtype = compute_dtype(x.dtype)
    taps = _taps(weight, dtype)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = scratch = None
    for block in _blocks(x):
        if sums is None or scratch is None:
            sums = torch.empty(x[:, block].shape, dtype=dtype, device=x.device)
            scratch = torch.empty_like(sums)
        n = block.stop - block.start
        target = result[:, block]
        out = target if dtype == x.dtype else sums[:, :n]
        _convolve(x, taps, bias, block, seen, out, scratch[:, :n])
        if silu:
            F.silu(out, inplace=True)
        if out is not target:
            target.copy_(out)
    return result[:, past:].clone(memory_format=torch.contiguous_format) if past else result


def torch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seen: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and state."""
    past = 0 if state is None else state.shape[1]
    if past:
        dy = F.pad(dy, (0, 0, past, 0))
    x, seen = _after_state(x, state, seen)
    dtype = compute_dtype(x.dtype)
    taps = _taps(weight, dtype)
    dx = torch.empty(x.shape, dtype=dtype, device=x.device)
    dtaps = torch.zeros(len(taps), x.shape[-1], dtype=dtype, device=x.device)
    dbias = torch.zeros_like(dtaps[0])
    buffers: list[Tensor] = []
    for block in _blocks(x):
        if not buffers:
            buffers = [torch.empty_like(dx[:, block]) for _ in range(3)]
        dz, scratch, product = (buffer[:, : block.stop - block.start] for buffer in buffers)
        if silu:
            _convolve(x, taps, bias, block, seen, dz, scratch)
            dz.copy_(torch.ops.aten.silu_backward(dy[:, block].to(dtype), dz))
        else:
            dz.copy_(dy[:, block])
        dbias += dz.sum((0, 1))
        torch.mul(dz, taps[0], out=dx[:, block])
        dtaps[0] += torch.mul(dz, x[:, block], out=product).sum((0, 1))
        for lag in range(1, len(taps)):
            visible = _past(x, block, lag, seen, scratch)
            if visible is None:
                continue
            rows, inputs = visible
            dtaps[lag] += torch.mul(dz[:, rows], inputs, out=product[:, rows]).sum((0, 1))
            grad = dz[:, rows]
            if seen is not None:  # anew for each lag: fewer tokens see further back
                grad = _choose(grad, seen[block][rows] >= lag, product[:, rows])
            first = block.start + rows.start - lag
            dx[:, first : block.stop - lag].addcmul_(grad, taps[lag])
    dweight = dtaps.flip(0).t().unsqueeze(1).to(weight.dtype).contiguous()
    dx = dx.to(x.dtype)
    return (
        dx[:, past:].clone(memory_format=torch.contiguous_format) if past else dx,
        dweight,
        None if bias is None else dbias.to(bias.dtype),
        None if state is None else dx[:, :past].to(state.dtype, copy=True).contiguous(),
    )


def _after_state(
    x: Tensor, state: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The state's inputs in front of x, and what they see of each other."""
    if state is None:
        return x, seen
    if seen is not None:
        seen = torch.cat((torch.arange(state.shape[1], device=x.device, dtype=seen.dtype), seen))
    return torch.cat((state.to(x.dtype), x), 1), seen


def _blocks(x: Tensor) -> Iterator[slice]:
    """The tokens of each block of x (B, T, C)."""
    batch, tokens, channels = x.shape
    size = tokens if x.is_cuda else max(16, _CPU_BLOCK // max(1, batch * channels))
    for start in range(0, tokens, max(1, size)):
        yield slice(start, min(start + size, tokens))


def _taps(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The weights (C,) of each lag, contiguous."""
    return list(weight.squeeze(1).to(dtype).t().flip(0).contiguous().unbind(0))


def _choose(x: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """x (B, n, C) where ``keep`` (n,) says so, else 0, even of a NaN; written to ``out``."""
    zero = torch.zeros((), dtype=out.dtype, device=out.device)
    return torch.where(keep.unsqueeze(-1), x.to(out.dtype), zero, out=out)


def _past(
    x: Tensor, block: slice, lag: int, seen: Tensor | None, scratch: Tensor
) -> tuple[slice, Tensor] | None:
    """What the block's tokens see at ``lag``: (the block's rows that see something, their inputs).

    :param scratch: Where inputs are written that have to be masked, as large as the block.
    """
    rows = slice(max(0, lag - block.start), block.stop - block.start)
    if rows.start >= rows.stop:
        return None
    past = x[:, block.start + rows.start - lag : block.stop - lag]
    if seen is not None and lag:
        past = _choose(past, seen[block][rows] >= lag, scratch[:, rows])
    return rows, past


def _convolve(
    x: Tensor,
    taps: list[Tensor],
    bias: Tensor | None,
    block: slice,
    seen: Tensor | None,
    out: Tensor,
    scratch: Tensor,
) -> None:
    """Write the convolution of a block's tokens, before the activation, to ``out``."""
    torch.mul(x[:, block], taps[0], out=out)
    if bias is not None:
        out.add_(bias)
    for lag in range(1, len(taps)):
        visible = _past(x, block, lag, seen, scratch)
        if visible is not None:
            rows, past = visible
            out[:, rows].addcmul_(past.to(out.dtype), taps[lag])
