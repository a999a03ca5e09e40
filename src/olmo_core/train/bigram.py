"""The model to beat: a bigram of tokens, fitted on the same text and judged on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from olmo_core.data.packing import IGNORE_INDEX, PackedBatch
from olmo_core.data.tokens import VOCAB_SIZE


class Bigram:
    """p(b | a) = (count(ab) + k p(b)) / (count(a) + k), with p(b) = (count(b) + 1) / (N + V).

    This is a Dirichlet prior of strength ``k`` around the unigram (MacKay and Peto, 1995, "A
    hierarchical Dirichlet language model"): pairs never seen keep a sensible probability.

    :param stream: tokens, each pair of neighbours counted once.
    :param size: V, of the vocabulary.
    """

    def __init__(self, stream: Tensor, size: int = VOCAB_SIZE, k: float = 5.0) -> None:
        tokens = stream.long()
        self.size, self.k = size, k
        # Those that occur alone: V squared is too many for a vocabulary of words.
        self.pairs, counts = (tokens[:-1] * size + tokens[1:]).unique(return_counts=True)
        self.pair_counts = counts.double()
        self.firsts = torch.bincount(tokens[:-1], minlength=size).double()
        seconds = torch.bincount(tokens[1:], minlength=size).double()
        self.unigram = (seconds + 1) / (seconds.sum() + size)

    def log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Of tokens that follow others, float64."""
        pair = first * self.size + second
        at = torch.searchsorted(self.pairs, pair).clamp(max=max(len(self.pairs) - 1, 0))
        seen = self.pairs[at] == pair if len(self.pairs) else torch.zeros_like(pair).bool()
        counts = self.pair_counts[at].where(seen, 0) if len(self.pairs) else 0.0
        prior = self.k * self.unigram[second]
        return ((counts + prior) / (self.firsts[first] + self.k)).log()

    def bits_per_byte(self, batches: Iterable[PackedBatch]) -> float:
        """Of the labels that :func:`bits_per_byte` counts for a model."""
        nats, n_bytes = 0.0, 0
        for batch in batches:
            keep = batch.labels != IGNORE_INDEX
            inputs, labels = batch.input_ids[keep], batch.labels[keep]
            nats -= float(self.log_probability(inputs, labels).sum())
            n_bytes += batch.num_bytes
        return bits_per_byte(nats, n_bytes)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits that a model spends per byte of text, the ends of documents included in the bits."""
    return nats / math.log(2) / max(n_bytes, 1)
