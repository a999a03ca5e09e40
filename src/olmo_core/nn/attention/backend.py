"""Attention backends: a name and a kernel each. What all do with a call is in :mod:`.sdpa`."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch

from olmo_core.config import StrEnum
from olmo_core.nn.attention.capabilities import CAPABILITIES
from olmo_core.nn.attention.kernels.softmax import Capabilities, Feature, declare_kernel
from olmo_core.nn.attention.sdpa import ScaledDotProductAttention

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionBackendName",
    "AutoAttentionBackend",
    "FlashAttention2Backend",
    "FlashAttention3Backend",
    "FlashAttention4Backend",
    "TEAttentionBackend",
    "TorchAttentionBackend",
]


BACKENDS: dict[str, type[AttentionBackend]] = {}
"""By name: every class that names the file of its kernel."""


class AttentionBackendName(StrEnum):
    """An enumeration of the different attention backends."""

    torch = "torch"
    """PyTorch's own fused attention. Works on all devices."""
    flash_2 = "flash_2"
    """FlashAttention-2, from the flash-attn package or torch's own copy. Ampere and newer."""
    flash_3 = "flash_3"
    """FlashAttention-3. Hopper only."""
    flash_4 = "flash_4"
    """FlashAttention-4, the CuTe implementation. Hopper and newer."""
    te = "te"
    """Transformer Engine. Hopper and newer."""

    def get_class(self) -> type[AttentionBackend]:
        """The backend's class."""
        return BACKENDS[self]

    def build(self, **kwargs: Any) -> AttentionBackend:
        """Build the backend; see :class:`AttentionBackend` for the arguments."""
        return self.get_class()(**kwargs)

    def assert_supported(self) -> None:
        """:raises RuntimeError: If the backend can't run on this machine."""
        self.get_class().assert_supported()

    def assert_supports_swa(self) -> None:
        """:raises RuntimeError: If the backend has no sliding windows."""
        self.get_class().assert_supports_swa()

    def assert_supports_ring_cp(self) -> None:
        """:raises RuntimeError: If the backend has no ring context parallelism."""
        self.get_class().assert_supports_ring_cp()

    def assert_supports_ulysses_cp(self) -> None:
        """:raises RuntimeError: If the backend has no Ulysses context parallelism."""
        self.get_class().assert_supports_ulysses_cp()

    def assert_supports_packed_qkv(self) -> None:
        """:raises RuntimeError: If the backend doesn't take packed QKV."""
        self.get_class().assert_supports_packed_qkv()

    def assert_supports_kv_cache(self) -> None:
        """:raises RuntimeError: If the backend has no KV caching."""
        self.get_class().assert_supports_kv_cache()


class AttentionBackend(ScaledDotProductAttention, ABC):
    """Encapsulates a backend for the scaled dot-product attention (SDPA) operation.

    Attention is always causal.

    :param head_dim: The dimension of a head.
    :param n_heads: The query heads.
    :param n_kv_heads: The key and value heads, if different.
    :param scale: Factor of the scores; ``head_dim ** -0.5`` if not given.
    :param dropout_p: Probability of dropping an attention weight, in training alone.
    :param window_size: How many keys before and after its own a query sees, ``(left, right)``, as
        in flash-attention: ``(-1, -1)`` for all before, ``(W - 1, 0)`` for a window of W keys.
    :param cache: Unused; backends keep no buffers.
    :param fallback: On a machine without a GPU, warn and use torch instead of raising.
    :raises RuntimeError: If the backend can't run on this machine.
    """

    name: ClassVar[AttentionBackendName | None] = None
    kernel_file: ClassVar[str] = ""
    """The file of ``kernels/softmax/`` that holds its kernel and its row of capabilities."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.kernel_file:
            assert cls.name is not None
            declare_kernel(str(cls.name), cls.kernel_file)
            BACKENDS[str(cls.name)] = cls

    @classmethod
    def assert_supports_swa(cls) -> None:
        """Validates that this backend supports sliding window attention (SWA).

        :raises RuntimeError: If it does not.
        """
        cls._assert_feature(Feature.window)

    @classmethod
    def assert_supports_ring_cp(cls) -> None:
        """Validates that this backend supports ring context parallelism.

        :raises RuntimeError: If it does not.
        """
        cls._assert_feature(Feature.ring_cp)

    @classmethod
    def assert_supports_ulysses_cp(cls) -> None:
        """Validates that this backend supports ulysses context parallelism.

        :raises RuntimeError: If it does not.
        """
        cls._assert_feature(Feature.ulysses_cp)

    @classmethod
    def assert_supports_packed_qkv(cls) -> None:
        """Validates that this backend supports taking QKV as a single packed tensor.

        :raises RuntimeError: If it does not.
        """
        cls._assert_feature(Feature.packed_qkv)

    @classmethod
    def assert_supports_kv_cache(cls) -> None:
        """Validates that this backend supports KV caching.

        :raises RuntimeError: If it does not.
        """
        cls._assert_feature(Feature.kv_cache)

    def warmup_cache(self, max_seq_len: int, device: torch.device) -> None:
        """Warmup the buffer cache. Backends keep no buffers, so there is nothing to warm up."""


class TorchAttentionBackend(AttentionBackend):
    """PyTorch's built-in scaled dot-product attention (SDPA) backend. Works on all devices."""

    name = AttentionBackendName.torch
    kernel_file = "torch_sdpa"


class FlashAttention2Backend(AttentionBackend):
    """FlashAttention-2, from the flash-attn package or the copy inside torch."""

    name = AttentionBackendName.flash_2
    kernel_file = "flash_2"


class FlashAttention3Backend(AttentionBackend):
    """SDPA from the flash-attn 3 package."""

    name = AttentionBackendName.flash_3
    kernel_file = "flash_3"


class FlashAttention4Backend(AttentionBackend):
    """SDPA from flash-attn 4 (CUTE implementation)."""

    name = AttentionBackendName.flash_4
    kernel_file = "flash_4"


class TEAttentionBackend(AttentionBackend):
    """SDPA from Transformer Engine."""

    name = AttentionBackendName.te
    kernel_file = "te"


class AutoAttentionBackend(AttentionBackend):
    """The fastest backend for each call, chosen when the first call of its kind comes.

    It can do whatever torch can, which is its last choice. See
    :func:`olmo_core.nn.attention.selection.choose`.
    """

    @classmethod
    def _capabilities(cls) -> Capabilities:
        return CAPABILITIES[AttentionBackendName.torch]
