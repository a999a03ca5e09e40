"""FlashAttention-2: the ``flash-attn`` package, or torch's own copy where that is not installed.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.softmax import torch_ops
from olmo_core.nn.attention.kernels.softmax.library_args import (
    batched,
    empty_backward,
    empty_forward,
    flat,
    flat_lse,
    is_empty,
    may_have_empty_rows,
    window_offsets,
)
from olmo_core.nn.attention.kernels.softmax.protocol import (
    HOPPER,
    NEWEST_GPU,
    Capabilities,
)
from olmo_core.nn.attention.segments import Segments


@lru_cache(maxsize=1)
def library() -> ModuleType | None:
    """``flash_attn.flash_attn_interface``, or None where it is absent or does not load."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError:  # not installed, built for another torch, or only flash_attn.cute is there
        return None
    return flash_attn_interface


def _library_for(q: Tensor) -> ModuleType | None:
    """The package if it serves tensors like ``q``. torch's copy pads odd head_dims, and has all."""
    if library() is None or q.shape[-1] % 8 or not _is_built_for(q.dtype, q.shape[-1], q.device):
        return None
    return library()


@lru_cache(maxsize=64)
def _is_built_for(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether the package has the kernels of a dtype and head_dim: compared once with torch's copy.

    A build that leaves some out may run others in their place, silently: one for bf16 alone read
    float16 as bf16.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, 64, 1, head_dim)
    q, k, v = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    want, _, _ = torch_ops.cuda_flash_forward(q, k, v, Segments.dense(64, 64), scale=0.1)
    lib = library()
    assert lib is not None
    try:
        got, *_ = _forward(lib, q, k, v, Segments.dense(64, 64), 0.1, 0.0)
    except RuntimeError:  # the build refuses them
        return False
    return bool((got.float() - want.float()).norm() < 0.05 * want.float().norm())


def _forward(
    lib: ModuleType, q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
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
    return *batched(s, q, out, lse), rng


class Flash2Kernel:
    """See :class:`Kernel`."""

    name = "flash_2"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if is_empty(q, k):
            return *empty_forward(q, s), torch_ops.no_rng(q)
        lib = _library_for(q)
        if lib is None:
            return torch_ops.cuda_flash_forward(q, k, v, s, scale=scale, dropout_p=dropout_p)
        out, lse, rng = _forward(lib, q, k, v, s, scale, dropout_p)
        if may_have_empty_rows(s):
            lse = torch.where(lse == math.inf, -math.inf, lse)
        return out, lse.contiguous(), rng if dropout_p else torch_ops.no_rng(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
        s: Segments, *, scale: float, dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if is_empty(q, k):
            return empty_backward(q, k, v)
        lib = _library_for(q)
        if lib is None:
            return torch_ops.cuda_flash_backward(
                dout, q, k, v, out, lse, rng, s, scale=scale, dropout_p=dropout_p
            )
        if may_have_empty_rows(s):
            lse = torch.where(lse == -math.inf, math.inf, lse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        left, right = window_offsets(s, -1)
        options = {
            "dropout_p": dropout_p, "softmax_scale": scale, "causal": s.causal,
            "window_size_left": left, "window_size_right": right, "softcap": 0.0,
            "alibi_slopes": None, "deterministic": torch.are_deterministic_algorithms_enabled(),
            "rng_state": rng if dropout_p else None,
        }  # fmt: skip
        saved = (*flat(s, dout, q, k, v, out), flat_lse(s, lse))
        grads = flat(s, dq, dk, dv)
        if s.cu_q is None:
            lib._flash_attn_backward(*saved, *grads, **options)
        else:
            lib._flash_attn_varlen_backward(
                *saved, *grads, s.cu_q, s.cu_k, s.max_q, s.max_k, **options
            )
        return dq, dk, dv


CAPABILITIES = Capabilities(
    name="flash_2",
    title="FlashAttention-2 (flash-attn, or torch's own copy)",
    install="pip install flash-attn --no-build-isolation",
    compute_capability=((8, 0), NEWEST_GPU),
    max_head_dim=256,
    measured={HOPPER: {"full": 6.192, "window": 1.971, "documents": 1.244}},
)

KERNEL = Flash2Kernel()
