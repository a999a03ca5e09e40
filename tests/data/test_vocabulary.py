"""Tokens of a tokenizer's file beside bytes: nothing of the text is lost, and bytes are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmo_core.data import DataError, PackedDocuments, TokenizerVocabulary, load_vocabulary
from olmo_core.data.packing import IGNORE_INDEX

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["the cat sat on the mat", "the dog, the cat; 12 mats", "é ü 猫 \U0001f431 the the", ""]


def trained(path: Path, *special: str, size: int = 300) -> Path:
    """A byte-level BPE of these texts."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> TokenizerVocabulary:
    return TokenizerVocabulary(trained(tmp_path_factory.mktemp("bpe") / "tokenizer.json", "</s>"))


@given(text=st.text(max_size=30) | st.sampled_from(TEXTS))
def test_text_comes_back_and_its_bytes_are_counted(
    vocabulary: TokenizerVocabulary, text: str
) -> None:
    data = text.encode("utf-8", errors="replace")
    ids, sizes = vocabulary.encode(data)
    assert int(sizes.sum()) == len(data)
    assert bool((sizes >= 0).all()) and ids.dtype == torch.int64
    assert vocabulary.decode(ids.tolist()).encode() == data
    assert vocabulary.prompt(data.decode()) == [vocabulary.end, *ids.tolist()]
    feed = vocabulary.stream()
    assert "".join(feed(token) for token in [*ids.tolist(), vocabulary.end, None]).encode() == data


def test_the_end(tmp_path: Path, vocabulary: TokenizerVocabulary) -> None:
    assert vocabulary.end == vocabulary.backend.token_to_id("</s>")
    assert vocabulary.size == vocabulary.backend.get_vocab_size()
    without = TokenizerVocabulary(trained(tmp_path / "a.json"))
    assert without.end == without.backend.get_vocab_size() == without.size - 1
    # What looks like the end in a text is text.
    ids, _ = vocabulary.encode(b"a</s>b")
    assert vocabulary.end not in ids.tolist()


def test_packing(vocabulary: TokenizerVocabulary) -> None:
    documents = [text.encode() for text in TEXTS[:3]]
    data = PackedDocuments(
        documents, batch_size=2, sequence_length=16, max_doc_len=8, vocabulary=vocabulary
    )
    texts, n_bytes = [], 0
    for batch in data.one_epoch():
        n_bytes += batch.num_bytes
        texts.append(vocabulary.decode(batch.labels[batch.labels != IGNORE_INDEX].tolist()))
    assert n_bytes == sum(map(len, documents))
    assert data.num_tokens == sum(len(vocabulary.encode(d)[0]) + 1 for d in documents)
    assert sorted("".join(texts)) == sorted("".join(TEXTS[:3]))


def test_what_is_refused(tmp_path: Path, vocabulary: TokenizerVocabulary) -> None:
    with pytest.raises(DataError, match="needs text in UTF-8"):
        vocabulary.encode(b"\xff")
    with pytest.raises(DataError, match="does not exist: give a tokenizer"):
        load_vocabulary(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad.json is no tokenizer"):
        load_vocabulary(tmp_path / "bad.json")
