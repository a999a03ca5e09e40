"""What every sequence mixer is: a module from ``(batch, seq, d_model)`` to the same shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from olmo_core.config import Config, Registrable
from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.fsdp import FSDPPolicy, fsdp_policy
from olmo_core.nn.tensor_parallel import SharesWidth, TensorParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from olmo_core.nn.attention.ring import RingContextParallelStyle, UlyssesContextParallelStyle
    from olmo_core.nn.buffer_cache import BufferCache
    from olmo_core.nn.init import InitMethod

__all__ = ["SequenceMixer", "SequenceMixerConfig", "SharesSequences"]


class SharesSequences(nn.Module):
    """A module that can work on a shard of a sequence, together with other ranks."""

    context: ContextParallel | None = None
    """This rank's place among those that share a sequence, after :meth:`apply_cp`."""

    def apply_cp(
        self,
        cp_mesh: DeviceMesh,
        ring: RingContextParallelStyle | None = None,
        uly: UlyssesContextParallelStyle | None = None,
    ) -> None:
        """Prepare the module for context parallelism: ``forward`` then takes this rank's shard of
        the sequence, with the keywords that the style's load balancer returned.

        All ranks of the mesh must call ``forward`` and backward together. A parameter's gradient is
        this rank's part: sum it over the mesh.

        :param cp_mesh: One dimension for one style; for both (ring, Ulysses).
        :param ring: For ring attention; its load balancer shards the sequence.
        :param uly: For Ulysses. With both, it shares each shard of the ring.
        :raises ValueError: If no style is given, the mesh has not as many dimensions as styles, or
            Ulysses can't deal the heads.
        :raises RuntimeError: If the module can't be sharded so, is sharded already, or has a
            decoding cache.
        """
        context = ContextParallel.from_mesh(cp_mesh, ring, uly)
        self.check_cp(context)
        self.use_cp(context)

    def check_cp(self, context: ContextParallel) -> None:
        """The errors of :meth:`apply_cp`, before anything is changed."""
        if self.context is not None:
            raise RuntimeError(
                f"apply_cp was called twice on one {type(self).__name__}. Give all styles in one "
                "call: ring=..., uly=... and a mesh of two dimensions."
            )

    def use_cp(self, context: ContextParallel) -> None:
        """What :meth:`apply_cp` does once all is checked."""
        self.context = context


class SequenceMixer(SharesSequences, SharesWidth, ABC):
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

    def check_cp(self, context: ContextParallel) -> None:
        super().check_cp(context)
        if self.kv_cache_manager is not None:
            raise RuntimeError(
                f"{type(self).__name__} has a decoding cache, which holds whole sequences. "
                "Generate from a model that is not sharded: load the checkpoint into another one, "
                "or drop the cache (kv_cache_manager = None) before apply_cp."
            )

    def refuse_cache_under_cp(self) -> None:
        """:raises RuntimeError: If the mixer is sharded: a decoding cache holds whole sequences."""
        if self.context is not None:
            raise RuntimeError(
                "A decoding cache holds whole sequences, and apply_cp has sharded this "
                f"{type(self).__name__}. Generate from a model that is not sharded: load the "
                "checkpoint into another one."
            )

    def fsdp_policy(self) -> FSDPPolicy:
        """How FSDP2 is to wrap the mixer: see :class:`FSDPPolicy`."""
        return fsdp_policy(self, self.get_parameter("w_out.weight").dtype)

    def check_tp(self, place: TensorParallel) -> None:
        super().check_tp(place)
        if self.kv_cache_manager is not None:
            raise RuntimeError(
                f"{type(self).__name__} has a decoding cache, of all heads. Call apply_tp first, "
                "then init_kv_cache_manager."
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
