"""The torch backend: torch's own fused attention where there is one, block products elsewhere.

CPU: one flash call per segment, written into one output, with a backward that does the same (an
autograd loop would allocate a full-size gradient for every slice). Windows go in blocks of queries
that share one small mask. CUDA in half precision: cuDNN for dense problems, FlashAttention-2 for
documents and windows. Everything else: :mod:`.blockwise`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.softmax import blockwise, short_documents, torch_ops
from olmo_core.nn.attention.kernels.softmax.blocks import Block, blocks
from olmo_core.nn.attention.kernels.softmax.library_args import (
    empty_backward,
    empty_forward,
    is_empty,
)
from olmo_core.nn.attention.kernels.softmax.protocol import (
    HALF,
    HOPPER,
    Capabilities,
)
from olmo_core.nn.attention.segments import Segments

_MAX_FLASH_HEAD_DIM = 256
_MAX_CUDNN_HEAD_DIM = 128


class TorchKernel:
    """See :class:`Kernel`. Head dimensions and devices are unlimited; so are second choices."""

    name = "torch"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if is_empty(q, k):
            return *empty_forward(q, s), torch_ops.no_rng(q)
        form = choose(q, k, s, dropout_p)
        if form == "cudnn":
            out, lse = torch_ops.cudnn_forward(q, k, v, is_causal=s.causal, scale=scale)
            return out, lse, torch_ops.no_rng(q)
        if form == "cuda_flash":
            return torch_ops.cuda_flash_forward(q, k, v, s, scale=scale, dropout_p=dropout_p)
        shape, (q, k, v) = q.shape, _one_row(s, q, k, v)
        if form == "cpu_flash":
            out, lse = _cpu_forward(q, k, v, s, scale)
            rng = torch_ops.no_rng(q)
        else:
            out, lse, rng = blockwise.forward(q, k, v, s, scale=scale, dropout_p=dropout_p)
        return out.view(shape), lse, rng

    def backward(
        self,
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
        if is_empty(q, k):
            return empty_backward(q, k, v)
        form = choose(q, k, s, dropout_p)
        if form == "cudnn":
            return torch_ops.cudnn_backward(
                dout, q, k, v, out, lse, is_causal=s.causal, scale=scale
            )
        if form == "cuda_flash":
            return torch_ops.cuda_flash_backward(
                dout, q, k, v, out, lse, rng, s, scale=scale, dropout_p=dropout_p
            )
        shapes = [x.shape for x in (q, k, v)]
        dout, q, k, v, out = _one_row(s, dout, q, k, v, out)
        if form == "cpu_flash":
            grads = _cpu_backward(dout, q, k, v, out, lse, s, scale)
        else:
            grads = blockwise.backward(
                dout, q, k, v, out, lse, rng, s, scale=scale, dropout_p=dropout_p
            )
        dq, dk, dv = (x.view(shape) for x, shape in zip(grads, shapes, strict=True))
        return dq, dk, dv


def choose(q: Tensor, k: Tensor, s: Segments, dropout_p: float) -> str:
    """The implementation for a problem: a function of what backward knows too."""
    if q.device.type == "cpu":
        return "blockwise" if dropout_p else "cpu_flash"
    if q.device.type != "cuda" or q.dtype not in HALF or q.shape[-1] > _MAX_FLASH_HEAD_DIM:
        return "blockwise"
    square = q.shape[1] == k.shape[1] or not s.causal
    dense = s.cu_q is None and s.effective_window < 0 and square and not dropout_p
    return "cudnn" if dense and _cudnn_fits(q, k) else "cuda_flash"


def _cudnn_fits(q: Tensor, k: Tensor) -> bool:
    """Whether cuDNN is the faster dense kernel here. Its backward is not deterministic, and crashes
    on a single query or key."""
    return (
        min(q.shape[1], k.shape[1]) > 1
        and q.shape[-1] <= _MAX_CUDNN_HEAD_DIM
        and q.shape[-1] % 8 == 0
        and not torch.are_deterministic_algorithms_enabled()
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(q.device) >= HOPPER
    )


def _one_row(s: Segments, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The flattened batch as its only row, where there are lengths."""
    if s.cu_q is None:
        return tensors
    return tuple(x if x.shape[0] == 1 else x.flatten(0, 1)[None] for x in tensors)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _cpu_rows(s: Segments) -> int:
    """Queries that share a mask: small windows waste less with small blocks (measured)."""
    return 64 if 0 < s.window <= 64 else 128


def _whole_documents(s: Segments, n_tokens: int) -> list[int] | None:
    """The lengths of documents that see themselves and all of themselves, or None.

    No two of their blocks share a key, so answers need no room to add up in: they are laid end to
    end.
    """
    if s.cu_q is None or s.cu_q is not s.cu_k or not s.causal or s.effective_window >= 0:
        return None
    cu, _ = s.host_lengths(n_tokens, n_tokens)
    return [b - a for a, b in pairwise(cu) if b > a]


class _Masks:
    """Additive masks by shape: blocks of a window share one."""

    def __init__(self, like: Tensor):
        self.like = like
        self.made: dict[tuple[int, int, int, int], Tensor] = {}

    def __call__(self, block: Block) -> Tensor | None:
        key = None if block.is_square else block.shape_key
        if key is None:
            return None
        if key not in self.made:
            hidden = ~block.mask(self.like.device)
            self.made[key] = self.like.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        return self.made[key]


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    order = short_documents.order(s, q.shape[1])
    if order is not None:
        return short_documents.forward(q, k, v, order, scale)
    lengths = _whole_documents(s, q.shape[1])
    if lengths is not None:
        documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        parts = [
            torch_ops.cpu_flash_forward(*qkv, is_causal=True, mask=None, scale=scale)
            for qkv in documents
        ]
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([x for _, x in parts], dim=-1)
    todo = list(blocks(s, q.shape[1], k.shape[1], rows=_cpu_rows(s), whole_squares=True))
    masks = _Masks(q)
    if len(todo) == 1 and todo[0][:4] == (0, q.shape[1], 0, k.shape[1]):
        out, lse = torch_ops.cpu_flash_forward(
            q, k, v, is_causal=todo[0].is_square, mask=masks(todo[0]), scale=scale
        )
        return out.contiguous(), lse.contiguous()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=_lse_dtype(q))
    for b in todo:
        rows, keys = slice(b.q0, b.q1), slice(b.k0, b.k1)
        out[:, rows], lse[..., rows] = torch_ops.cpu_flash_forward(
            q[:, rows], k[:, keys], v[:, keys], is_causal=b.is_square, mask=masks(b), scale=scale
        )
    return out, lse


def _cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    s: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    order = short_documents.order(s, q.shape[1])
    if order is not None:
        return short_documents.backward(dout, q, k, v, out, lse, order, scale)
    lengths = _whole_documents(s, q.shape[1])
    if lengths is not None:
        cut = (x.split(lengths, dim=1) for x in (dout, q, k, v, out))
        saved = zip(*cut, lse.split(lengths, dim=-1), strict=True)
        parts = [
            torch_ops.cpu_flash_backward(*x, is_causal=True, mask=None, scale=scale) for x in saved
        ]
        dq, dk, dv = (torch.cat(grads, dim=1) for grads in zip(*parts, strict=True))
        return dq, dk, dv
    todo = list(blocks(s, q.shape[1], k.shape[1], rows=_cpu_rows(s), whole_squares=True))
    masks = _Masks(q)
    if len(todo) == 1 and todo[0][:4] == (0, q.shape[1], 0, k.shape[1]):
        return torch_ops.cpu_flash_backward(
            dout, q, k, v, out, lse, is_causal=todo[0].is_square, mask=masks(todo[0]), scale=scale
        )
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # Overlapping blocks add up in float32: a sum of bf16 parts would round once a block.
    acc = _lse_dtype(q)
    dk, dv = (torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (k, v))
    for b in todo:
        rows, keys = slice(b.q0, b.q1), slice(b.k0, b.k1)
        dq[:, rows], dk_block, dv_block = torch_ops.cpu_flash_backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[..., rows],
            is_causal=b.is_square, mask=masks(b), scale=scale,
        )  # fmt: skip
        dk[:, keys] += dk_block
        dv[:, keys] += dv_block
    return dq, dk.to(k.dtype), dv.to(v.dtype)


CAPABILITIES = Capabilities(
    name="torch",
    title="PyTorch's fused attention",
    dtypes=(*HALF, torch.float32, torch.float64),
    measured={HOPPER: {"full": 3.891, "window": 2.014, "documents": 1.32}},
)

KERNEL = TorchKernel()
