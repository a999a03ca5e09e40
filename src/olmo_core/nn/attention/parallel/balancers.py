"""How a batch is sharded for context parallelism.

A load balancer pads a batch, cuts it along the sequence and returns the shard of one rank, together
with the lengths that go unchanged into a mixer's ``forward``. It works on each process alone and
communicates nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from olmo_core.config import StrEnum
from olmo_core.nn.attention.parallel import shard
from olmo_core.nn.attention.parallel.layout import (
    BalancedLayout,
    ContiguousLayout,
    Layout,
    ZigZagLayout,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "BalancedLoadBalancer",
    "RingAttentionLlama3LoadBalancer",
    "RingAttentionLoadBalancer",
    "RingAttentionLoadBalancerType",
    "RingAttentionZigZagLoadBalancer",
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

    balanced = "balanced"
    """➡️ :class:`BalancedLoadBalancer`"""

    @property
    def layout(self) -> Layout:
        """How this load balancer deals the tokens."""
        return _BALANCERS[self].layout

    def build(self, cp_mesh: DeviceMesh) -> RingAttentionLoadBalancer:
        """Build the load balancer for this process's place in a mesh.

        :param cp_mesh: One dimension; or two, (ring, Ulysses), where the layers have both styles:
            the sequence is sharded over the ring, and each shard's rows are cut for Ulysses.
        :raises ValueError: If the mesh has other dimensions.
        """
        if cp_mesh.ndim == 2 and self != RingAttentionLoadBalancerType.ulysses:
            return _BALANCERS[self](
                cp_rank=cp_mesh.get_local_rank(0),
                cp_world_size=cp_mesh.size(0),
                ulysses_rank=cp_mesh.get_local_rank(1),
                ulysses_degree=cp_mesh.size(1),
            )
        if cp_mesh.ndim != 1:
            raise ValueError(
                "A mesh for context parallelism has one dimension, or two (ring, Ulysses) for a "
                f"ring's load balancer, got {cp_mesh.ndim} for {self}. Take what shards the "
                "sequence: mesh['cp']."
            )
        return _BALANCERS[self](cp_rank=cp_mesh.get_local_rank(), cp_world_size=cp_mesh.size())


class RingAttentionLoadBalancer(ABC):
    """A class that handles the logic of sharding inputs on the sequence dimension for ring
    attention (context parallelism).

    :param cp_rank: This process's rank in the context-parallel group; in the ring, where there is
        Ulysses inside it.
    :param cp_world_size: How many ranks share a sequence; the ring's size.
    :param ulysses_rank: This process's rank among those that share a ring's shard.
    :param ulysses_degree: How many ranks share a ring's shard. Each has an equal part of its rows.
    :raises ValueError: If a rank is not one of its group.
    """

    layout: ClassVar[Layout]

    def __init__(
        self,
        *,
        cp_rank: int,
        cp_world_size: int,
        ulysses_rank: int = 0,
        ulysses_degree: int = 1,
    ) -> None:
        for name, rank, of, size in (
            ("cp_rank", cp_rank, "cp_world_size", cp_world_size),
            ("ulysses_rank", ulysses_rank, "ulysses_degree", ulysses_degree),
        ):
            if not 0 <= rank < size:
                raise ValueError(f"{name} must be in [0, {of}), got {name}={rank} and {of}={size}.")
        self.cp_rank = cp_rank
        self.cp_world_size = cp_world_size
        self.ulysses_rank = ulysses_rank
        self.ulysses_degree = ulysses_degree

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
        :param length_multiple: The padded total length becomes a multiple of this too; under the
            balanced layout and with Ulysses inside a ring the rank's own rows.

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
        :param length_multiple: The number of the rank's own rows becomes a multiple of this; for
            Ulysses alone the padded total length.

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
        total = x.shape[dim]
        added = -total % self.total_multiple(shard.checked_multiple(length_multiple))
        if added == 0:
            return x, 0
        ends, padded = [0, total], [0, total + added]
        return shard.take(torch.arange(total + added), [x], [dim], [value], ends, padded)[0], added

    def _rows_whole(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> list[Tensor]:
        """See :meth:`RingAttentionLoadBalancer.batch_shard`."""
        multiple = self.total_multiple(shard.checked_multiple(length_multiple))
        total = shard.checked_length(inputs, seq_dims, pad_values)
        padded = [0, shard.ceil(total, multiple)]
        return shard.take(self._own_rows(padded), inputs, seq_dims, pad_values, [0, total], padded)

    def _rows_by_document(
        self,
        *,
        inputs: list[Tensor],
        seq_dims: list[int],
        cu_doc_lens: Tensor,
        pad_values: list[Any] | None = None,
        length_multiple: int | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """See :meth:`RingAttentionLoadBalancer.batch_shard_by_document`."""
        multiple = self._documents_multiple(shard.checked_multiple(length_multiple) or 1)
        real = shard.checked_documents(inputs, seq_dims, cu_doc_lens, pad_values)
        each, padded = self.layout.document_multiple(self.cp_world_size), [0]
        for start, stop in pairwise(real):
            padded.append(padded[-1] + shard.ceil(stop - start, each))
        real, padded = shard.with_padding_document(real, padded, shard.ceil(padded[-1], multiple))
        shards = shard.take(self._own_rows(padded), inputs, seq_dims, pad_values, real, padded)
        keywords = self._keywords(padded, cu_doc_lens)
        return shards, {**keywords, "global_cu_doc_lens": shard.lengths(padded, cu_doc_lens)}

    def _documents_multiple(self, length_multiple: int) -> int:
        """What the padded total of documents is a multiple of."""
        own = self.ulysses_degree * length_multiple
        return lcm(self.cp_world_size * own, self.layout.document_multiple(self.cp_world_size))

    def _own_rows(self, padded: list[int]) -> Tensor:
        ring = self.layout.table(padded, self.cp_world_size).of(self.cp_rank).tokens()
        return ring.chunk(self.ulysses_degree)[self.ulysses_rank]

    def _keywords(self, padded: list[int], like: Tensor) -> dict[str, Any]:
        """What ``forward`` is given beside ``global_cu_doc_lens``."""
        return {}


class RingAttentionZigZagLoadBalancer(RingAttentionLoadBalancer):
    """Implements the zig-zag load-balancing strategy.

    The sequence, or by document each document, is cut into ``2 * cp_world_size`` chunks, and rank
    ``r`` holds chunks ``r`` and ``2 * cp_world_size - 1 - r``. By document each document is padded
    at its own end, and ``length_multiple`` is of the *local* length.
    """

    layout = ZigZagLayout()
    batch_shard = RingAttentionLoadBalancer._rows_whole
    batch_shard_by_document = RingAttentionLoadBalancer._rows_by_document

    def total_multiple(self, length_multiple: int | None = None) -> int:
        if self.ulysses_degree > 1:
            return self._documents_multiple(length_multiple or 1)
        return lcm(2 * self.cp_world_size, length_multiple or 1)

    def _keywords(self, padded: list[int], like: Tensor) -> dict[str, Any]:
        n = self.cp_world_size
        return {
            "cu_doc_lens": shard.lengths([end // n for end in padded], like),
            "max_doc_len": shard.longest(padded) // n,
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
    batch_shard_by_document = RingAttentionLoadBalancer._rows_by_document

    def total_multiple(self, length_multiple: int | None = None) -> int:
        return self._documents_multiple(length_multiple or 1)

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

    def _keywords(self, padded: list[int], like: Tensor) -> dict[str, Any]:
        spans = self.layout.spans(padded, self.cp_world_size)[self.cp_rank]
        cu_q, cu_k = [0], [0]
        for span in spans:
            cu_q.append(cu_q[-1] + span.stop - span.start)
            cu_k.append(cu_k[-1] + span.stop - span.document)
        return {
            "cu_doc_lens_q": shard.lengths(cu_q, like),
            "cu_doc_lens_k": shard.lengths(cu_k, like),
            "max_doc_len_q": shard.longest(cu_q),
            "max_doc_len_k": shard.longest(cu_k),
            "local_k_slice": slice(spans[0].document, spans[-1].stop),
        }


class BalancedLoadBalancer(RingAttentionLoadBalancer):
    """Zig-zag for long documents, short ones whole: see :class:`.BalancedLayout`.

    Documents are not padded; padding is one last document. ``length_multiple`` is of the rank's own
    rows. :meth:`batch_shard` makes each row of the batch a document.
    """

    layout = BalancedLayout()
    batch_shard = RingAttentionLoadBalancer._rows_whole
    batch_shard_by_document = RingAttentionLoadBalancer._rows_by_document

    def total_multiple(self, length_multiple: int | None = None) -> int:
        return self._documents_multiple(length_multiple or 1)


class UlyssesLoadBalancer(RingAttentionLoadBalancer):
    """Implements simple contiguous sequence sharding for Ulysses-style context parallelism.

    Unlike ring attention which uses zig-zag or other interleaving strategies, Ulysses just needs
    simple contiguous chunking since the all-to-all communication handles the sequence/head
    exchange.
    The lengths it returns are those of the whole sequence, padding being a last document.
    """

    layout = ContiguousLayout()
    batch_shard = RingAttentionLoadBalancer._rows_whole
    batch_shard_by_document = RingAttentionLoadBalancer._rows_by_document

    def __init__(self, *, cp_rank: int, cp_world_size: int) -> None:
        super().__init__(cp_rank=cp_rank, cp_world_size=cp_world_size)

    def _documents_multiple(self, length_multiple: int) -> int:
        return self.total_multiple(length_multiple)

    def _keywords(self, padded: list[int], like: Tensor) -> dict[str, Any]:
        return {
            "cu_doc_lens": shard.lengths(padded, like),
            "max_doc_len": shard.longest(padded),
        }


_BALANCERS: dict[str, type[RingAttentionLoadBalancer]] = {
    RingAttentionLoadBalancerType.zig_zag: RingAttentionZigZagLoadBalancer,
    RingAttentionLoadBalancerType.llama3: RingAttentionLlama3LoadBalancer,
    RingAttentionLoadBalancerType.ulysses: UlyssesLoadBalancer,
    RingAttentionLoadBalancerType.balanced: BalancedLoadBalancer,
}
