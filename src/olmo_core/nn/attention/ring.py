"""Context parallelism from the outside: how a batch is sharded, and the two styles.

A load balancer pads a batch, cuts it along the sequence and returns the shard of one rank, together
with the lengths that go unchanged into a mixer's ``forward``. It works on each process alone and
communicates nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from olmo_core.config import Config, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import sharding
from olmo_core.nn.attention.layout import ContiguousLayout, Layout, Span, ZigZagLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "RingAttentionLlama3LoadBalancer",
    "RingAttentionLoadBalancer",
    "RingAttentionLoadBalancerType",
    "RingAttentionZigZagLoadBalancer",
    "RingContextParallelStyle",
    "UlyssesContextParallelStyle",
    "UlyssesLoadBalancer",
]


class RingAttentionLoadBalancerType(StrEnum):
    """An enumeration of the different :class:`RingAttentionLoadBalancer` implementations."""

    zig_zag = "zig_zag"
    """➡️ :class:`RingAttentionZigZagLoadBalancer`"""

    llama3 = "llama3"
    """➡️ :class:`RingAttentionLlama3LoadBalancer`"""

    ulysses = "ulysses"
    """➡️ :class:`UlyssesLoadBalancer`"""

    def build(self, cp_mesh: DeviceMesh) -> RingAttentionLoadBalancer:
        """Build the load balancer for this process's place in a one-dimensional mesh.

        :raises ValueError: If the mesh has more than one dimension.
        """
        if cp_mesh.ndim != 1:
            raise ValueError(
                f"The context-parallel mesh must have one dimension, got {cp_mesh.ndim}. "
                "Take the one that shards the sequence: mesh['cp']."
            )
        return _BALANCERS[self](cp_rank=cp_mesh.get_local_rank(), cp_world_size=cp_mesh.size())


class RingAttentionLoadBalancer(ABC):
    """A class that handles the logic of sharding inputs on the sequence dimension for ring
    attention (context parallelism).

    :param cp_rank: This process's rank in the context-parallel group.
    :param cp_world_size: How many ranks share a sequence.
    :raises ValueError: If the rank is not one of the group.
    """

    layout: ClassVar[Layout]

    def __init__(self, *, cp_rank: int, cp_world_size: int) -> None:
        if not 0 <= cp_rank < cp_world_size:
            raise ValueError(
                f"cp_rank must be in [0, cp_world_size), got cp_rank={cp_rank} and "
                f"cp_world_size={cp_world_size}."
            )
        self.cp_rank = cp_rank
        self.cp_world_size = cp_world_size

    @abstractmethod
    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """Shard inputs on their sequence dimension, optionally adding padding if needed.

        .. important::
            If using intra-document masking, use :meth:`batch_shard_by_document` instead.

        :param inputs: Tensors with the same length in their sequence dimension.
        :param seq_dims: The sequence dimension of each input.
        :param pad_values: What to pad each input with, at its end.
        :param length_multiple: The padded total length becomes a multiple of this too.

        :returns: The local shards of the inputs.
        :raises ValueError: If the arguments don't fit together, or padding is needed and
            ``pad_values`` is not given.
        """

    @abstractmethod
    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Same as :meth:`batch_shard` but for strategies that support intra-document masking.

        Inputs have a batch of one, or none (the sequence dimension first, as in RoPE buffers).

        :param cu_doc_lens: ``(documents + 1,)``, integers of any type: starts at 0, does not
            decrease, ends at the length of the inputs.

        :returns: The local shards of the inputs and any other additional inputs required for the
            corresponding ring attention implementation, all of them keywords of a mixer's
            ``forward``. ``global_cu_doc_lens`` holds the padded documents of the whole sequence.
        :raises TypeError: If ``cu_doc_lens`` is not a tensor of integers.
        :raises ValueError: If the arguments don't fit together, the batch is larger than one, or
            padding is needed and ``pad_values`` is not given.
        """

    def total_multiple(self, length_multiple: int | None = None) -> int:
        """What the padded total length is a multiple of."""
        return lcm(self.cp_world_size, length_multiple or 1)

    def pad(
        self, x: Tensor, dim: int, value: Any, *, length_multiple: int | None = None
    ) -> tuple[Tensor, int]:
        """Pad the end of a sequence to a length that can be sharded.

        :param x: A tensor.
        :param dim: Its sequence dimension.
        :param value: What to pad with.
        :param length_multiple: As in :meth:`batch_shard`.

        :returns: The padded tensor (``x`` itself where nothing is missing), and how many positions
            were added.
        """
        added = -x.shape[dim] % self.total_multiple(sharding.checked_multiple(length_multiple))
        if added == 0:
            return x, 0
        total = x.shape[dim]
        return sharding.take(
            [Span(0, 0, total + added)], [x], [dim], [value], [0, total], [0, total + added]
        )[0], added

    def _shard(
        self,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Any] | None,
        real: list[int],
        padded: list[int],
    ) -> list[Tensor]:
        spans = self.layout.spans(padded, self.cp_world_size)[self.cp_rank]
        return sharding.take(spans, inputs, seq_dims, pad_values, real, padded)


class RingAttentionZigZagLoadBalancer(RingAttentionLoadBalancer):
    """Implements the zig-zag load-balancing strategy.

    The sequence, or by document each document, is cut into ``2 * cp_world_size`` chunks, and rank
    ``r`` holds chunks ``r`` and ``2 * cp_world_size - 1 - r``. By document each document is padded
    at its own end, and ``length_multiple`` is of the *local* length.
    """

    layout = ZigZagLayout()

    def total_multiple(self, length_multiple: int | None = None) -> int:
        return lcm(2 * self.cp_world_size, length_multiple or 1)

    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        multiple = self.total_multiple(sharding.checked_multiple(length_multiple))
        total = sharding.checked_length(inputs, seq_dims, pad_values)
        return self._shard(
            inputs, seq_dims, pad_values, [0, total], [0, sharding.ceil(total, multiple)]
        )

    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        n = self.cp_world_size
        multiple = n * lcm(2, sharding.checked_multiple(length_multiple) or 1)
        real = sharding.checked_documents(inputs, seq_dims, cu_doc_lens, pad_values)
        padded = [0]
        for start, stop in pairwise(real):
            padded.append(padded[-1] + sharding.ceil(stop - start, 2 * n))
        real, padded = sharding.with_padding_document(
            real, padded, sharding.ceil(padded[-1], multiple)
        )
        shards = self._shard(inputs, seq_dims, pad_values, real, padded)
        return shards, {
            "cu_doc_lens": sharding.lengths([end // n for end in padded], cu_doc_lens),
            "max_doc_len": sharding.longest(padded) // n,
            "global_cu_doc_lens": sharding.lengths(padded, cu_doc_lens),
        }


class RingAttentionLlama3LoadBalancer(RingAttentionLoadBalancer):
    """Implements Llama3's load-balancing strategy for context parallelism.

    The Llama3 strategy assigns each rank a contiguous slice of the full sequence. Rank ``i``
    receives positions ``[i * local_len, (i + 1) * local_len)`` where
    ``local_len = total_seq_len // cp_world_size``.

    This strategy is designed specifically for intra-document masking with variable-length documents
    packed into a single sequence. It computes separate cumulative sequence lengths for queries
    (``cu_doc_lens_q``) and keys (``cu_doc_lens_k``) per rank, enabling proper causal masking across
    document boundaries. Padding is added as a synthetic document at the end when the total sequence
    length is not divisible by the context parallel world size; ``length_multiple`` is of the
    *local* length.

    .. note::
        This strategy only supports :meth:`batch_shard_by_document` and will raise an error if
        :meth:`batch_shard` is called directly.
    """

    layout = ContiguousLayout()

    def total_multiple(self, length_multiple: int | None = None) -> int:
        return self.cp_world_size * (length_multiple or 1)

    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """:raises RuntimeError: Always: the strategy needs documents."""
        raise RuntimeError(
            "The llama3 load balancer shards by document alone. Call batch_shard_by_document() "
            "with cu_doc_lens (one document: [0, seq_len]), or use the zig_zag load balancer."
        )

    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        multiple = self.total_multiple(sharding.checked_multiple(length_multiple))
        real = sharding.checked_documents(inputs, seq_dims, cu_doc_lens, pad_values)
        real, padded = sharding.with_padding_document(real, real, sharding.ceil(real[-1], multiple))
        shards = self._shard(inputs, seq_dims, pad_values, real, padded)

        spans = self.layout.spans(padded, self.cp_world_size)[self.cp_rank]
        cu_q, cu_k = [0], [0]
        for span in spans:
            cu_q.append(cu_q[-1] + span.stop - span.start)
            cu_k.append(cu_k[-1] + span.stop - span.document)
        return shards, {
            "cu_doc_lens_q": sharding.lengths(cu_q, cu_doc_lens),
            "cu_doc_lens_k": sharding.lengths(cu_k, cu_doc_lens),
            "max_doc_len_q": sharding.longest(cu_q),
            "max_doc_len_k": sharding.longest(cu_k),
            "local_k_slice": slice(spans[0].document, spans[-1].stop),
            "global_cu_doc_lens": sharding.lengths(padded, cu_doc_lens),
        }


class UlyssesLoadBalancer(RingAttentionLoadBalancer):
    """Implements simple contiguous sequence sharding for Ulysses-style context parallelism.

    Unlike ring attention which uses zig-zag or other interleaving strategies, Ulysses just needs
    simple contiguous chunking since the all-to-all communication handles the sequence/head
    exchange.
    The lengths it returns are those of the whole sequence, padding being a last document.
    """

    layout = ContiguousLayout()

    def batch_shard(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        multiple = self.total_multiple(sharding.checked_multiple(length_multiple))
        total = sharding.checked_length(inputs, seq_dims, pad_values)
        return self._shard(
            inputs, seq_dims, pad_values, [0, total], [0, sharding.ceil(total, multiple)]
        )

    def batch_shard_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        multiple = self.total_multiple(sharding.checked_multiple(length_multiple))
        real = sharding.checked_documents(inputs, seq_dims, cu_doc_lens, pad_values)
        real, padded = sharding.with_padding_document(real, real, sharding.ceil(real[-1], multiple))
        shards = self._shard(inputs, seq_dims, pad_values, real, padded)
        lengths = sharding.lengths(padded, cu_doc_lens)
        return shards, {
            "cu_doc_lens": lengths,
            "max_doc_len": sharding.longest(padded),
            "global_cu_doc_lens": lengths,
        }


_BALANCERS: dict[str, type[RingAttentionLoadBalancer]] = {
    RingAttentionLoadBalancerType.zig_zag: RingAttentionZigZagLoadBalancer,
    RingAttentionLoadBalancerType.llama3: RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancerType.ulysses: UlyssesLoadBalancer,
}


@dataclass
class RingContextParallelStyle(Config):
    """Configuration for ring attention-style context parallelism.

    :raises OLMoConfigurationError: For a load balancer that is not a ring's, or a head stride
        below 1.
    """

    load_balancer: RingAttentionLoadBalancerType = RingAttentionLoadBalancerType.zig_zag
    """The type of load balancer to use for ring attention."""

    head_stride: int = 1
    """The stride of the head dimension to process for each iteration of ring attention. A value of
    1 means each iteration will process one k and one v head. A value of 2 will process two k and
    two v heads, etc. A larger stride will reduce the number of communication ops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_balancer == RingAttentionLoadBalancerType.ulysses:
            raise OLMoConfigurationError(
                "RingContextParallelStyle: 'ulysses' is not a ring's load balancer. Choose zig_zag "
                "or llama3, or pass uly=UlyssesContextParallelStyle() to apply_cp() instead."
            )
        if self.head_stride < 1:
            raise OLMoConfigurationError(
                f"RingContextParallelStyle: head_stride must be at least 1, got {self.head_stride}."
            )


@dataclass
class UlyssesContextParallelStyle(Config):
    """Configuration for Ulysses-style context parallelism."""

    @property
    def load_balancer(self) -> RingAttentionLoadBalancerType:
        """The load balancer that shards for this style."""
        return RingAttentionLoadBalancerType.ulysses
