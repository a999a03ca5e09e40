"""The short convolution in Triton: each input is read once, each output written once.

A program walks over time with SEGMENTS spans of tokens side by side, for BLOCK channels, and keeps
in registers the inputs that later outputs still see; going back, also the gradients of inputs that
later tokens still add to. A span reads the K - 1 tokens before it, and in the backward pass the
K - 1 after it, once more than needed: those lie in the cache.

Up to three tensors of different widths, each with its own weights, share a launch.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
# ruff: noqa: RUF005 (Triton has no unpacking)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch

_BLOCK = 128  # channels
_WARPS = 4
# By measurement: a thread's elements, each of which keeps K - 1 past ones; the tokens of a span,
# those read for its neighbours included; and the tokens whose loads are in flight together.
_FORWARD = (4, 40, 4)
_BACKWARD = (4, 72, 2)


@triton.jit
def _stream(a, b, c, which):
    """``a``, ``b`` or ``c``: what belongs to the tensor ``which``."""
    return tl.where(which == 0, a, tl.where(which == 1, b, c))


@triton.jit
def _load(ptr, state_ptr, t, c, tokens, stride_t, C, keep, PAST: tl.constexpr,
          STATE: tl.constexpr):  # fmt: skip
    """Inputs (SEGMENTS, BLOCK) float32 at tokens ``t``: zero, or the state's, before the first."""
    inside = (t >= 0) & (t < tokens)
    at = t.to(tl.int64) * stride_t
    x = tl.load(ptr + at[:, None] + c[None, :], mask=inside[:, None] & keep, other=0.0)
    x = x.to(tl.float32)
    if STATE:
        before = (t < 0) & (t >= -PAST)
        at = (t + PAST) * C
        old = tl.load(state_ptr + at[:, None] + c[None, :], mask=before[:, None] & keep, other=0.0)
        x = tl.where(before[:, None], old.to(tl.float32), x)
    return x


@triton.jit
def _weights(ptr, c, in_width, K: tl.constexpr):
    """The weights of each lag, (1, BLOCK) float32."""
    taps = ()
    for lag in tl.static_range(K):
        tap = tl.load(ptr + c * K + (K - 1 - lag), mask=in_width, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _visible(x, seen, lag: tl.constexpr, DOCUMENTS: tl.constexpr):
    """``x`` where a token sees ``lag`` tokens back, else 0: chosen, since 0 * NaN is NaN."""
    if DOCUMENTS:
        return tl.where((seen >= lag)[:, None], x, 0.0)
    return x


@triton.jit
def _sum(x, past, taps, bias, seen, K: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The convolution at the tokens whose inputs are ``x``, after ``past`` (latest first)."""
    z = x * taps[0] + bias
    for lag in tl.static_range(1, K):
        z += _visible(past[lag - 1], seen, lag, DOCUMENTS) * taps[lag]
    return z


@triton.jit
def _place(tokens, channels_0, channels_1, channels_2, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr,
           BLOCK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """This program's tensor, its width, channels, batch row, and each span's first token."""
    block = tl.program_id(0)
    blocks_0 = (channels_0 + BLOCK - 1) // BLOCK
    blocks_1 = (channels_1 + BLOCK - 1) // BLOCK
    which = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    block -= tl.where(which == 0, 0, tl.where(which == 1, blocks_0, blocks_0 + blocks_1))
    width = _stream(channels_0, channels_1, channels_2, which)
    if EVEN:
        width = tl.multiple_of(width, BLOCK)
    c = block * BLOCK + tl.arange(0, BLOCK)
    groups = (tokens + SEGMENTS * LENGTH - 1) // (SEGMENTS * LENGTH)
    row = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    first = (group * SEGMENTS + tl.arange(0, SEGMENTS)) * LENGTH
    return which, width, c, row.to(tl.int64), first


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    x_0, x_1, x_2, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2,
    state_0, state_1, state_2, y_0, y_1, y_2, seen_ptr, tokens,
    stride_b_0, stride_b_1, stride_b_2, stride_t_0, stride_t_1, stride_t_2,
    channels_0: tl.constexpr, channels_1: tl.constexpr, channels_2: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, SEGMENTS: tl.constexpr,
    STEPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PAST: tl.constexpr = K - 1
    LENGTH: tl.constexpr = STEPS - PAST
    which, width, c, row, first = _place(
        tokens, channels_0, channels_1, channels_2, SEGMENTS, LENGTH, BLOCK, EVEN
    )
    stride_b = _stream(stride_b_0, stride_b_1, stride_b_2, which)
    stride_t = tl.multiple_of(_stream(stride_t_0, stride_t_1, stride_t_2, which), ALIGN)
    x_ptr = tl.multiple_of(_stream(x_0, x_1, x_2, which) + row * stride_b, 2 * ALIGN)
    y_ptr = tl.multiple_of(_stream(y_0, y_1, y_2, which) + row * tokens * width, 2 * ALIGN)
    state_ptr = x_ptr
    if STATE:
        state_ptr = _stream(state_0, state_1, state_2, which) + row * PAST * width
    in_width = c < width
    keep = tl.full((1, BLOCK), True, tl.int1) if EVEN else in_width[None, :]
    taps = _weights(_stream(weight_0, weight_1, weight_2, which), c, in_width, K)
    bias = tl.zeros((1, BLOCK), tl.float32)
    if BIAS:
        bias_ptr = _stream(bias_0, bias_1, bias_2, which)
        bias += tl.load(bias_ptr + c, mask=in_width, other=0.0).to(tl.float32)[None, :]

    zero = tl.zeros((SEGMENTS, BLOCK), tl.float32)
    past = (zero,) * PAST
    for step in range(0, STEPS, UNROLL):
        inputs, seens = (), ()
        for ahead in tl.static_range(UNROLL):
            t = first + (step + ahead - PAST)
            x = _load(x_ptr, state_ptr, t, c, tokens, stride_t, width, keep, PAST, STATE)
            inputs = inputs + (x,)
            if DOCUMENTS:
                inside = (t >= 0) & (t < tokens)
                seens = seens + (tl.load(seen_ptr + t, mask=inside, other=0),)
            else:
                seens = seens + (t,)
        for ahead in tl.static_range(UNROLL):
            at = step + ahead - PAST
            t = first + at
            x = inputs[ahead]
            y = _sum(x, past, taps, bias, seens[ahead], K, DOCUMENTS)
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            out = y_ptr + (t.to(tl.int64) * width)[:, None] + c[None, :]
            mine = (t < tokens) & (at >= 0) & (at < LENGTH)
            tl.store(out, y.to(y_0.dtype.element_ty), mask=mine[:, None] & keep)
            if PAST > 0:
                past = (x,) + past[: PAST - 1]


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    dy_0, dy_1, dy_2, x_0, x_1, x_2, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2,
    state_0, state_1, state_2, dx_0, dx_1, dx_2, dstate_0, dstate_1, dstate_2,
    dweight_0, dweight_1, dweight_2, dbias_0, dbias_1, dbias_2, seen_ptr, tokens, partial_stride,
    dy_stride_b_0, dy_stride_b_1, dy_stride_b_2, dy_stride_t_0, dy_stride_t_1, dy_stride_t_2,
    stride_b_0, stride_b_1, stride_b_2, stride_t_0, stride_t_1, stride_t_2,
    channels_0: tl.constexpr, channels_1: tl.constexpr, channels_2: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, SEGMENTS: tl.constexpr,
    STEPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights' gradients are a row of sums for each program of an axis, added up afterwards."""
    PAST: tl.constexpr = K - 1
    LENGTH: tl.constexpr = STEPS - 2 * PAST
    which, width, c, row, first = _place(
        tokens, channels_0, channels_1, channels_2, SEGMENTS, LENGTH, BLOCK, EVEN
    )
    stride_b = _stream(stride_b_0, stride_b_1, stride_b_2, which)
    stride_t = tl.multiple_of(_stream(stride_t_0, stride_t_1, stride_t_2, which), ALIGN)
    dy_stride_b = _stream(dy_stride_b_0, dy_stride_b_1, dy_stride_b_2, which)
    dy_stride_t = tl.multiple_of(_stream(dy_stride_t_0, dy_stride_t_1, dy_stride_t_2, which), ALIGN)
    x_ptr = tl.multiple_of(_stream(x_0, x_1, x_2, which) + row * stride_b, 2 * ALIGN)
    dy_ptr = tl.multiple_of(_stream(dy_0, dy_1, dy_2, which) + row * dy_stride_b, 2 * ALIGN)
    dx_ptr = tl.multiple_of(_stream(dx_0, dx_1, dx_2, which) + row * tokens * width, 2 * ALIGN)
    state_ptr, dstate_ptr = x_ptr, dx_ptr
    if STATE:
        state_ptr = _stream(state_0, state_1, state_2, which) + row * PAST * width
        dstate_ptr = _stream(dstate_0, dstate_1, dstate_2, which) + row * PAST * width
    in_width = c < width
    keep = tl.full((1, BLOCK), True, tl.int1) if EVEN else in_width[None, :]
    taps = _weights(_stream(weight_0, weight_1, weight_2, which), c, in_width, K)
    bias = tl.zeros((1, BLOCK), tl.float32)
    if BIAS:
        bias_ptr = _stream(bias_0, bias_1, bias_2, which)
        bias += tl.load(bias_ptr + c, mask=in_width, other=0.0).to(tl.float32)[None, :]

    zero = tl.zeros((SEGMENTS, BLOCK), tl.float32)
    past, pending, dtaps = (zero,) * PAST, (zero,) * PAST, (zero,) * K
    dbias = zero
    for step in range(0, STEPS, UNROLL):
        inputs, grads, seens = (), (), ()
        for ahead in tl.static_range(UNROLL):
            t = first + (step + ahead - PAST)
            x = _load(x_ptr, state_ptr, t, c, tokens, stride_t, width, keep, PAST, STATE)
            inputs = inputs + (x,)
            inside = (t >= 0) & (t < tokens) & (step + ahead >= PAST)
            dy_at = dy_ptr + (t.to(tl.int64) * dy_stride_t)[:, None] + c[None, :]
            dy = tl.load(dy_at, mask=inside[:, None] & keep, other=0.0)
            grads = grads + (dy.to(tl.float32),)
            if DOCUMENTS:
                seens = seens + (tl.load(seen_ptr + t, mask=(t >= 0) & (t < tokens), other=0),)
            else:
                seens = seens + (t,)
        for ahead in tl.static_range(UNROLL):
            at = step + ahead - PAST
            t = first + at
            x, seen, dz = inputs[ahead], seens[ahead], grads[ahead]
            if SILU:
                z = _sum(x, past, taps, bias, seen, K, DOCUMENTS)
                gate = 1.0 / (1.0 + tl.exp(-z))
                inside = (t >= 0) & (t < tokens) & (at >= 0)
                dz = tl.where(inside[:, None], dz * gate * (1.0 + z * (1.0 - gate)), 0.0)
            mine = dz if at < LENGTH else zero
            dbias += mine
            dtaps_new = (dtaps[0] + mine * x,)
            dxs = (dz * taps[0],)
            for lag in tl.static_range(1, K):
                old = _visible(past[lag - 1], seen, lag, DOCUMENTS)
                dtaps_new = dtaps_new + (dtaps[lag] + mine * old,)
                dxs = dxs + (pending[lag - 1] + _visible(dz * taps[lag], seen, lag, DOCUMENTS),)
            dtaps = dtaps_new

            done, done_at = t - PAST, at - PAST
            dx = dxs[PAST]
            out = dx_ptr + (done.to(tl.int64) * width)[:, None] + c[None, :]
            owned = (done >= 0) & (done < tokens) & (done_at >= 0) & (done_at < LENGTH)
            tl.store(out, dx.to(dx_0.dtype.element_ty), mask=owned[:, None] & keep)
            if STATE:
                before = (done < 0) & (done >= -PAST) & (at >= 0)
                out = dstate_ptr + ((done + PAST) * width)[:, None] + c[None, :]
                tl.store(out, dx.to(dstate_0.dtype.element_ty), mask=before[:, None] & keep)
            if PAST > 0:
                past, pending = (x,) + past[: PAST - 1], dxs[:PAST]

    part = tl.program_id(1).to(tl.int64) * partial_stride
    dweight = _stream(dweight_0, dweight_1, dweight_2, which) + part
    for lag in tl.static_range(K):
        total = tl.sum(dtaps[lag], axis=0)
        tl.store(dweight + c * K + (K - 1 - lag), total, mask=in_width)
    if BIAS:
        total = tl.sum(dbias, axis=0)
        tl.store(_stream(dbias_0, dbias_1, dbias_2, which) + part + c, total, mask=in_width)


def _sizes(
    xs: Sequence[Tensor], others: Sequence[Tensor], size: int, silu: bool, shape: tuple[int, ...]
) -> dict[str, Any]:
    """What a kernel is compiled for; ``shape`` is that of its walk."""
    each, steps, unroll = shape
    widths = [x.shape[2] for x in xs]
    even = all(width % _BLOCK == 0 for width in widths)
    aligned = even and all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
        for x in (*xs, *others)
    )
    widths += [0] * (3 - len(widths))
    return {
        **{f"channels_{i}": width for i, width in enumerate(widths)},
        "K": size, "SILU": silu, "EVEN": even, "ALIGN": 8 if aligned else 1,
        "SEGMENTS": _WARPS * 32 * each // _BLOCK, "STEPS": steps, "UNROLL": unroll,
        "BLOCK": _BLOCK, "num_warps": _WARPS,
    }  # fmt: skip


def _grid(xs: Sequence[Tensor], length: int, segments: int) -> tuple[int, int]:
    batch, tokens = xs[0].shape[:2]
    blocks = sum(triton.cdiv(x.shape[2], _BLOCK) for x in xs)
    return blocks, batch * triton.cdiv(tokens, segments * length)


def _three(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As the kernels take them: the first again where there is none, which no program reads."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _strides(tensors: Sequence[Tensor]) -> list[int]:
    three = _three(tensors)
    return [x.stride(dim) for dim in (0, 1) for x in three if x is not None]


def launch_forward(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    seen: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    """The outputs (B, T, C) of one to three inputs of any widths.

    :param xs: (B, T, C), the last dimension contiguous.
    :param weights: (C, 1, K), contiguous. Biases (C,) and states (B, K - 1, C) likewise, or None.
    :param seen: (T,) int32: how many earlier tokens each token sees, if not all of its row.
    """
    size = weights[0].shape[2]
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    sizes = _sizes(xs, ys, size, silu, _FORWARD)
    launch(_forward, _grid(xs, _FORWARD[1] - size + 1, sizes["SEGMENTS"]))(
        *_three(xs), *_three(weights), *_three(biases), *_three(states), *_three(ys), seen,
        xs[0].shape[1], *_strides(xs), **sizes, BIAS=biases[0] is not None,
        STATE=states[0] is not None, DOCUMENTS=seen is not None,
    )  # fmt: skip
    return ys


def launch_backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    seen: Tensor | None,
    silu: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The gradients of inputs, weights, biases and states."""
    size = weights[0].shape[2]
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    dstates = [None if s is None else torch.zeros_like(s) for s in states]
    sizes = _sizes(xs, [*dys, *dxs], size, silu, _BACKWARD)
    grid = _grid(xs, _BACKWARD[1] - 2 * (size - 1), sizes["SEGMENTS"])
    widths = [x.shape[2] for x in xs]
    counts = [w * size for w in widths] + (widths if biases[0] is not None else [])
    parts = torch.empty(grid[1], sum(counts), dtype=torch.float32, device=xs[0].device)
    pieces = list(parts.split(counts, 1))
    dweights, dbiases = pieces[: len(xs)], pieces[len(xs) :] or [None]
    launch(_backward, grid)(
        *_three(dys), *_three(xs), *_three(weights), *_three(biases), *_three(states),
        *_three(dxs), *_three(dstates), *_three(dweights), *_three(dbiases), seen,
        xs[0].shape[1], parts.stride(0), *_strides(dys), *_strides(xs), **sizes,
        BIAS=biases[0] is not None, STATE=states[0] is not None, DOCUMENTS=seen is not None,
    )  # fmt: skip
    total = parts.sum(0).split(counts)
    new_weights = [
        x.view(w.shape).to(w.dtype, copy=True) for x, w in zip(total, weights, strict=False)
    ]
    new_biases = [
        None if b is None else x.to(b.dtype, copy=True)
        for x, b in zip(total[len(xs) :] or [None] * len(xs), biases, strict=True)
    ]
    return dxs, new_weights, new_biases, dstates
