"""Gates in Triton: step sizes and decays, a gated RMS norm, and a sigmoid gate.

Everything is computed in float32 and rounded once. What backward needs beyond its inputs is made
again from them. Parameters' gradients are a row of sums for each program, added up afterwards, so
that they have the same bits each run.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch
from olmo_core.nn.attention.kernels.triton_driver import multiprocessors
from olmo_core.nn.attention.kernels.triton_math import sigmoid, softplus

_TILE = 2048  # elements of a program's tile, of which each thread of four warps has 16
_PROGRAMS_PER_SM = 8


# a and b are slices of one product, which may begin anywhere: where, compiles nothing anew.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["a_ptr", "b_ptr"])
def _decay_forward(
    a_ptr, b_ptr, rate_ptr, shift_ptr, padding_ptr, g_ptr, beta_ptr, tokens, a_stride, b_stride,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, HEADS_PAD)
    live, real = (t < tokens), (h < HEADS)
    keep = live[:, None] & real[None, :]
    at = t.to(tl.int64)
    a = tl.load(a_ptr + (at * a_stride)[:, None] + h[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + (at * b_stride)[:, None] + h[None, :], mask=keep, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(rate_ptr + h, mask=real, other=0.0).to(tl.float32))
    shift = tl.load(shift_ptr + h, mask=real, other=0.0).to(tl.float32)
    beta = sigmoid(b)
    if DOUBLE:
        beta *= 2.0
    if padding_ptr is not None:
        padded = tl.load(padding_ptr + t, mask=live, other=0) != 0
        beta = tl.where(padded[:, None], 0.0, beta)
    out = (at * HEADS)[:, None] + h[None, :]
    tl.store(g_ptr + out, -rate[None, :] * softplus(a + shift[None, :]), mask=keep)
    tl.store(beta_ptr + out, beta, mask=keep)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["a_ptr", "b_ptr"])
def _decay_backward(
    dg_ptr, dbeta_ptr, a_ptr, b_ptr, rate_ptr, shift_ptr, padding_ptr, da_ptr, db_ptr, parts_ptr,
    tokens, a_stride, b_stride,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, HEADS_PAD)
    live, real = (t < tokens), (h < HEADS)
    keep = live[:, None] & real[None, :]
    at = t.to(tl.int64)
    a = tl.load(a_ptr + (at * a_stride)[:, None] + h[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + (at * b_stride)[:, None] + h[None, :], mask=keep, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(rate_ptr + h, mask=real, other=0.0).to(tl.float32))
    shift = tl.load(shift_ptr + h, mask=real, other=0.0).to(tl.float32)
    out = (at * HEADS)[:, None] + h[None, :]
    dg = tl.load(dg_ptr + out, mask=keep, other=0.0) * -rate[None, :]
    dbeta = tl.load(dbeta_ptr + out, mask=keep, other=0.0)
    if DOUBLE:
        dbeta *= 2.0
    if padding_ptr is not None:
        padded = tl.load(padding_ptr + t, mask=live, other=0) != 0
        dbeta = tl.where(padded[:, None], 0.0, dbeta)
    a += shift[None, :]
    da = dg * sigmoid(a)
    beta = sigmoid(b)
    db = dbeta * beta * (1.0 - beta)
    tl.store(da_ptr + out, da.to(da_ptr.dtype.element_ty), mask=keep)
    tl.store(db_ptr + out, db.to(db_ptr.dtype.element_ty), mask=keep)
    drate = tl.where(keep, dg * softplus(a), 0.0)
    part = parts_ptr + tl.program_id(0) * (2 * HEADS) + h
    tl.store(part, tl.sum(drate, axis=0), mask=real)
    tl.store(part + HEADS, tl.sum(tl.where(keep, da, 0.0), axis=0), mask=real)


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x_ptr, gate_ptr, weight_ptr, out_ptr, rows, eps,
    WIDTH: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, PAD)
    keep = (r < rows)[:, None] & (c < WIDTH)[None, :]
    at = (r * WIDTH)[:, None] + c[None, :]
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=keep, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    out = x * scale[:, None] * weight[None, :] * (gate * sigmoid(gate))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _norm_backward(
    dout_ptr, x_ptr, gate_ptr, weight_ptr, dx_ptr, dgate_ptr, parts_ptr, rows, tiles, eps,
    WIDTH: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, PAD)
    real = c < WIDTH
    weight = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, PAD), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        r = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        keep = (r < rows)[:, None] & real[None, :]
        at = (r * WIDTH)[:, None] + c[None, :]
        x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=keep, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=keep, other=0.0).to(tl.float32)
        scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps))[:, None]
        open_ = sigmoid(gate)
        normal = x * scale
        dgate = dout * normal * weight * open_ * (1.0 + gate * (1.0 - open_))
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=keep)
        dout *= gate * open_
        dweight += dout * normal
        dout *= weight
        dx = scale * (dout - normal * (tl.sum(dout * normal, axis=1) / WIDTH)[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    tl.store(parts_ptr + tl.program_id(0) * WIDTH + c, tl.sum(dweight, axis=0), mask=real)


@triton.jit
def _open(gate_ptr, at, r, rows, keep, ROUND: tl.constexpr, HEADWISE: tl.constexpr):
    """How far each gate is open (rows, columns or 1), rounded as torch's own sigmoid would."""
    if HEADWISE:
        gate = tl.load(gate_ptr + r, mask=r < rows, other=0.0)[:, None]
    else:
        gate = tl.load(gate_ptr + at, mask=keep, other=0.0)
    low = gate_ptr.dtype.element_ty
    open_ = sigmoid(gate.to(tl.float32))
    return open_.to(low).to(tl.float32) if ROUND else open_


@triton.jit(do_not_specialize=["rows"])
def _sigmoid_forward(
    x_ptr, gate_ptr, out_ptr, rows,
    WIDTH: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr,
    HEADWISE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, PAD)
    keep = (r < rows)[:, None] & (c < WIDTH)[None, :]
    at = (r * WIDTH)[:, None] + c[None, :]
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    out = x * _open(gate_ptr, at, r, rows, keep, ROUND, HEADWISE)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def _sigmoid_backward(
    dout_ptr, x_ptr, gate_ptr, dx_ptr, dgate_ptr, rows,
    WIDTH: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr,
    HEADWISE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, PAD)
    keep = (r < rows)[:, None] & (c < WIDTH)[None, :]
    at = (r * WIDTH)[:, None] + c[None, :]
    dout = tl.load(dout_ptr + at, mask=keep, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    open_ = _open(gate_ptr, at, r, rows, keep, ROUND, HEADWISE)
    tl.store(dx_ptr + at, (dout * open_).to(dx_ptr.dtype.element_ty), mask=keep)
    dopen = dout * x
    low = dgate_ptr.dtype.element_ty
    if HEADWISE:
        total = tl.sum(dopen, axis=1)[:, None] * open_ * (1.0 - open_)
        tl.store(dgate_ptr + r[:, None], total.to(low), mask=(r < rows)[:, None])
    else:
        tl.store(dgate_ptr + at, (dopen * open_ * (1.0 - open_)).to(low), mask=keep)


def _tile(width: int) -> dict[str, int]:
    pad = triton.next_power_of_2(width)
    rows = max(1, _TILE // pad)
    return {"WIDTH": width, "PAD": pad, "ROWS": rows, "num_warps": max(4, min(16, pad // 512))}


def decay_forward(
    a: Tensor, b: Tensor, rate: Tensor, shift: Tensor, padding: Tensor | None, double: bool
) -> tuple[Tensor, Tensor]:
    """g and beta (B, T, H) float32, from a and b (B, T, H) whose rows (B * T) have one stride."""
    g, beta = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(2))
    sizes, programs = _decay_sizes(a, double)
    launch(_decay_forward, (programs,))(
        a, b, rate, shift, padding, g, beta, a.shape[0] * a.shape[1], a.stride(1), b.stride(1),
        **sizes,
    )  # fmt: skip
    return g, beta


def decay_backward(
    dg: Tensor, dbeta: Tensor, a: Tensor, b: Tensor, rate: Tensor, shift: Tensor,
    padding: Tensor | None, double: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of a, b, rate and shift."""
    da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    sizes, programs = _decay_sizes(a, double)
    parts = torch.empty(programs, 2, a.shape[2], dtype=torch.float32, device=a.device)
    launch(_decay_backward, (programs,))(
        dg, dbeta, a, b, rate, shift, padding, da, db, parts, a.shape[0] * a.shape[1],
        a.stride(1), b.stride(1), **sizes,
    )  # fmt: skip
    drate, dshift = parts.sum(0).unbind(0)
    return da, db, drate.to(rate.dtype, copy=True), dshift.to(shift.dtype, copy=True)


def _decay_sizes(a: Tensor, double: bool) -> tuple[dict[str, int | bool], int]:
    pad = triton.next_power_of_2(a.shape[2])
    rows = max(1, _TILE // pad)
    sizes = {"HEADS": a.shape[2], "HEADS_PAD": pad, "ROWS": rows, "DOUBLE": double, "num_warps": 4}
    return sizes, triton.cdiv(a.shape[0] * a.shape[1], rows)


def norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * weight * silu(gate) over the last dimension, in gate's dtype."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    rows, sizes = x.numel() // x.shape[-1], _tile(x.shape[-1])
    grid = (triton.cdiv(rows, sizes["ROWS"]),)
    launch(_norm_forward, grid)(x, gate, weight, out, rows, eps, **sizes)
    return out


def norm_backward(
    dout: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight."""
    dx, dgate = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, gate))
    rows, sizes = x.numel() // x.shape[-1], _tile(x.shape[-1])
    tiles = triton.cdiv(rows, sizes["ROWS"])
    programs = min(tiles, multiprocessors(x.device) * _PROGRAMS_PER_SM)
    parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    launch(_norm_backward, (programs,))(
        dout, x, gate, weight, dx, dgate, parts, rows, tiles, eps, **sizes
    )  # fmt: skip
    return dx, dgate, parts.sum(0).to(weight.dtype)


def sigmoid_forward(x: Tensor, gate: Tensor, rounded: bool) -> Tensor:
    """x * sigmoid(gate), for x (..., D) and gate alike or (..., 1); all contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, sizes = x.numel() // x.shape[-1], _tile(x.shape[-1])
    grid = (triton.cdiv(rows, sizes["ROWS"]),)
    launch(_sigmoid_forward, grid)(
        x, gate, out, rows, **sizes, ROUND=rounded, HEADWISE=gate.shape != x.shape
    )
    return out


def sigmoid_backward(dout: Tensor, x: Tensor, gate: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and gate."""
    dx, dgate = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, gate))
    rows, sizes = x.numel() // x.shape[-1], _tile(x.shape[-1])
    grid = (triton.cdiv(rows, sizes["ROWS"]),)
    launch(_sigmoid_backward, grid)(
        dout, x, gate, dx, dgate, rows, **sizes, ROUND=rounded, HEADWISE=gate.shape != x.shape
    )
    return dx, dgate
