"""Which rank holds which tokens, in which order: the one mechanism behind every load balancer.

A layout cuts one sequence of packed documents into *spans* and deals them to the ranks. Sharding,
RoPE's positions and the attention schedules all read the same spans, so they can't disagree.
Everything here is in coordinates of the padded, unsharded sequence, and on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ContiguousLayout", "Layout", "Span", "ZigZagLayout", "token_index", "token_positions"]


class Span(NamedTuple):
    """Neighbouring tokens of one document that one rank holds in neighbouring rows."""

    document: int
    """Where the document starts."""
    start: int
    stop: int
    """One past the last token."""


class Layout(ABC):
    """How the tokens of packed documents are dealt to ``n`` ranks."""

    @abstractmethod
    def document_multiple(self, n: int) -> int:
        """What the length of every document must be a multiple of, for ``n`` ranks."""

    @abstractmethod
    def spans(self, cu: list[int], n: int) -> list[list[Span]]:
        """The spans of each rank, in the order of its rows. All ranks hold equally many tokens.

        :param cu: Cumulative lengths of the padded documents, first element 0; repeated ends are
            empty documents.
        :param n: How many ranks there are.
        :raises ValueError: If the lengths can't be dealt evenly.
        """

    def positions(self, cu: list[int], n: int, rank: int) -> Tensor:
        """The position inside its document of each of the rank's tokens: int64, CPU."""
        return token_positions(self.spans(cu, n)[rank])


class ContiguousLayout(Layout):
    """Rank ``r`` of ``n`` holds tokens ``[r * T / n, (r + 1) * T / n)``."""

    def document_multiple(self, n: int) -> int:
        return 1

    def spans(self, cu: list[int], n: int) -> list[list[Span]]:
        total = cu[-1]
        if total % n != 0:
            raise ValueError(f"{total} tokens can't be dealt evenly to {n} ranks: pad them first.")
        ranks = []
        for rank in range(n):
            first, last = rank * total // n, (rank + 1) * total // n
            pieces = (Span(a, max(a, first), min(b, last)) for a, b in pairwise(cu))
            ranks.append([span for span in pieces if span.start < span.stop])
        return ranks


class ZigZagLayout(Layout):
    """Each document is cut into ``2 * n`` equal chunks; rank ``r`` holds chunks ``r`` and
    ``2 * n - 1 - r``, which gives every rank the same share of a causal mask.
    """

    def document_multiple(self, n: int) -> int:
        return 2 * n

    def spans(self, cu: list[int], n: int) -> list[list[Span]]:
        ranks: list[list[Span]] = [[] for _ in range(n)]
        for start, stop in pairwise(cu):
            if start == stop:
                continue
            chunk, rest = divmod(stop - start, 2 * n)
            if rest != 0:
                raise ValueError(
                    f"A document of {stop - start} tokens can't be cut into {2 * n} equal chunks: "
                    f"pad every document to a multiple of {2 * n}."
                )
            for rank, spans in enumerate(ranks):
                low, high = start + rank * chunk, start + (2 * n - 1 - rank) * chunk
                if low + chunk == high:  # the last rank's two chunks touch
                    spans.append(Span(start, low, high + chunk))
                else:
                    spans += [Span(start, low, low + chunk), Span(start, high, high + chunk)]
        return ranks


def token_index(spans: list[Span]) -> Tensor:
    """Which token of the sequence each row holds: int64, CPU."""
    return _rows(spans, [span.start for span in spans])


def token_positions(spans: list[Span]) -> Tensor:
    """The position inside its document of the token that each row holds: int64, CPU."""
    return _rows(spans, [span.start - span.document for span in spans])


def _rows(spans: list[Span], firsts: list[int]) -> Tensor:
    """Counts up from ``firsts[i]`` through span ``i``, span after span."""
    lengths = torch.tensor([span.stop - span.start for span in spans], dtype=torch.int64)
    ends = lengths.cumsum(0)
    offset = torch.tensor(firsts, dtype=torch.int64) - (ends - lengths)
    steps = torch.repeat_interleave(offset, lengths)
    return torch.arange(len(steps), dtype=torch.int64) + steps
