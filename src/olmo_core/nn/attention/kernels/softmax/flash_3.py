"""FlashAttention-3, for Hopper: ``hopper/`` of the flash-attention repository, or a wheel of it.

Some wheels are built without the backward. Backward needs nothing of forward but ``(out, lse)``, so
FlashAttention-2's, which torch brings, then takes its place: the same mathematics, slower.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
2024.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
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
    window_offsets,
)
from olmo_core.nn.attention.kernels.softmax.protocol import (
    HOPPER,
    Capabilities,
    Feature,
)
from olmo_core.nn.attention.segments import Segments


@lru_cache(maxsize=1)
def library() -> ModuleType:
    """The module that wraps the kernels: inside the package, or beside it in older builds.

    :raises ImportError: If neither can be imported.
    """
    try:
        return import_module("flash_attn_3.flash_attn_interface")
    except ImportError:
        return import_module("flash_attn_interface")


@lru_cache(maxsize=1)
def has_backward() -> bool:
    """Whether this build has a backward of its own."""
    library()
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        return False
    for name in ("flash_attn_3.flash_attn_config", "flash_attn_config"):
        try:
            flags = import_module(name).CONFIG["build_flags"]
        except (ImportError, AttributeError, KeyError):
            continue
        return not flags.get("FLASHATTENTION_DISABLE_BACKWARD", False)
    return True


class Flash3Kernel:
    """See :class:`Kernel`. No dropout."""

    name = "flash_3"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not dropout_p
        if is_empty(q, k):
            return *empty_forward(q, s), torch_ops.no_rng(q)
        left, right = window_offsets(s, -1)
        out, lse, *_ = library()._flash_attn_forward(
            *flat(s, q, k, v), softmax_scale=scale, causal=s.causal, window_size_left=left,
            window_size_right=right, **_lengths(s),
        )  # fmt: skip
        out, lse = batched(s, q, out, lse)
        return out, lse.contiguous(), torch_ops.no_rng(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
        s: Segments, *, scale: float, dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if is_empty(q, k):
            return empty_backward(q, k, v)
        if not has_backward():
            return torch_ops.cuda_flash_backward(dout, q, k, v, out, lse, rng, s, scale=scale)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        left, right = window_offsets(s, -1)
        grads = dict(zip(("dq", "dk", "dv"), flat(s, dq, dk, dv), strict=True))
        library()._flash_attn_backward(
            *flat(s, dout, q, k, v, out), flat_lse(s, lse), **grads, softmax_scale=scale,
            is_causal=s.causal, window_size_left=left, window_size_right=right,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_lengths(s),
        )  # fmt: skip
        return dq, dk, dv


def _lengths(s: Segments) -> dict[str, Tensor | int | None]:
    if s.cu_q is None:
        return {}
    return {
        "cu_seqlens_q": s.cu_q,
        "cu_seqlens_k": s.cu_k,
        "max_seqlen_q": s.max_q,
        "max_seqlen_k": s.max_k,
    }


CAPABILITIES = Capabilities(
    name="flash_3",
    title="FlashAttention-3",
    packages=("flash_attn_3", "flash_attn_interface"),
    install="build hopper/ of flash-attention, or pip install tokenspeed-fa3",
    compute_capability=(HOPPER, HOPPER),
    max_head_dim=256,
    head_dim_multiple=8,
    missing={Feature.dropout: "its kernels have no dropout"},
)

KERNEL = Flash3Kernel()
