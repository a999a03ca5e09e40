"""One token of the gated delta rule in Triton: the state is read and written once.

A program has a block of values of one value head. There is no matrix product, so that this runs on
any GPU.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_core.nn.attention.kernels.launch import launch
from olmo_core.nn.attention.kernels.triton_math import sigmoid, softplus

from .chunks import QK_NORM_EPS

_BLOCK_V = 32  # 128 bytes of float32
_WARPS = 4


# What is loaded one by one compiles nothing anew, wherever it lies.
@triton.jit(
    do_not_specialize=["g_stride_b", "g_stride_h", "beta_stride_b", "beta_stride_h"],
    do_not_specialize_on_alignment=["g_ptr", "beta_ptr"],
)
def _step(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, rate_ptr, shift_ptr, padding_ptr, state_ptr, out_ptr,
    update_ptr, scale, eps,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    g_stride_b, g_stride_h, beta_stride_b, beta_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    V: tl.constexpr, BLOCK_V: tl.constexpr, NORMALIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """With a ``rate``, ``g`` and ``beta`` are what :func:`.decay_gates` makes them of."""
    block, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // HEADS).to(tl.int64), row % HEADS
    rows, columns = tl.arange(0, K_PAD), block * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = rows < K, columns < V
    at = row.to(tl.int64) * (K * V) + rows[:, None] * V + columns[None, :]
    keep = in_k[:, None] & in_v[None, :]
    state = tl.load(state_ptr + at, mask=keep, other=0.0)
    q_at = q_ptr + b * q_stride_b + (h // GROUP) * q_stride_h + rows
    k_at = k_ptr + b * k_stride_b + (h // GROUP) * k_stride_h + rows
    q = tl.load(q_at, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(k_at, mask=in_k, other=0.0).to(tl.float32)
    v_at = v_ptr + b * v_stride_b + h * v_stride_h + columns
    v = tl.load(v_at, mask=in_v, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + b * g_stride_b + h * g_stride_h).to(tl.float32)
    beta = tl.load(beta_ptr + b * beta_stride_b + h * beta_stride_h).to(tl.float32)
    if rate_ptr is not None:
        rate = tl.exp(tl.load(rate_ptr + h).to(tl.float32))
        g = -rate * softplus(g + tl.load(shift_ptr + h).to(tl.float32))
        beta = sigmoid(beta)
        if DOUBLE:
            beta *= 2.0
    if padding_ptr is not None:
        beta = tl.where(tl.load(padding_ptr + b) != 0, 0.0, beta)
    decay = tl.exp(g)
    if NORMALIZE:
        q *= 1.0 / tl.sqrt(tl.sum(q * q, axis=0) + eps)
        k *= 1.0 / tl.sqrt(tl.sum(k * k, axis=0) + eps)

    state *= decay
    update = beta * (v - tl.sum(k[:, None] * state, axis=0))
    state += k[:, None] * update[None, :]
    tl.store(state_ptr + at, state, mask=keep)
    out = tl.sum(q[:, None] * state, axis=0) * scale
    at = row.to(tl.int64) * V + columns
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=in_v)
    if update_ptr is not None:
        tl.store(update_ptr + at, update, mask=in_v)


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float,
    normalize_qk: bool, gates: tuple[Tensor, Tensor, Tensor | None, bool] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output and the update (B, HV, V); advances ``state`` (B, HV, K, V), float32.

    :param gates: ``A_log`` and ``dt_bias`` (HV,), rows of padding (B,) or None, and whether beta is
        doubled: then ``g`` and ``beta`` are a and b of :func:`.decay_gates`, and no update is
        returned.
    """
    batch, heads, K, V = state.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    update = None if gates else torch.empty(v.shape, dtype=torch.float32, device=v.device)
    rate, shift, padding, double = gates or (None, None, None, False)
    launch(_step, (triton.cdiv(V, _BLOCK_V), batch * heads))(
        q, k, v, g, beta, rate, shift, padding, state, out, update, scale, QK_NORM_EPS,
        *(stride for x in (q, k, v, g, beta) for stride in x.stride()[:2]),
        HEADS=heads, GROUP=heads // q.shape[1], K=K, K_PAD=triton.next_power_of_2(K), V=V,
        BLOCK_V=_BLOCK_V, NORMALIZE=normalize_qk, DOUBLE=double, num_warps=_WARPS,
    )  # fmt: skip
    return out, update
