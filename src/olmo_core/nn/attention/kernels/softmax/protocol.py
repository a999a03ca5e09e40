"""What a softmax attention kernel is, and how it states what it can do.

A kernel is two functions over one bottom-right varlen problem (:class:`Segments`). Everything that
the library offers on top (documents, windows, caches, parallel schedules) is built from these two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from olmo_core.config import StrEnum
from olmo_core.nn.attention.segments import Segments

HALF = (torch.float16, torch.bfloat16)
NEWEST_GPU = (12, 9)
HOPPER = (9, 0)


class Feature(StrEnum):
    """Something that can be asked of a backend."""

    window = "window"
    """Sliding window attention."""
    documents = "documents"
    """Intra-document masking of packed sequences."""
    packed_qkv = "packed_qkv"
    """Queries, keys and values as one tensor."""
    kv_cache = "kv_cache"
    """Prefill and decoding with a cache of keys and values."""
    left_padding = "left_padding"
    """Rows of different length, padded on the left."""
    dropout = "dropout"
    """Dropout of attention weights."""
    backward = "backward"
    """Gradients."""
    lse = "lse"
    """The log-sum-exp, and gradients from one that was merged over key blocks."""
    deterministic = "deterministic"
    """The same bits on each run, under ``torch.use_deterministic_algorithms``."""
    ring_cp = "ring_cp"
    """Ring context parallelism."""
    ulysses_cp = "ulysses_cp"
    """Ulysses context parallelism."""


@dataclass(frozen=True)
class Capabilities:
    """One backend's row of the table. Its kernel's file holds it, as ``CAPABILITIES``."""

    name: str
    title: str
    """The library's own name."""
    packages: tuple[str, ...] = ()
    """Modules, any one of which provides it; none if torch alone does."""
    install: str = ""
    """The command that installs it."""
    compute_capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    """The NVIDIA GPUs that run it, first and last included, or None for any device."""
    dtypes: tuple[torch.dtype, ...] = HALF
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    missing: Mapping[Feature, str] = field(default_factory=dict)
    """Why, for each feature that it does not have."""
    measured: Mapping[tuple[int, int] | str, Mapping[str, float]] = field(default_factory=dict)
    """Forward and backward in ms by place (a GPU's compute capability, or the type of another
    device) and case (``full``, ``window``, ``documents``): batch 2, 8192 tokens, 16 query heads and
    4 kv heads of 128, bf16, window and documents of 1024, on an H100 where the place is (9, 0). All
    rows' times come from one run of ``benchmarks/kernels_gpu.py``, replayed as CUDA graphs: what
    the kernels take. A backend without a time is never chosen, only named."""


class Kernel(Protocol):
    """Scaled dot-product attention with its log-sum-exp, and its gradient."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Segments, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Where ``s`` has lengths, they are about the flattened batch, ``(b * t, h, d)``.

        :param q: ``(b, t_q, h, d)``, last dimension contiguous.
        :param k: ``(b, t_k, g, d)``; query head i reads key and value head ``i // (h // g)``.
        :param v: Like ``k``.
        :param scale: Factor of the scores.
        :param dropout_p: Probability that a weight is dropped.
        :returns: The output, like ``q`` and contiguous; the natural log-sum-exp of each query's
            scaled scores, ``(b, h, t_q)``, or ``(1, h, b * t_q)`` with lengths, float32 (float64
            for float64), contiguous, -inf for a query that sees no key (its output is 0); and the
            state with which backward draws the same dropout, ``(2,)`` int64, or ``(0,)`` without
            dropout.
        """
        ...

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
        """The gradients of q, k and v.

        ``out`` and ``lse`` may come from more keys than ``k`` holds, merged over key blocks: the
        gradients are then this block's share, and those of all blocks add up exactly.
        """
        ...
