"""Documents: the embedded corpus, or the text files a user names."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from olmo_core.exceptions import OLMoError

SUFFIXES = (".txt", ".md", ".text", ".jsonl")


class DataError(OLMoError):
    """Data that cannot be trained on."""


def load_documents(path: str | Path | None = None) -> list[bytes]:
    """Read documents, in an order that depends on the file names alone.

    :param path: a file, or a folder that is searched for ``.txt``, ``.md``, ``.text`` and
        ``.jsonl`` files and those with ``.gz`` behind. A ``.jsonl`` file holds one document a
        line, an object with its text under ``"text"``; every other file is one document, whatever
        its bytes. ``None`` is the embedded corpus: 781 scenes of Shakespeare's plays
        (``corpus/PROVENANCE.md``).
    :returns: the documents that are not empty.
    :raises DataError: if there is nothing to read, or it cannot be read.
    """
    if path is None:
        corpus = files("olmo_core.data") / "corpus" / "shakespeare.jsonl.gz"
        lines = gzip.decompress(corpus.read_bytes()).splitlines()
        return [json.loads(line)["text"].encode() for line in lines]
    path = Path(path).expanduser()
    documents = [document for file in _files(path) for document in _read(file) if document]
    if not documents:
        raise DataError(f"{path} holds no text: give a file or folder with at least one document")
    return documents


def split_documents(
    documents: list[bytes], held_out: float = 0.05
) -> tuple[list[bytes], list[bytes]]:
    """Set whole documents aside, chosen by their content's hash: the choice survives reordering.

    A single document is cut instead: its end is held out.

    :param held_out: the share of all bytes to hold out, in (0, 1). It is not exceeded unless the
        smallest document alone does.
    :returns: the documents to train on and those held out; neither is empty.
    :raises DataError: if the text is too short to be split.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    total = sum(map(len, documents))
    budget = int(total * held_out)
    if len(documents) == 1:
        cut = len(documents[0]) - max(budget, 1)
        if cut < 1:
            raise DataError(f"the data holds {total} bytes, too few to hold any out: add text")
        return [documents[0][:cut]], [documents[0][cut:]]
    chosen: set[int] = set()
    for i in sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i]).digest()):
        if len(documents[i]) <= budget:
            chosen.add(i)
            budget -= len(documents[i])
    if not chosen:
        chosen = {min(range(len(documents)), key=lambda i: len(documents[i]))}
    train = [d for i, d in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give a text or .jsonl file, or a folder of them")
    found = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES)
    if not found:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{path} holds no {kinds} file (or one of them with .gz behind)")
    return found


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read(path: Path) -> Iterator[bytes]:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}") from error
    if _suffix(path) != ".jsonl":
        yield data
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}")


def _text_of(line: bytes, where: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): .jsonl needs one object a line") from error
    if not isinstance(record, dict):
        raise DataError(f'{where} is a {type(record).__name__}, expected an object with "text"')
    if "text" not in record:
        keys = ", ".join(map(repr, record)) or "no keys"
        raise DataError(
            f'{where} has no "text" (it has {keys}): rename the field that holds the text'
        )
    if not isinstance(record["text"], str):
        kind = type(record["text"]).__name__
        raise DataError(f'{where}: "text" must be a string, got {kind}')
    return record["text"].encode("utf-8", errors="surrogatepass")
