"""Kernels for one query token a row over a cache, as a table: the fastest that can serves a step.

They read keys and values, whatever backend computed them, so no backend brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from torch import Tensor

from olmo_core.nn.attention.kernels.decode import torch_masked, triton_split_kv

__all__ = ["DECODE_KERNELS", "DecodeChoice", "DecodeKernel", "choose_decode", "decode_kernel"]


@dataclass(frozen=True)
class DecodeKernel:
    """A way to store the next token of each row and to attend to all that it sees."""

    name: str
    title: str
    module: ModuleType

    def unsupported(self, q: Tensor, k_cache: Tensor) -> str | None:
        """Why it can't serve these tensors, or None if it can."""
        reason: str | None = self.module.unsupported(q, k_cache)
        return reason

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seqlen: Tensor,
        leftpad: Tensor,
        *,
        padded: bool,
        scale: float,
        window: int = -1,
        is_ring: bool = False,
    ) -> Tensor:
        """Store the next token of each row, see :func:`.slots.store`, and attend. No gradient.

        The position does not advance. A row whose token is still padding gives 0.

        :param q: ``(B, 1, H, D)``, in the cache's dtype.
        :param k: ``(B, 1, Hkv, D)``, likewise.
        :param v: Like ``k``.
        :param k_cache: ``(B, S, Hkv, D)``, last dimension contiguous. A ring holds what a window
            of S keys sees.
        :param v_cache: Like ``k_cache``.
        :param seqlen: Tokens before, padding included: int32 without dimensions, on the device.
        :param leftpad: ``(B,)``, int32, on the device.
        :param padded: Whether any of it may be other than 0.
        :param scale: Factor of the scores.
        :param window: How many keys a token sees at most where there is no ring; -1 for all.
        :returns: Like ``q``, contiguous.
        """
        out: Tensor = self.module.decode(
            q, k, v, k_cache, v_cache, seqlen, leftpad,
            padded=padded, scale=scale, window=window, is_ring=is_ring,
        )  # fmt: skip
        return out


DECODE_KERNELS: Mapping[str, DecodeKernel] = MappingProxyType(
    {
        kernel.name: kernel
        for kernel in (
            DecodeKernel("triton", "Triton over split keys", triton_split_kv),
            DecodeKernel("torch", "SDPA over the cache", torch_masked),
        )
    }
)
"""Fastest first."""


class DecodeChoice(NamedTuple):
    """The decode kernel for a step, and how it came about."""

    name: str
    reason: str
    refused: dict[str, str]
    """Why not, for each faster one."""


def decode_kernel(q: Tensor, k_cache: Tensor) -> DecodeKernel:
    """What :func:`choose_decode` chooses, without its reasons."""
    for kernel in DECODE_KERNELS.values():
        if kernel.unsupported(q, k_cache) is None:
            return kernel
    raise AssertionError("torch serves all tensors")


def choose_decode(q: Tensor, k_cache: Tensor) -> DecodeChoice:
    """The fastest decode kernel that can serve a step.

    :param q: ``(B, 1, H, D)``.
    :param k_cache: ``(B, S, Hkv, D)``.
    """
    refused: dict[str, str] = {}
    for kernel in DECODE_KERNELS.values():
        reason = kernel.unsupported(q, k_cache)
        if reason is None:
            return DecodeChoice(kernel.name, f"{kernel.title}, the fastest that can", refused)
        refused[kernel.name] = reason
    raise AssertionError("torch serves all tensors")
