"""FlashAttention-4: the CuTe kernels of ``flash-attn-4``.

Forward runs from Ampere on, backward from Hopper on. The first call of each combination of
head_dim, dtype, mask and layout compiles for some seconds.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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
    NEWEST_GPU,
    Capabilities,
    Feature,
)
from olmo_core.nn.attention.kernels.softmax.torch_ops import no_rng
from olmo_core.nn.attention.segments import Segments


@lru_cache(maxsize=1)
def library() -> Any:
    """``flash_attn.cute.interface``.

    :raises ImportError: If it can't be imported.
    """
    from flash_attn.cute import interface

    # Each compilation warns about an argument that the library itself leaves out.
    warnings.filterwarnings("ignore", message="Argument aux_data ", category=UserWarning)
    return interface


class Flash4Kernel:
    """See :class:`Kernel`. No dropout."""

    name = "flash_4"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not dropout_p
        if is_empty(q, k):
            return *empty_forward(q, s), no_rng(q)
        # More values follow out and lse in newer versions.
        out, lse, *_ = library()._flash_attn_fwd(
            *flat(s, q, k, v), softmax_scale=scale, return_lse=True, **_mask(s)
        )
        out, lse = batched(s, q, out, lse)
        return out, lse.contiguous(), no_rng(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
        s: Segments, *, scale: float, dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if is_empty(q, k):
            return empty_backward(q, k, v)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        grads = dict(zip(("dq", "dk", "dv"), flat(s, dq, dk, dv), strict=True))
        library()._flash_attn_bwd(
            *flat(s, q, k, v, out, dout), flat_lse(s, lse), **grads, softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_mask(s),
        )  # fmt: skip
        return dq, dk, dv


def _mask(s: Segments) -> dict[str, Any]:
    """Here None is unlimited, and a window already says that it is causal."""
    left, right = window_offsets(s, None)
    mask: dict[str, Any] = {
        "causal": s.causal and left is None,
        "window_size_left": left,
        "window_size_right": right,
    }
    if s.cu_q is not None:
        mask.update(
            cu_seqlens_q=s.cu_q, cu_seqlens_k=s.cu_k, max_seqlen_q=s.max_q, max_seqlen_k=s.max_k
        )
    return mask


CAPABILITIES = Capabilities(
    name="flash_4",
    title="FlashAttention-4 (CuTe)",
    packages=("flash_attn.cute",),
    install="pip install --pre flash-attn-4",
    compute_capability=(HOPPER, NEWEST_GPU),
    max_head_dim=128,
    head_dim_multiple=8,
    missing={Feature.dropout: "its kernels have no dropout"},
    measured={HOPPER: {"full": 3.372, "window": 1.126, "documents": 0.845}},
)

KERNEL = Flash4Kernel()
