"""FlashAttention-2: the ``flash-attn`` package, or torch's own copy where that is not installed.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels import torch_ops
from olmo_core.nn.attention.kernels.library_args import (
    batched,
    empty_backward,
    empty_forward,
    flat,
    is_empty,
    window_offsets,
)
from olmo_core.nn.attention.segments import Segments

__all__ = ["KERNEL", "Flash2Kernel"]


@lru_cache(maxsize=1)
def library() -> ModuleType | None:
    """``flash_attn.flash_attn_interface``, or None where it is absent or does not load."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError:  # not installed, built for another torch, or only flash_attn.cute is there
        return None
    return flash_attn_interface


class Flash2Kernel:
    """See :class:`Kernel`."""

    name = "flash_2"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Kernel.forward`."""
        if is_empty(q, k):
            return *empty_forward(q), torch_ops.no_rng(q)
        lib = library()
        if lib is None or q.shape[-1] % 8:  # torch_ops pads odd head_dims
            return torch_ops.cuda_flash_forward(q, k, v, s, scale=scale, dropout_p=dropout_p)
        left, right = window_offsets(s, -1)
        options = {
            "dropout_p": dropout_p, "softmax_scale": scale, "causal": s.causal,
            "window_size_left": left, "window_size_right": right, "softcap": 0.0,
            "alibi_slopes": None, "return_softmax": False,
        }  # fmt: skip
        if s.cu_q is None:
            out, lse, _, rng = lib._flash_attn_forward(q, k, v, **options)
        else:
            out, lse, _, rng = lib._flash_attn_varlen_forward(
                *flat(s, q, k, v), s.cu_q, s.cu_k, s.max_q, s.max_k, **options
            )
        out, lse = batched(s, out, lse)
        if _may_have_empty_rows(s):
            lse = torch.where(lse == math.inf, -math.inf, lse)
        return out, lse.contiguous(), rng if dropout_p else torch_ops.no_rng(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
        s: Segments, *, scale: float, dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See :meth:`Kernel.backward`."""
        if is_empty(q, k):
            return empty_backward(q, k, v)
        lib = library()
        if lib is None or q.shape[-1] % 8:
            return torch_ops.cuda_flash_backward(
                dout, q, k, v, out, lse, rng, s, scale=scale, dropout_p=dropout_p
            )
        if _may_have_empty_rows(s):
            lse = torch.where(lse == -math.inf, math.inf, lse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        left, right = window_offsets(s, -1)
        options = {
            "dropout_p": dropout_p, "softmax_scale": scale, "causal": s.causal,
            "window_size_left": left, "window_size_right": right, "softcap": 0.0,
            "alibi_slopes": None, "deterministic": torch.are_deterministic_algorithms_enabled(),
            "rng_state": rng if dropout_p else None,
        }  # fmt: skip
        saved = flat(s, dout, q, k, v, out, lse)
        grads = flat(s, dq, dk, dv)
        if s.cu_q is None:
            lib._flash_attn_backward(*saved, *grads, **options)
        else:
            lib._flash_attn_varlen_backward(
                *saved, *grads, s.cu_q, s.cu_k, s.max_q, s.max_k, **options
            )
        return dq, dk, dv


def _may_have_empty_rows(s: Segments) -> bool:
    """FlashAttention-2 marks a query without keys by +inf. Self-attention has none of those."""
    return s.cu_q is not s.cu_k or s.max_q != s.max_k


KERNEL = Flash2Kernel()
