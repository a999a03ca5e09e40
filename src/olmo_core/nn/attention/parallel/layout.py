"""Which rank holds which tokens, in which order: the one mechanism behind every load balancer.

A layout cuts one sequence of packed documents into *spans* and deals them to the ranks. Sharding,
RoPE's positions and the attention schedules all read the same spans, so they can't disagree.
Everything here is in coordinates of the padded, unsharded sequence, and on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Neighbouring tokens of one document that one rank holds in neighbouring rows."""

    document: int
    """Where the document starts."""
    start: int
    stop: int
    """One past the last token."""


class SpanTable(NamedTuple):
    """Spans as columns, each ``(spans,)``, int64, CPU: thousands of them are dealt at once.

    Ordered by rank and, in a rank, by row, which is also the order of their tokens.
    """

    rank: Tensor
    document: Tensor
    start: Tensor
    stop: Tensor

    def of(self, rank: int) -> SpanTable:
        """The spans of one rank."""
        first, last = torch.searchsorted(self.rank, torch.tensor([rank, rank + 1])).tolist()
        return SpanTable(*(column[first:last] for column in self))

    def cut(self, rows: int) -> SpanTable:
        """The same rows in the same order, dealt to ranks that hold ``rows`` each."""
        first = (self.stop - self.start).cumsum(0) - (self.stop - self.start)
        total = int((self.stop - self.start).sum())
        cuts = torch.cat([first, torch.arange(0, total + 1, max(rows, 1))]).unique()
        row, length = cuts[:-1], cuts.diff()
        span = torch.searchsorted(first, row, right=True) - 1
        start = self.start[span] + row - first[span]
        return SpanTable(
            row.div(max(rows, 1), rounding_mode="floor"), self.document[span], start, start + length
        )

    def lists(self, n: int) -> list[list[Span]]:
        """The spans of each of ``n`` ranks."""
        ranks: list[list[Span]] = [[] for _ in range(n)]
        for rank, *span in zip(*(column.tolist() for column in self), strict=True):
            ranks[rank].append(Span(*span))
        return ranks

    def tokens(self) -> Tensor:
        """Which token of the sequence each row holds: int64, CPU."""
        return count_up(self.start, self.stop - self.start)

    def positions(self) -> Tensor:
        """The position of each row's token inside its document: int64, CPU."""
        return count_up(self.start - self.document, self.stop - self.start)


class Layout(ABC):
    """How the tokens of packed documents are dealt to ``n`` ranks."""

    name: ClassVar[str]
    """What ops call it."""

    @abstractmethod
    def document_multiple(self, n: int) -> int:
        """What the length of every document must be a multiple of, for ``n`` ranks."""

    @abstractmethod
    def table(self, cu: Sequence[int], n: int) -> SpanTable:
        """The spans of all ranks. All ranks hold equally many tokens, in increasing order.

        :param cu: Cumulative lengths of the padded documents, first element 0; repeated ends are
            empty documents.
        :param n: How many ranks there are.
        :raises ValueError: If the lengths can't be dealt evenly.
        """

    def spans(self, cu: Sequence[int], n: int) -> list[list[Span]]:
        """:meth:`table` as a list of spans for each rank, in the order of its rows."""
        return self.table(cu, n).lists(n)

    def positions(self, cu: Sequence[int], n: int, rank: int) -> Tensor:
        """The position inside its document of each of the rank's tokens: int64, CPU."""
        return self.table(cu, n).of(rank).positions()


class ContiguousLayout(Layout):
    """Rank ``r`` of ``n`` holds tokens ``[r * T / n, (r + 1) * T / n)``."""

    name = "contiguous"

    def document_multiple(self, n: int) -> int:
        return 1

    def table(self, cu: Sequence[int], n: int) -> SpanTable:
        rows = _rows_of_a_rank(cu, n)
        ends = torch.tensor(cu, dtype=torch.int64)
        cuts = torch.cat([ends, torch.arange(n + 1) * rows]).unique()
        start, stop = cuts[:-1], cuts[1:]
        document = ends[torch.searchsorted(ends, start, right=True) - 1]
        return SpanTable(start.div(max(rows, 1), rounding_mode="floor"), document, start, stop)


class ZigZagLayout(Layout):
    """Each document is cut into ``2 * n`` equal chunks; rank ``r`` holds chunks ``r`` and
    ``2 * n - 1 - r``, which gives every rank the same share of a causal mask.
    """

    name = "zig_zag"

    def document_multiple(self, n: int) -> int:
        return 2 * n

    def table(self, cu: Sequence[int], n: int) -> SpanTable:
        ends = torch.tensor(cu, dtype=torch.int64)
        lengths = ends.diff()
        uneven = lengths[lengths % (2 * n) != 0]
        if len(uneven) > 0:
            raise ValueError(
                f"A document of {int(uneven[0])} tokens can't be cut into {2 * n} equal chunks: "
                f"pad every document to a multiple of {2 * n}."
            )
        document, chunk = ends[:-1][lengths > 0], lengths[lengths > 0] // (2 * n)
        rank = torch.arange(n)[:, None, None]
        which = torch.cat([rank, 2 * n - 1 - rank], dim=2)  # (ranks, 1, 2)
        start = document[:, None] + which * chunk[:, None]  # (ranks, documents, 2)
        stop = start + chunk[:, None]
        rank, document = rank.expand_as(start), document[:, None].expand_as(start)
        return _joined(SpanTable(*(c.flatten() for c in (rank, document, start, stop))))


class BalancedLayout(Layout):
    """Long documents in zig-zag, short ones whole: the balance of zig-zag in fewer pieces.

    A document is long if it has a quarter of a rank's tokens, or a quarter of its fair share of the
    work, the sum of squared lengths. Long ones are cut into ``2 * n`` equal chunks; their tails of
    fewer than ``2 * n`` tokens and all short ones go, the longest first, to the rank with the least
    work that has room, and are cut only where no rank has (a tail also where it is heavy).
    """

    name = "balanced"

    def document_multiple(self, n: int) -> int:
        return 1

    def table(self, cu: Sequence[int], n: int) -> SpanTable:
        rows = _rows_of_a_rank(cu, n)
        work = sum((b - a) ** 2 for a, b in pairwise(cu)) / n
        long, whole = [0], []  # ends of what is cut in zig-zag, as if neighbours; the rest
        origins = []
        for a, b in pairwise(cu):
            even = (b - a) // (2 * n) * 2 * n
            if even > 0 and (4 * (b - a) >= rows or 4 * (b - a) ** 2 >= work):
                long.append(long[-1] + even)
                origins.append(a)
                # A tail that would show in the balance by itself is cut once more.
                heavy = 16 * ((b - a) ** 2 - even**2) > work
                pieces = max(1, min(n, b - a - even) if heavy else 1)
                cuts = [a + even + i * (b - a - even) // pieces for i in range(pieces)] + [b]
                whole += [Span(a, *piece) for piece in pairwise(cuts) if piece[0] < piece[1]]
            elif a < b:
                whole.append(Span(a, a, b))
        zig_zag = ZigZagLayout().table(long, n)
        shift = torch.tensor([a - c for a, c in zip(origins, long)], dtype=torch.int64)
        shift = shift[torch.searchsorted(torch.tensor(long), zig_zag.document, right=True) - 1]
        chunks = [zig_zag.rank, *(column + shift for column in zig_zag[1:])]
        packed = torch.tensor(_packed(whole, [rows - long[-1] // n] * n), dtype=torch.int64).view(
            -1, 4
        )
        table = torch.stack([torch.cat(c) for c in zip(chunks, packed.unbind(1), strict=True)])
        order = (table[0] * (cu[-1] + 1) + table[2]).argsort()
        return _joined(SpanTable(*table[:, order]))


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (ContiguousLayout(), ZigZagLayout(), BalancedLayout())
}
"""By the names that ops carry."""


def token_index(spans: Iterable[Span]) -> Tensor:
    """Which token of the sequence each row holds: int64, CPU."""
    return _columns(spans).tokens()


def token_positions(spans: Iterable[Span]) -> Tensor:
    """The position inside its document of the token that each row holds: int64, CPU."""
    return _columns(spans).positions()


def count_up(firsts: Tensor, lengths: Tensor) -> Tensor:
    """Counts up from ``firsts[i]`` for ``lengths[i]`` steps, one ``i`` after the other."""
    before = lengths.cumsum(0) - lengths
    steps = torch.repeat_interleave(firsts - before, lengths)
    return torch.arange(len(steps), dtype=torch.int64) + steps


def _columns(spans: Iterable[Span]) -> SpanTable:
    columns = torch.tensor([(0, *span) for span in spans], dtype=torch.int64).view(-1, 4)
    return SpanTable(*columns.unbind(1))


def _rows_of_a_rank(cu: Sequence[int], n: int) -> int:
    if cu[-1] % n != 0:
        raise ValueError(f"{cu[-1]} tokens can't be dealt evenly to {n} ranks: pad them first.")
    return cu[-1] // n


def _joined(table: SpanTable) -> SpanTable:
    """Spans of one rank and document that touch are one."""
    rank, document, start, stop = table
    touch = (rank[1:] == rank[:-1]) & (document[1:] == document[:-1]) & (start[1:] == stop[:-1])
    if not touch.any():
        return table
    edge = touch.new_ones(1)
    first, last = torch.cat([edge, ~touch]), torch.cat([~touch, edge])
    return SpanTable(rank[first], document[first], start[first], stop[last])


def _packed(spans: list[Span], room: list[int]) -> list[tuple[int, int, int, int]]:
    """``(rank, *span)`` for each of ``spans``: whole ones by work, where there is room."""
    placed: list[tuple[int, int, int, int]] = []
    # Work that each rank has beside the zig-zag chunks, of which all have the same; then its room,
    # the most first.
    ranks = [(0, -tokens, rank) for rank, tokens in enumerate(room) if tokens > 0]
    heapify(ranks)
    for document, start, stop in sorted(spans, key=lambda s: (s.start - s.stop, s.start)):
        tried = []
        while ranks and -ranks[0][1] < stop - start:
            tried.append(heappop(ranks))
        if ranks:
            pieces = [(heappop(ranks), start, stop)]
        else:  # the longest that is left fits nowhere: the roomiest rank is filled up with it
            pieces, tried = [], sorted(tried, key=lambda entry: (entry[1], entry[0]))
            while start < stop:
                most = tried.pop(0)
                end = min(stop, start - most[1])
                pieces.append((most, start, end))
                start = end
        for entry in tried:
            heappush(ranks, entry)
        for (work, left, rank), a, b in pieces:
            placed.append((rank, document, a, b))
            # Twice the scores that the span's queries see.
            work += (b - document) * (b - document + 1) - (a - document) * (a - document + 1)
            if left + b - a < 0:
                heappush(ranks, (work, left + b - a, rank))
    return placed
