"""What every sequence mixer is: a module from ``(batch, seq, d_model)`` to the same shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from olmo_core.config import Config, Registrable
from olmo_core.nn.lengths import check_leftpad
from olmo_core.utils import runs_eagerly

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from olmo_core.nn.attention.ring import RingContextParallelStyle, UlyssesContextParallelStyle
    from olmo_core.nn.buffer_cache import BufferCache
    from olmo_core.nn.init import InitMethod

__all__ = ["DecodingCache", "SequenceMixer", "SequenceMixerConfig"]


class DecodingCache(nn.Module, ABC):
    """What a mixer remembers of the tokens before: keys and values, or a recurrent state.

    While a mixer's ``kv_cache_manager`` is one of these, its ``forward`` appends the tokens that it
    is given to it. All rows of the batch advance together; rows of different length are padded on
    the left.
    """

    batch_size: int
    max_seq_len: int
    cache_leftpad: Tensor
    """Leading padding tokens of each row: ``(batch,)``, int32."""
    cache_seqlens: Tensor
    """Tokens of each row so far, left padding included: int32, no dimensions."""
    host_seqlen: int
    """The same, counted on the host."""
    has_leftpad: bool

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, and keep the memory."""

    @abstractmethod
    def rollback(self, n_tokens: int) -> None:
        """Forget the last ``n_tokens`` tokens of each row, rejected draft tokens for example.

        :raises ValueError: If fewer tokens were stored, or fewer can be restored.
        """

    def current_position(self) -> Tensor:
        """The tokens stored so far in each row, left padding included: int32, no dimensions."""
        return self.cache_seqlens

    def record_leftpad(self, leftpad: Tensor) -> None:
        """Set how many leading tokens of each row are padding: ``(batch,)``, int32."""
        self.cache_leftpad.copy_(leftpad)
        self.has_leftpad = True

    def check_room(self, n_tokens: int) -> None:
        """:raises RuntimeError: If the next ``n_tokens`` tokens of each row do not fit."""
        if self.host_seqlen + n_tokens > self.max_seq_len:
            raise RuntimeError(
                f"The decoding cache holds {self.host_seqlen} of at most {self.max_seq_len} tokens "
                f"a row, and {n_tokens} more came. Build it with a larger max_seq_len, or reset() "
                "it."
            )

    def reserve(self, n_tokens: int) -> None:
        """Take room for the next ``n_tokens`` tokens of each row.

        Counts on the host, so it never waits for the device. In eager mode whoever stores tokens
        calls it; a compiled or captured loop must call it itself before each step.

        :raises RuntimeError: If the cache would overflow.
        """
        self.check_room(n_tokens)
        self.host_seqlen += n_tokens

    def admit(self, x: Tensor, leftpad: Tensor | None, *, needs_grad: bool) -> Tensor | None:
        """Check a call at the layer's door, before anything is computed or stored.

        :param x: The next tokens, ``(batch, seq, d_model)``.
        :param leftpad: Their left padding, with the first tokens alone.
        :param needs_grad: Whether the layer's output would need a gradient.
        :returns: Which tokens are left padding, ``(batch, seq)`` bool; None if there is none.
        :raises ValueError: If batch or padding do not fit.
        :raises TypeError: If the padding is no int32 tensor.
        :raises RuntimeError: If the tokens do not fit, or gradients are wanted.
        """
        if x.shape[0] != self.batch_size:
            raise ValueError(
                f"The decoding cache was built for a batch of {self.batch_size}, got "
                f"{x.shape[0]} rows."
            )
        eager = runs_eagerly(x.device)
        if leftpad is not None:
            check_leftpad(leftpad, self.batch_size, self.max_seq_len)
            if eager and self.host_seqlen:
                raise ValueError(
                    "cache_leftpad belongs to the first tokens after a reset, and the decoding "
                    f"cache already holds {self.host_seqlen} tokens a row."
                )
        if eager:
            self.check_room(x.shape[1])
        if needs_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "A decoding cache is for inference: what it stores has no gradient. Call the model "
                "under torch.no_grad() or torch.inference_mode(), or set kv_cache_manager = None."
            )
        if leftpad is not None:
            self.record_leftpad(leftpad)
        if not self.has_leftpad:
            return None
        index = torch.arange(x.shape[1], device=x.device) + self.cache_seqlens
        return index < self.cache_leftpad[:, None]


class SequenceMixer(nn.Module, ABC):
    """The part of a transformer block that moves information between positions."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_cache_manager: DecodingCache | None = None

    @abstractmethod
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Mix ``x`` of shape ``(batch, seq, d_model)`` into an output of the same shape."""

    @abstractmethod
    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw all parameters anew, for block ``block_idx`` of ``num_blocks``."""

    @abstractmethod
    def num_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token of forward and backward at length ``seq_len``.

        A multiply-add counts as two; the backward pass as twice the forward. The half of the scores
        that a causal mask discards is not taken off.
        """

    @abstractmethod
    def init_kv_cache_manager(
        self, batch_size: int, max_seq_len: int, *, max_rollback: int = 0
    ) -> None:
        """Allocate the decoding cache, which :meth:`forward` then uses. For inference only.

        :param batch_size: Rows of the batch.
        :param max_seq_len: Most tokens of a row, left padding included.
        :param max_rollback: Most tokens that :meth:`DecodingCache.rollback` must be able to forget.
        """

    def apply_cp(
        self,
        cp_mesh: DeviceMesh,
        ring: RingContextParallelStyle | None = None,
        uly: UlyssesContextParallelStyle | None = None,
    ) -> None:
        """Prepare the module for context parallelism.

        :raises ValueError: If no style is given.
        :raises RuntimeError: If the mixer can't be sharded so.
        """
        require_cp_style(ring, uly)
        raise RuntimeError(
            f"{type(self).__name__} does not support context parallelism in this version. Shard "
            "the batch instead (data parallelism), or shorten the sequence."
        )

    def apply_tp(
        self,
        tp_mesh: DeviceMesh,
        input_layout: Any = None,
        output_layout: Any = None,
        use_local_output: bool = True,
        float8_enabled: bool = False,
    ) -> None:
        """Prepare the module for tensor parallelism.

        :raises RuntimeError: If the mixer can't be sharded so.
        """
        raise RuntimeError(
            f"{type(self).__name__} does not support tensor parallelism in this version. Shard its "
            "parameters instead (FSDP)."
        )


def require_cp_style(ring: Any, uly: Any) -> None:
    """:raises ValueError: If neither a ring nor a Ulysses style is given."""
    if ring is None and uly is None:
        raise ValueError(
            "Context parallelism needs a style, got ring=None and uly=None. Pass "
            "ring=RingContextParallelStyle(...) or uly=UlyssesContextParallelStyle()."
        )


M = TypeVar("M", bound=SequenceMixer)


@dataclass
class SequenceMixerConfig(Config, Registrable, Generic[M]):
    """The base of all mixers' configs. ``from_dict`` builds the one that ``type`` names."""

    @abstractmethod
    def num_params(self, d_model: int) -> int:
        """The number of parameters that the mixer will have once built."""

    @abstractmethod
    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> M:
        """Build the mixer of layer ``layer_idx`` of ``n_layers``.

        :param d_model: The model dimensionality.
        :param init_device: The device to initialize the parameters on, e.g. "cpu", "meta".
        :param cache: Where layers share RoPE tables.
        """
