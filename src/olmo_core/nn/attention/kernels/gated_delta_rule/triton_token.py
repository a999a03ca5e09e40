"""One token of a gated delta net's convolutions in Triton: their history is read and moved once.

A program has a block of channels of one row of the batch. Up to three inputs share a launch and
one history, in which their channels lie side by side.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch

_BLOCK = 256  # channels


@triton.jit
def _stream(a, b, c, which):
    """``a``, ``b`` or ``c``: what belongs to the input ``which``."""
    return tl.where(which == 0, a, tl.where(which == 1, b, c))


@triton.jit
def _convolve_token(
    x_0, x_1, x_2, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, history_ptr,
    y_0, y_1, y_2, stride_0, stride_1, stride_2,
    channels_0: tl.constexpr, channels_1: tl.constexpr, channels_2: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks_0: tl.constexpr = (channels_0 + BLOCK - 1) // BLOCK
    blocks_1: tl.constexpr = (channels_1 + BLOCK - 1) // BLOCK
    channels: tl.constexpr = channels_0 + channels_1 + channels_2
    which = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    width = _stream(channels_0, channels_1, channels_2, which)
    c = (block - _stream(0, blocks_0, blocks_0 + blocks_1, which)) * BLOCK + tl.arange(0, BLOCK)
    keep = c < width
    at = b * _stream(stride_0, stride_1, stride_2, which) + c
    new = tl.load(_stream(x_0, x_1, x_2, which) + at, mask=keep, other=0.0)
    weight_ptr = _stream(weight_0, weight_1, weight_2, which) + c * K
    y = new.to(tl.float32) * tl.load(weight_ptr + (K - 1), mask=keep, other=0.0).to(tl.float32)
    if BIAS:
        bias_ptr = _stream(bias_0, bias_1, bias_2, which)
        y += tl.load(bias_ptr + c, mask=keep, other=0.0).to(tl.float32)
    first = _stream(0, channels_0, channels_0 + channels_1, which)
    history_ptr += b * ((K - 1) * channels) + first + c
    for j in tl.static_range(K - 1):
        old = tl.load(history_ptr + j * channels, mask=keep, other=0.0)
        tap = tl.load(weight_ptr + j, mask=keep, other=0.0)
        y += old.to(tl.float32) * tap.to(tl.float32)
        if j > 0:
            tl.store(history_ptr + (j - 1) * channels, old, mask=keep)
    if K > 1:
        newest = new.to(history_ptr.dtype.element_ty)
        tl.store(history_ptr + (K - 2) * channels, newest, mask=keep)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    out = _stream(y_0, y_1, y_2, which) + b * width + c
    tl.store(out, y.to(y_0.dtype.element_ty), mask=keep)


def launch_convolution(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    history: Tensor, silu: bool,
) -> list[Tensor]:  # fmt: skip
    """The outputs (B, C) of up to three inputs (B, C); ``history`` (B, K - 1, all C) moves on.

    :param weights: (C, 1, K), contiguous. Biases (C,) likewise, or None for all.
    """
    widths = [x.shape[1] for x in xs]
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    missing = 3 - len(xs)

    def three(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [*tensors, *[tensors[0]] * missing]  # the last of which no program reads

    blocks = sum(triton.cdiv(width, _BLOCK) for width in widths)
    strides = [x.stride(0) for x in xs] + [0] * missing
    sizes = {f"channels_{i}": width for i, width in enumerate([*widths, *[0] * missing])}
    launch(_convolve_token, (blocks, xs[0].shape[0]))(
        *three(xs), *three(weights), *three(biases), history, *three(ys), *strides, **sizes,
        K=weights[0].shape[2], SILU=silu, BIAS=biases[0] is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return ys
