"""Packed batches: whole documents side by side in rows of one length.

Batch number ``step`` depends on the documents, the settings, the seed and ``step`` alone:
training resumes without any iterator state.

B: batch, T: sequence length, N: most documents that a batch can hold.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_core.data.doc_lens import DocLens, doc_lens_from_lengths
from olmo_core.data.vocabulary import ByteVocabulary, Vocabulary

IGNORE_INDEX = -100


class Span(NamedTuple):
    """A piece of a document: ``length`` predictions from ``start`` in the stream on."""

    start: int
    length: int


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One batch. Labels are the inputs' successors inside each document, padding is
    ``IGNORE_INDEX``."""

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64."""
    doc_lens: DocLens
    """Documents over the flattened B * T, in a vector of the same size for every batch."""
    num_bytes: int
    """Of the text that the labels stand for; of the whole batch, where this is a share of it."""
    num_labels: int
    """That are not padding, likewise of the whole batch."""

    def to(self, device: torch.device | str) -> PackedBatch:
        cu, longest = self.doc_lens
        return PackedBatch(
            self.input_ids.to(device),
            self.labels.to(device),
            DocLens(cu.to(device), longest),
            self.num_bytes,
            self.num_labels,
        )


class PackedDocuments:
    """All documents in one stream of tokens, cut into pieces, the pieces packed into rows of T.

    A document longer than ``max_doc_len`` is cut into pieces of that length; every token and every
    document's end is predicted exactly once an epoch. Rows are filled by best fit, longest piece
    first (Ding et al., 2024, "Fewer truncations improve language modeling", arXiv:2404.10830);
    each epoch visits them in an order of its own.

    :param documents: as from :func:`~olmo_core.data.documents.load_documents`.
    :param batch_size: B, rows of a batch.
    :param sequence_length: T, tokens of a row.
    :param max_doc_len: longest piece in tokens, at most T; ``None`` is T.
    :param vocabulary: what the tokens are; bytes if not given.
    :param seed: of what shares a row, and of the order of rows.
    :raises ValueError: for no documents, or lengths below 1.
    """

    def __init__(
        self,
        documents: list[bytes],
        *,
        batch_size: int,
        sequence_length: int,
        max_doc_len: int | None = None,
        seed: int = 0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        max_doc_len = sequence_length if max_doc_len is None else max_doc_len
        for name, value in [
            ("batch_size", batch_size),
            ("sequence_length", sequence_length),
            ("max_doc_len", max_doc_len),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_doc_len > sequence_length:
            raise ValueError(
                f"max_doc_len={max_doc_len} exceeds sequence_length={sequence_length}: "
                "documents do not cross rows"
            )
        if not documents:
            raise ValueError("there are no documents to pack")
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.max_doc_len = max_doc_len
        self.seed = seed
        self.vocabulary = ByteVocabulary() if vocabulary is None else vocabulary
        self.stream, self.sizes, lengths = token_stream(documents, self.vocabulary)
        self.rows = pack_rows(_pieces(lengths, max_doc_len), sequence_length, seed)
        self._documents_of_row = max(len(self._lengths(row)) for row in [*self.rows, []])
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def num_tokens(self) -> int:
        """Predictions in an epoch."""
        return self.stream.numel() - 1

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int, *, share: tuple[int, int] = (0, 1)) -> PackedBatch:
        """Batch number ``step`` >= 0 of an endless run over the epochs.

        :param share: (i, n), the i-th of n equal parts of its rows. n must divide ``batch_size``.
        """
        first = step * self.batch_size
        return self._assemble([self._row(first + i) for i in range(self.batch_size)], share)

    def one_epoch(
        self, limit: int | None = None, *, share: tuple[int, int] = (0, 1)
    ) -> Iterator[PackedBatch]:
        """Every row once, at most ``limit`` batches; the last batch is padded with empty rows.

        :param share: of each batch, as in :meth:`batch`.
        """
        rows = [self._row(i) for i in range(len(self.rows))]
        for start in range(0, len(rows), self.batch_size)[:limit]:
            chosen = rows[start : start + self.batch_size]
            yield self._assemble(chosen + [[]] * (self.batch_size - len(chosen)), share)

    def _row(self, index: int) -> list[Span]:
        epoch, i = divmod(index, len(self.rows))
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self.rows[self._order[1][i]]

    def _lengths(self, spans: list[Span]) -> list[int]:
        """Document lengths of a row; its padding is documents too, none above ``max_doc_len``."""
        lengths = [span.length for span in spans]
        padding = self.sequence_length - sum(lengths)
        while padding:
            lengths.append(min(padding, self.max_doc_len))
            padding -= lengths[-1]
        return lengths

    def _assemble(self, rows: list[list[Span]], share: tuple[int, int]) -> PackedBatch:
        part, parts = share
        if not 0 <= part < parts or len(rows) % parts:
            raise ValueError(f"there is no part {part} of {parts} equal ones of {len(rows)} rows")
        spans_of_all = [span for row in rows for span in row]
        num_bytes = sum(
            int(self.sizes[start + 1 : start + length + 1].sum()) for start, length in spans_of_all
        )
        num_labels = sum(span.length for span in spans_of_all)

        own = len(rows) // parts
        rows = rows[part * own : (part + 1) * own]
        shape = (len(rows), self.sequence_length)
        input_ids = torch.full(shape, self.vocabulary.end, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, spans in enumerate(rows):
            at = 0
            for span in spans:
                tokens = self.stream[span.start : span.start + span.length + 1]
                input_ids[row, at : at + span.length] = tokens[:-1]
                labels[row, at : at + span.length] = tokens[1:]
                at += span.length
        lengths = [length for spans in rows for length in self._lengths(spans)]
        size = 1 + len(rows) * self._documents_of_row
        cu, _ = doc_lens_from_lengths(lengths, total=input_ids.numel(), size=size)
        doc_lens = DocLens(cu, self.max_doc_len)
        return PackedBatch(input_ids, labels, doc_lens, num_bytes, num_labels)


def token_stream(
    documents: list[bytes], vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, list[int]]:
    """The end, first document, the end, second document, ..., the end: any pair of neighbours is an
    input and its label.

    :returns: the tokens, int16 or int32; the bytes that each stands for, int32; the number of
        tokens of each document, without its end.
    """
    dtype = torch.int16 if vocabulary.size <= 2**15 else torch.int32
    end, none = torch.tensor([vocabulary.end]), torch.tensor([0])
    parts, sizes, lengths = [end], [none], []
    for document in documents:
        ids, n_bytes = vocabulary.encode(document)
        lengths.append(ids.numel())
        parts += [ids, end]
        sizes += [n_bytes, none]
    return torch.cat(parts).to(dtype), torch.cat(sizes).to(torch.int32), lengths


def pack_rows(pieces: list[Span], capacity: int, seed: int) -> list[list[Span]]:
    """Best-fit decreasing: each piece goes where it leaves the least room."""
    pieces = list(pieces)
    random.Random(f"{seed}:pack").shuffle(pieces)
    pieces.sort(key=lambda piece: -piece.length)
    rows: list[list[Span]] = []
    room: dict[int, list[int]] = {}
    # Bit r is set while some row has room for r tokens: the best fit is the lowest bit from
    # length up.
    open_rooms = 0
    for piece in pieces:
        fitting = open_rooms >> piece.length
        if fitting:
            left = piece.length + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                open_rooms ^= 1 << left
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left -= piece.length
        if left:
            room.setdefault(left, []).append(row)
            open_rooms |= 1 << left
    return rows


def _pieces(lengths: list[int], max_doc_len: int) -> list[Span]:
    pieces = []
    start = 0
    for length in lengths:
        end = start + length + 1
        pieces += [Span(at, min(max_doc_len, end - at)) for at in range(start, end, max_doc_len)]
        start = end
    return pieces
