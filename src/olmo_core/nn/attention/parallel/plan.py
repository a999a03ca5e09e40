"""What one rank does for one batch: worked out on the host from the documents, kept with them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from olmo_core.nn.attention.parallel.exchange import Exchange, plan_exchange
from olmo_core.nn.attention.parallel.layout import LAYOUTS, SpanTable, count_up
from olmo_core.nn.attention.parallel.readings import Reading, short
from olmo_core.nn.attention.segments import Segments

WHOLE = "whole"
"""In place of a layout's name: every Ulysses group has all of the sequence."""


def check_documents(
    lengths: Tensor | None, reading: Reading, layout: str, ranks: int, batch: int, rows: int
) -> None:
    """Refuse lengths that the shards do not fit.

    :param lengths: What ``reading`` is of.
    :param layout: The name of a layout, or :data:`WHOLE`.
    :param ranks: How many the layout deals to.
    :param batch: Rows of the batch.
    :param rows: One rank's tokens in each.
    :raises TypeError: If the lengths are not int32.
    :raises ValueError: If they do not describe shards of this size.
    """
    values, total = reading.values, ranks * rows
    if lengths is not None:
        if lengths.dtype != torch.int32:
            raise TypeError(f"Document lengths must be torch.int32, got {lengths.dtype}.")
        if lengths.dim() != 1 or len(values) < 2:
            raise ValueError(
                "Document lengths must be 1-D with one element more than there are documents, got "
                f"shape {tuple(lengths.shape)}."
            )
        if layout == WHOLE:
            total *= batch
        elif batch > 1:
            raise ValueError(
                f"A ring shards documents of one sequence, got {batch} rows with lengths. Flatten "
                "the batch into one row before the load balancer shards it."
            )
        if values[0] != 0 or any(b < a for a, b in pairwise(values)):
            raise ValueError(
                f"Document lengths must start at 0 and not decrease, got {short(values)}."
            )
    if values[-1] != total:
        raise ValueError(
            f"The documents of the whole sequence must end where its {ranks} {layout} shards of "
            f"{rows} tokens do, at {total}, got {short(values)}. Pass what the load balancer "
            "returned, with the shard that it returned."
        )
    if layout != WHOLE:
        span_table(reading, layout, ranks)  # raises if they can't be dealt so


def span_table(reading: Reading, layout: str, ranks: int) -> SpanTable:
    """Which rank holds what."""
    return reading.derive(
        ("spans", layout, ranks), lambda: LAYOUTS[layout].table(reading.values, ranks)
    )


@dataclass(frozen=True)
class GatherPlan:
    """One rank's part in a gather of keys: an exchange, and one varlen problem on its result."""

    exchange: Exchange
    segments: Segments


def gather_plan(
    reading: Reading, layout: str, ranks: int, rank: int, window: int, batch: int
) -> GatherPlan:
    """The keys that each span of ``rank`` sees, from the start of its document or its window on.

    :param batch: Rows that hold the same documents.
    """

    def compute() -> GatherPlan:
        held = span_table(reading, layout, ranks)
        first = held.document
        if window > 0:
            first = torch.maximum(first, held.start - window + 1)
        seen = SpanTable(held.rank, held.document, first, held.stop)
        queries, keys = held.of(rank), seen.of(rank)
        n_q, n_k = queries.stop - queries.start, keys.stop - keys.start
        cu_q = _cumulative(n_q, batch, reading.device)
        # Kernels know self-attention by lengths that are one tensor.
        cu_k = cu_q if torch.equal(n_q, n_k) else _cumulative(n_k, batch, reading.device)
        segments = Segments(cu_q, cu_k, _longest(n_q), _longest(n_k), True, window)
        return GatherPlan(plan_exchange(held, seen, rank, ranks).to(reading.device), segments)

    return reading.derive(("gather", layout, ranks, rank, window, batch), compute)


@dataclass(frozen=True)
class RingPlan:
    """The three problems of a ring in zig-zag: a document's rows are an early and a late half.

    Rows are those of the flattened batch. A shard that comes from an earlier rank is seen by its
    early halves, by all queries; one from a later rank wholly, by the late halves of the queries.
    """

    held: int
    early: Tensor
    """Rows of the early halves, int64."""
    late: Tensor
    own: Segments
    from_earlier: Segments
    from_later: Segments


def ring_plan(reading: Reading, ranks: int, batch: int) -> RingPlan:
    """The same for all ranks of the ring.

    :param batch: Rows that hold the same documents.
    """

    def compute() -> RingPlan:
        lengths = torch.tensor(reading.values, dtype=torch.int64).diff() // ranks
        all_lengths = lengths.repeat(batch)
        starts, half = all_lengths.cumsum(0) - all_lengths, all_lengths // 2
        cu = _cumulative(lengths, batch, reading.device)
        cu_half = _cumulative(lengths // 2, batch, reading.device)
        longest = _longest(lengths)
        return RingPlan(
            held=int(lengths.sum()),
            early=count_up(starts, half).to(reading.device),
            late=count_up(starts + half, half).to(reading.device),
            own=Segments(cu, cu, longest, longest),
            from_earlier=Segments(cu, cu_half, longest, longest // 2, causal=False),
            from_later=Segments(cu_half, cu, longest // 2, longest, causal=False),
        )

    return reading.derive(("ring", ranks, batch), compute)


def plan_positions(
    reading: Reading, layout: str, ranks: int, rank: int, parts: int, part: int, rows: int
) -> Tensor:
    """The position of each row of a shard inside its document: int64, ``(1, rows)``, or
    ``(batch, rows)`` with :data:`WHOLE` and documents of a batch.

    :param parts: How many ranks share the layout's shard; ``part`` is this one's part.
    :param rows: Of this rank, in each row of the batch.
    """

    def compute() -> Tensor:
        if layout == WHOLE:
            ends = torch.tensor(reading.values, dtype=torch.int64)
            position = count_up(torch.zeros_like(ends[1:]), ends.diff())
        else:
            position = span_table(reading, layout, ranks).of(rank).positions()
        whole = position.view(-1, rows * parts)
        return whole[:, part * rows : (part + 1) * rows].to(reading.device)

    return reading.derive(("positions", layout, ranks, rank, parts, part, rows), compute)


def _cumulative(lengths: Tensor, batch: int, device: torch.device) -> Tensor:
    ends = torch.cat([lengths.new_zeros(1), lengths.repeat(batch).cumsum(0)])
    return ends.to(torch.int32).to(device)


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0
