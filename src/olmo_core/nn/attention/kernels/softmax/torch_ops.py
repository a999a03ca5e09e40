"""torch's private attention ops, wrapped once: their signatures drift between versions.

Everything here takes ``(b, t, h, d)`` tensors and gives the log-sum-exp as a contiguous
``(b, h, t)`` float32 (float64) tensor. Windows count keys, the query's own included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.softmax.library_args import flat, flat_lse, may_have_empty_rows
from olmo_core.nn.attention.segments import Segments

_aten = torch.ops.aten


def no_rng(like: Tensor) -> Tensor:
    """The rng state of a call without dropout."""
    return torch.empty(0, dtype=torch.int64, device=like.device)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def cpu_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The CPU's flash attention. Causal is top-left; ``mask`` is additive and of q's dtype.

    Empty inputs end the process with SIGFPE, and it reads beyond keys of another batch size, so
    callers must not pass any such.
    """
    assert q.numel() and k.numel() and q.shape[0] == k.shape[0] == v.shape[0]
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_heads_first, (q, k, v)), 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return _heads_first(out), lse


def cpu_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`cpu_flash_forward`."""
    assert q.numel() and k.numel() and q.shape[0] == k.shape[0] == v.shape[0]
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_heads_first, (dout, q, k, v, out)),
        lse.contiguous(),  # a permuted view is read as if it were contiguous
        0.0,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    dq, dk, dv = map(_heads_first, grads)
    return dq, dk, dv


def _flash_args(s: Segments) -> tuple[bool, dict[str, int | None]]:
    """Whether flash attention is told that it is causal, and its window as inclusive offsets."""
    window = s.effective_window
    if window < 0:
        return s.causal, {"window_size_left": None, "window_size_right": None}
    return True, {"window_size_left": window - 1, "window_size_right": 0}


def _pad_head_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """FlashAttention-2 wants a head_dim that is a multiple of 8."""
    pad = -tensors[0].shape[-1] % 8
    return tuple(torch.nn.functional.pad(x, (0, pad)) if pad else x for x in tensors)


def cuda_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2 as torch ships it: GQA, documents, windows. Causal is bottom-right."""
    head_dim = q.shape[-1]
    shape = q.shape
    q, k, v = _pad_head_dim(*flat(s, q, k, v))
    causal, window = _flash_args(s)
    out, lse, rng, _, _ = _aten._flash_attention_forward(
        q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, dropout_p, causal, False, scale=scale, **window
    )
    out = out[..., :head_dim].contiguous().view(shape)
    lse = _empty_rows(lse if s.cu_q is None else lse[None], s, math.inf, -math.inf)
    return out, lse, rng.view(torch.int64) if dropout_p else no_rng(q)


def cuda_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    s: Segments,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`cuda_flash_forward`; ``(out, lse)`` may be global."""
    head_dim = q.shape[-1]
    shapes = [x.shape for x in (q, k, v)]
    dout, q, k, v, out = _pad_head_dim(*flat(s, dout.contiguous(), q, k, v, out))
    causal, window = _flash_args(s)
    lse = flat_lse(s, _empty_rows(lse, s, -math.inf, math.inf))
    if dropout_p:
        seed, unused = rng.view(torch.uint64), rng.new_empty(0).view(torch.uint64)
    else:
        seed, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 1))
    grads = _aten._flash_attention_backward(
        dout, q, k, v, out, lse, s.cu_q, s.cu_k, s.max_q, s.max_k, dropout_p, causal, seed, unused,
        scale=scale, **window,
    )  # fmt: skip
    dq, dk, dv = (
        x[..., :head_dim].contiguous().view(shape) for x, shape in zip(grads, shapes, strict=True)
    )
    return dq, dk, dv


def _empty_rows(lse: Tensor, s: Segments, was: float, becomes: float) -> Tensor:
    """FlashAttention-2 marks a query without keys by +inf."""
    return torch.where(lse == was, becomes, lse) if may_have_empty_rows(s) else lse


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """cuDNN's attention of dense, square problems: the fastest such kernel in torch on Hopper."""
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *map(_heads_first, (q, k, v)), None, True, 0.0, is_causal, False, scale=scale
    )
    return _heads_first(out).contiguous(), lse.squeeze(-1).contiguous()


def cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`cudnn_forward`."""
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    n_q, n_k = q.shape[1], k.shape[1]
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        *map(_heads_first, (dout, q, k, v, out)), lse.unsqueeze(-1), unused, unused,
        None, None, None, n_q, n_k, 0.0, is_causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = map(_heads_first, grads)
    return dq, dk, dv
