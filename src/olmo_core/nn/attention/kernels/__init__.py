"""The kernels: one file each, imported when first used.

A kernel is two functions over one bottom-right varlen problem (:class:`Segments`). Everything that
the library offers on top (documents, windows, caches, parallel schedules) is built from these two.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import Tensor

from olmo_core.nn.attention.segments import Segments

__all__ = ["Kernel", "get_kernel", "register_kernel"]


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


_MODULES = {
    "torch": "torch_sdpa",
    "flash_2": "flash_2",
    "flash_3": "flash_3",
    "flash_4": "flash_4",
    "te": "te",
}
_KERNELS: dict[str, Kernel] = {}


def get_kernel(name: str) -> Kernel:
    """The kernel called ``name``; its file is imported by the first call."""
    if name not in _KERNELS:
        register_kernel(import_module(f"{__name__}.{_MODULES[name]}").KERNEL)
    return _KERNELS[name]


def register_kernel(kernel: Kernel) -> None:
    """Make ``kernel`` the one of its name. Ops carry names, never objects, so that they compile."""
    _KERNELS[kernel.name] = kernel
