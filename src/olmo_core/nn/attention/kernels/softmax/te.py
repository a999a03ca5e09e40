"""Transformer Engine: cuDNN's attention through ``fused_attn_fwd`` and ``fused_attn_bwd``.

These two are the block primitive below ``DotProductAttention``: they hand out the log-sum-exp and
take it back. cuDNN plans once for each kind and size of problem.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.softmax import blockwise
from olmo_core.nn.attention.kernels.softmax.library_args import (
    empty_backward,
    empty_forward,
    flat,
    flat_lse,
    is_empty,
    may_have_empty_rows,
    sees_nothing,
    window_offsets,
    without_queries,
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
def library() -> ModuleType:
    """``transformer_engine.pytorch.cpp_extensions.fused_attn``.

    :raises ImportError: If it can't be imported.
    """
    with one_cudnn():
        import_module("transformer_engine.pytorch")  # loads the shared libraries
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    return fused_attn


@contextmanager
def one_cudnn(maps: Path = Path("/proc/self/maps")) -> Iterator[None]:
    """Let what is loaded in this context use the cuDNN that torch uses.

    Transformer Engine prefers the system's cuDNN to the one of torch's package. Where both exist
    and torch has begun to load the parts of its own, parts of two versions would work together.

    :param maps: What is mapped into the process, in Linux's format.
    """
    folder = cudnn_folder(maps)
    if folder is None:
        yield
        return
    for part in sorted(folder.glob("libcudnn*.so*")):
        with suppress(OSError):  # what it needs may be missing: then it could not be mixed either
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    before = os.environ.get("CUDNN_HOME")
    os.environ["CUDNN_HOME"] = str(folder)  # where Transformer Engine looks first
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDNN_HOME"]
        else:
            os.environ["CUDNN_HOME"] = before


def cudnn_folder(maps: Path) -> Path | None:
    """Where the cuDNN that this process uses lies, if it uses any."""
    if not maps.exists():
        return None
    mapped = (Path(line.split()[-1]) for line in maps.read_text().splitlines() if line.split())
    return next((path.parent for path in mapped if path.name.startswith("libcudnn.so")), None)


class TEKernel:
    """See :class:`Kernel`. No dropout: its generator state can't be replayed."""

    name = "te"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not dropout_p
        if is_empty(q, k):
            return *empty_forward(q, s), no_rng(q)
        if _is_one_pair(s):
            return blockwise.forward(q, k, v, s, scale=scale)
        hidden = _hidden_queries(s, q, k)
        if hidden:
            out, lse = empty_forward(q, s)
            tail = Segments.dense(k.shape[1], k.shape[1], window=s.window)
            seen = self.forward(q[:, hidden:], k, v, tail, scale=scale)
            out[:, hidden:], lse[..., hidden:] = seen[:2]
            return out, lse, no_rng(q)
        shape = q.shape
        q, k, v = (x.contiguous() for x in flat(s, q, k, v))  # its layouts imply the strides
        options, lengths = _options(s, q, k, scale)
        out, aux, *_ = library().fused_attn_fwd(
            True, *_longest(s), *lengths, q, k, v, q.dtype, _backend(), **options
        )
        lse = aux[0].squeeze(-1)
        if s.cu_q is not None:
            lse = lse.transpose(0, 1)
            if may_have_empty_rows(s):
                empty = sees_nothing(s, q.shape[0])
                lse = lse.masked_fill(empty, -math.inf)
                out = out.masked_fill(empty[:, None, None], 0.0)
            out, lse = out.view(shape), lse[None]
        return out, lse.contiguous(), no_rng(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
        s: Segments, *, scale: float, dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if is_empty(q, k):
            return empty_backward(q, k, v)
        if _is_one_pair(s):
            return blockwise.backward(dout, q, k, v, out, lse, rng, s, scale=scale)
        hidden = _hidden_queries(s, q, k)
        if hidden:
            dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
            tail = Segments.dense(k.shape[1], k.shape[1], window=s.window)
            saved = (dout[:, hidden:], q[:, hidden:], k, v, out[:, hidden:], lse[..., hidden:])
            dq[:, hidden:], dk, dv = self.backward(*saved, rng, tail, scale=scale)
            return dq, dk, dv
        shapes = [x.shape for x in (q, k, v)]
        dout, q, k, v, out = (x.contiguous() for x in flat(s, dout, q, k, v, out))
        lse = flat_lse(s, lse)
        empty = None
        if s.cu_q is not None:
            if may_have_empty_rows(s):
                empty = sees_nothing(s, q.shape[0])
                lse = lse.masked_fill(lse == -math.inf, 0.0)  # exp(-inf - 0) is 0, and not NaN
            lse = lse.transpose(0, 1)
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
        options, lengths = _options(s, q, k, scale)
        dq, dk, dv, *_ = library().fused_attn_bwd(
            *_longest(s), *lengths, q, k, v, out, dout, q.dtype,
            [lse.contiguous()[..., None], no_dropout], _backend(), do_format=options["o_format"],
            dqkv_layout=options["qkv_layout"],
            deterministic=torch.are_deterministic_algorithms_enabled(), **options,
        )  # fmt: skip
        if empty is not None:
            dq = dq.masked_fill(empty[:, None, None], 0.0)
            # cuDNN leaves the gradients of keys without queries unwritten.
            alone = without_queries(s, k.shape[0])[:, None, None]
            dk, dv = dk.masked_fill(alone, 0.0), dv.masked_fill(alone, 0.0)
        dq, dk, dv = (x.view(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))
        return dq, dk, dv


def _hidden_queries(s: Segments, q: Tensor, k: Tensor) -> int:
    """Leading queries of a dense problem that see no key: cuDNN refuses more queries than keys."""
    return max(0, q.shape[1] - k.shape[1]) if s.cu_q is None and s.causal else 0


def _is_one_pair(s: Segments) -> bool:
    """Dense problems of one query and one key, which cuDNN refuses."""
    return s.cu_q is None and s.max_q == s.max_k == 1


def _longest(s: Segments) -> tuple[int, int]:
    """Bounds of the lengths. Above 1, since one-token documents are more than one pair."""
    return (s.max_q, s.max_k) if s.cu_q is None else (max(s.max_q, 2), max(s.max_k, 2))


def _backend() -> Any:
    return library().FusedAttnBackend["F16_arbitrary_seqlen"]


def _options(
    s: Segments, q: Tensor, k: Tensor, scale: float
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The arguments that forward and backward share, and both cumulative lengths."""
    left, right = window_offsets(s, -1)
    if s.causal:
        right = 0
    options: dict[str, Any] = {
        "attn_scale": scale,
        "window_size": (left, right),
        "bottom_right_diagonal": s.causal,
    }
    if s.cu_q is not None and s.cu_k is not None:
        mask = "padding_causal_bottom_right" if s.causal else "padding"
        options.update(
            attn_mask_type=mask, qkv_layout="thd_thd_thd", o_format="thd",
            cu_seqlens_q_padded=s.cu_q, cu_seqlens_kv_padded=s.cu_k,
        )  # fmt: skip
        return options, (s.cu_q, s.cu_k)
    square = q.shape[1] == k.shape[1]
    mask = "no_mask" if not s.causal else "causal" if square else "causal_bottom_right"
    options.update(attn_mask_type=mask, qkv_layout="bshd_bshd_bshd", o_format="bshd")
    options["bottom_right_diagonal"] = s.causal and not square
    return options, (_even(q), _even(k))


def _even(x: Tensor) -> Tensor:
    """Cumulative lengths of a dense batch."""
    b, t = x.shape[:2]
    return torch.arange(0, b * t + 1, t, dtype=torch.int32, device=x.device)


CAPABILITIES = Capabilities(
    name="te",
    title="Transformer Engine",
    packages=("transformer_engine",),
    install='pip install --no-build-isolation "transformer_engine[pytorch]"',
    compute_capability=(HOPPER, NEWEST_GPU),
    max_head_dim=128,
    head_dim_multiple=8,
    missing={
        Feature.dropout: "its dropout draws from a state that can't be replayed block by block",
    },
    measured={HOPPER: {"full": 3.673, "window": 1.303, "documents": 1.249}},
)

KERNEL = TEKernel()
