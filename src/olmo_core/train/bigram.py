"""The model to beat: a bigram of bytes, fitted on the same text and judged on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from olmo_core.data.packing import IGNORE_INDEX, PackedBatch
from olmo_core.data.tokens import EOD, VOCAB_SIZE


class Bigram:
    """p(b | a) = (count(ab) + k p(b)) / (count(a) + k), with p(b) = (count(b) + 1) / (N + V).

    This is a Dirichlet prior of strength ``k`` around the unigram (MacKay and Peto, 1995, "A
    hierarchical Dirichlet language model"): pairs never seen keep a sensible probability.

    :param stream: int16 tokens, each pair of neighbours counted once.
    """

    def __init__(self, stream: Tensor, k: float = 5.0) -> None:
        tokens = stream.long()
        pairs = torch.bincount(tokens[:-1] * VOCAB_SIZE + tokens[1:], minlength=VOCAB_SIZE**2)
        counts = pairs.view(VOCAB_SIZE, VOCAB_SIZE).double()
        unigram = (counts.sum(0) + 1) / (counts.sum() + VOCAB_SIZE)
        probability = (counts + k * unigram) / (counts.sum(1, keepdim=True) + k)
        self.log_probability = probability.log()

    def bits_per_byte(self, batches: Iterable[PackedBatch]) -> float:
        """Of the labels that :func:`bits_per_byte` counts for a model."""
        nats, n_bytes = 0.0, 0
        for batch in batches:
            keep = batch.labels != IGNORE_INDEX
            inputs, labels = batch.input_ids[keep], batch.labels[keep]
            nats -= float(self.log_probability[inputs, labels].sum())
            n_bytes += int((labels != EOD).sum())
        return bits_per_byte(nats, n_bytes)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits that a model spends per byte of text, the ends of documents included in the bits."""
    return nats / math.log(2) / max(n_bytes, 1)
