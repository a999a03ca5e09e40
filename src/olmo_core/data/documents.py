"""Documents: the embedded corpus, or the text files a user names."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from olmo_core.exceptions import OLMoError

SUFFIXES = (".txt", ".md", ".text", ".jsonl")


class DataError(OLMoError):
    """Data that cannot be trained on."""


class DataFiles(NamedTuple):
    """What a path holds."""

    chosen: list[Path]
    """The files to read, sorted."""
    skipped: list[Path]
    """Files of other kinds, and links to folders."""


def load_documents(path: str | Path | None = None) -> list[bytes]:
    """Read documents, in an order that depends on the file names alone.

    :param path: a file, or a folder that is searched for ``.txt``, ``.md``, ``.text`` and
        ``.jsonl`` files and those with ``.gz`` behind, in lower or upper case. A ``.jsonl`` file
        holds one document a line, an object with its text under ``"text"``; every other file is one
        document, whatever its bytes. ``None`` is the embedded corpus: 781 scenes of Shakespeare's
        plays (``corpus/PROVENANCE.md``).
    :returns: the documents that are not empty. What a folder holds beside them,
        :func:`data_files` says.
    :raises DataError: if there is nothing to read, or it cannot be read.
    """
    if path is None:
        corpus = files("olmo_core.data") / "corpus" / "shakespeare.jsonl.gz"
        lines = gzip.decompress(corpus.read_bytes()).splitlines()
        return [json.loads(line)["text"].encode() for line in lines]
    chosen = data_files(path).chosen
    documents = [document for file in chosen for document in _read(file) if document]
    if not documents:
        raise DataError(f"{path} holds no text: give a file or folder with at least one document")
    return documents


def data_files(path: str | Path) -> DataFiles:
    """The files that :func:`load_documents` reads, and those that it leaves alone.

    :raises DataError: if there is none to read, or a folder cannot be searched.
    """
    if not str(path).strip():
        raise DataError("the path to the data is empty: name a file or folder")
    path = _expanded(Path(path))
    if path.is_file():
        return DataFiles([path], [])
    if not path.is_dir():
        why = "is a device or pipe" if os.path.exists(path) else "does not exist"
        raise DataError(f"{path} {why}: give a text or .jsonl file, or a folder of them")
    chosen: list[Path] = []
    skipped: list[Path] = []
    try:
        for file in _walk(path):
            wanted = file.is_file() and _suffix(file) in SUFFIXES
            (chosen if wanted else skipped).append(file)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be searched: {error.strerror}") from error
    if not chosen:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{path} holds no {kinds} file (or one of them with .gz behind)")
    return DataFiles(sorted(chosen), sorted(skipped))


def split_documents(
    documents: list[bytes], held_out: float = 0.05
) -> tuple[list[bytes], list[bytes]]:
    """Set whole documents aside, chosen by their content's hash: the choice survives reordering.

    Equal documents go to one side. If all are equal, they are cut instead: their end is held out.

    :param held_out: the share of all bytes to hold out, in (0, 1). It is not exceeded unless the
        smallest document alone does, all its copies counted.
    :returns: the documents to train on and those held out; neither is empty.
    :raises DataError: if the text is too short to be split.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    total = sum(map(len, documents))
    copies = Counter(documents)
    if len(copies) == 1:
        cut = len(documents[0]) - max(int(len(documents[0]) * held_out), 1)
        if cut < 1:
            raise DataError(f"the data holds {total} bytes, too few to hold any out: add text")
        return [d[:cut] for d in documents], [d[cut:] for d in documents]
    budget = int(total * held_out)
    chosen: set[bytes] = set()
    for document in sorted(copies, key=lambda d: hashlib.sha256(d).digest()):
        if (size := len(document) * copies[document]) <= budget:
            chosen.add(document)
            budget -= size
    if not chosen:
        chosen = {min(copies, key=lambda d: len(d) * copies[d])}
    return [d for d in documents if d not in chosen], [d for d in documents if d in chosen]


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~name of nobody: then it is a name as any
        return path


def _walk(path: Path) -> Iterator[Path]:
    """All files below ``path``, and links to folders, which are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in (*names, *links))


def _suffix(path: Path) -> str:
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def _read(path: Path) -> Iterator[bytes]:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
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
    except (ValueError, RecursionError) as error:
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
