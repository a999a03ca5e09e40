from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_core.data import EOD, IGNORE_INDEX, PackedBatch, PackedDocuments, decode, encode
from olmo_core.data.packing import Span, pack_rows

documents_lists = st.lists(st.binary(min_size=0, max_size=40), min_size=1, max_size=12)


def predictions(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each document of a batch, padding left out."""
    ends = batch.doc_lens.cu_doc_lens.tolist()
    inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    pieces = [(inputs[a:b], labels[a:b]) for a, b in itertools.pairwise(ends) if b > a]
    return [(x, y) for x, y in pieces if y != [IGNORE_INDEX] * len(y)]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    documents=documents_lists, b=st.integers(1, 3), t=st.integers(1, 16), m=st.integers(1, 16),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_an_epoch_predicts_everything_once_and_nothing_else(
    documents: list[bytes], b: int, t: int, m: int, seed: int
) -> None:
    m = min(m, t)
    data = PackedDocuments(documents, batch_size=b, sequence_length=t, max_doc_len=m, seed=seed)
    seen: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    batches = list(data.one_epoch())
    assert len(batches) == data.batches_per_epoch
    for batch in batches:
        assert batch.input_ids.shape == batch.labels.shape == (b, t)
        cu = batch.doc_lens.cu_doc_lens
        assert cu[0] == 0 and cu[-1] == b * t and cu.diff().max() <= batch.doc_lens.max_doc_len == m
        assert cu.shape == batches[0].doc_lens.cu_doc_lens.shape and cu.diff().min() >= 0
        seen.update((tuple(x), tuple(y)) for x, y in predictions(batch))
    expected: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for document in documents:
        tokens = (EOD, *document, EOD)
        for i in range(0, len(document) + 1, m):
            end = min(i + m, len(document) + 1)
            expected[tokens[i:end], tokens[i + 1 : end + 1]] += 1
    assert seen == expected
    assert data.num_tokens == sum(len(d) + 1 for d in documents)


def test_batches_depend_on_seed_and_step_alone() -> None:
    documents = [bytes([i]) * (i + 1) for i in range(40)]

    def build(seed: int) -> PackedDocuments:
        return PackedDocuments(documents, batch_size=2, sequence_length=64, seed=seed)

    one, two, other = build(1), build(1), build(2)
    steps = 3 * one.batches_per_epoch
    backwards = {step: two.batch(step) for step in reversed(range(steps))}
    for step in range(steps):
        assert torch.equal(one.batch(step).input_ids, backwards[step].input_ids)
        assert torch.equal(one.batch(step).labels, backwards[step].labels)
    assert not torch.equal(one.batch(0).input_ids, other.batch(0).input_ids)


def test_every_epoch_has_an_order_of_its_own() -> None:
    documents = [bytes([i]) * 8 for i in range(32)]
    data = PackedDocuments(documents, batch_size=1, sequence_length=9)
    order = [int(data.batch(step).input_ids[0, 1]) for step in range(96)]
    epochs = [order[:32], order[32:64], order[64:]]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@settings(derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=200), seed=st.integers(0, 9))
def test_rows_are_nearly_full(lengths: list[int], seed: int) -> None:
    pieces = [Span(i, n) for i, n in enumerate(lengths)]
    rows = pack_rows(pieces, 32, seed)
    assert sorted(p for row in rows for p in row) == pieces
    assert all(sum(p.length for p in row) <= 32 for row in rows)
    # Best-fit decreasing needs at most 11/9 of the best packing's rows, and one more.
    assert len(rows) <= 11 / 9 * max(1, -(-sum(lengths) // 32)) + 1 or max(lengths) > 16


def test_limit_and_empty_rows_of_the_last_batch() -> None:
    data = PackedDocuments([b"abc", b"defg"], batch_size=3, sequence_length=5)
    (batch,) = data.one_epoch()
    assert (batch.labels != IGNORE_INDEX).sum() == 9 and batch.labels.shape == (3, 5)
    assert len(list(data.one_epoch(limit=0))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"max_doc_len": 0}, "max_doc_len"),
        ({"max_doc_len": 9}, "max_doc_len=9 exceeds sequence_length=8"),
        ({"documents": []}, "no documents"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    settings = {"documents": [b"a"], "batch_size": 1, "sequence_length": 8, **options}
    with pytest.raises(ValueError, match=message):
        PackedDocuments(**settings)  # type: ignore[arg-type]


def test_tokens_round_trip() -> None:
    text = "Ay, ’tis «so» — 王"
    assert encode(text)[0] == EOD and decode(encode(text)) == text
    assert decode([EOD, 0xE2, 0x80]) == "�"
    assert encode(b"\xff") == [EOD, 255]


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_parts_of_a_batch_are_the_batch(parts: int) -> None:
    documents = [bytes([i]) * (i % 11 + 1) for i in range(70)]
    data = PackedDocuments(documents, batch_size=6, sequence_length=16, max_doc_len=9)
    pairs = [(data.batch(3), [data.batch(3, share=(i, parts)) for i in range(parts)])]
    shares = [data.one_epoch(share=(i, parts)) for i in range(parts)]
    pairs += zip(data.one_epoch(), map(list, zip(*shares, strict=True)), strict=True)
    for whole, shared in pairs:
        for name in ("input_ids", "labels"):
            joined = torch.cat([getattr(part, name) for part in shared])
            assert torch.equal(joined, getattr(whole, name))
        found = [p for part in shared for p in predictions(part)]
        assert found == predictions(whole)
        assert {part.num_bytes for part in shared} == {whole.num_bytes}
        counted = int((whole.labels != IGNORE_INDEX).sum())
        assert {part.num_labels for part in shared} == {whole.num_labels} == {counted}
        assert len({part.doc_lens.cu_doc_lens.shape for part in shared}) == 1


@pytest.mark.parametrize("share", [(0, 4), (2, 2), (-1, 2)])
def test_a_part_that_there_is_not(share: tuple[int, int]) -> None:
    data = PackedDocuments([b"mice"], batch_size=6, sequence_length=16)
    with pytest.raises(ValueError, match="equal ones of 6 rows"):
        data.batch(0, share=share)
