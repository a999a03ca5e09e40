"""What the tokens of a run are: bytes, or those of a tokenizer's file.

A document is its tokens and one that ends it. That token also starts every document, so that a
model can be asked for text from nothing.
"""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olmo_core.data import tokens
from olmo_core.data.documents import DataError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ByteVocabulary", "TokenizerVocabulary", "Vocabulary", "load_vocabulary"]

# Where a tokenizer marks the end of a text, in the order of our choice.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")


class Vocabulary(ABC):
    """Tokens from documents, and text from tokens."""

    size: int
    """Greater than every token."""
    end: int
    """The token that ends a document, and starts one."""
    digest: str
    """Names what the tokens depend on; empty for bytes."""

    @abstractmethod
    def encode(self, document: bytes) -> tuple[Tensor, Tensor]:
        """A document's tokens without its end, (n,) int64, and how many bytes each stands for."""

    @abstractmethod
    def prompt(self, text: str) -> list[int]:
        """The tokens of a document's beginning."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without ends."""

    @abstractmethod
    def stream(self) -> Callable[[int | None], str]:
        """A function from each token to the text that it completes; None is the end."""


class ByteVocabulary(Vocabulary):
    """The 256 bytes and one token: see :mod:`olmo_core.data.tokens`."""

    size, end, digest = tokens.VOCAB_SIZE, tokens.EOD, ""

    def encode(self, document: bytes) -> tuple[Tensor, Tensor]:
        if not document:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        ids = torch.frombuffer(bytearray(document), dtype=torch.uint8).long()
        return ids, torch.ones_like(ids)

    def prompt(self, text: str) -> list[int]:
        return tokens.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return tokens.decode(ids)

    def stream(self) -> Callable[[int | None], str]:
        # A character's bytes come one by one: it is there once they are complete.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def feed(token: int | None) -> str:
            if token is None:
                return decoder.decode(b"", final=True)
            return "" if token == self.end else decoder.decode(bytes([token]))

        return feed


class TokenizerVocabulary(Vocabulary):
    """The tokens of a ``tokenizer.json``, as the package ``tokenizers`` writes it.

    The end is the tokenizer's own token for that, or one more behind its others. What stands in a
    text and looks like a special token is text.

    :raises DataError: if the file or the package is missing, or is no tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        self.backend = read_tokenizer(path)
        self.backend.encode_special_tokens = True
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        ids = self.backend.get_vocab()
        if not ids:
            raise DataError(f"{path} has no tokens")
        known = max(ids.values()) + 1
        self.end = next((ids[name] for name in _ENDS if name in ids), known)
        self.size = max(known, self.end + 1)

    def encode(self, document: bytes) -> tuple[Tensor, Tensor]:
        """:raises DataError: if the document is no UTF-8."""
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"a tokenizer needs text in UTF-8, and a document is none ({error}): convert it, "
                "or train on bytes (no --tokenizer)"
            ) from error
        encoding = self.backend.encode(text, add_special_tokens=False)
        # A token stands for the bytes from the end of the one before to its own.
        at = [0, *accumulate(len(character.encode()) for character in text)]
        ends = list(accumulate((at[stop] for _, stop in encoding.offsets), max))
        if ends:
            ends[-1] = at[-1]
        sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
        return torch.tensor(encoding.ids, dtype=torch.int64), torch.tensor(sizes)

    def prompt(self, text: str) -> list[int]:
        return [self.end, *self.backend.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([i for i in ids if i != self.end]))

    def stream(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)

        def feed(token: int | None) -> str:
            if token is None or token == self.end:
                return ""
            return stream.step(self.backend, token) or ""

        return feed


def load_vocabulary(path: str | Path | None) -> Vocabulary:
    """Of a tokenizer's file, or bytes for None.

    :raises DataError: as :class:`TokenizerVocabulary`.
    """
    return ByteVocabulary() if path is None else TokenizerVocabulary(path)


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """:raises DataError: if the file or the package is missing, or is no tokenizer."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "a tokenizer's file needs the package tokenizers: pip install tokenizers"
        ) from error
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a tokenizer.json")
    try:
        backend: Any = tokenizers.Tokenizer.from_file(str(path))
    # tokenizers raises bare Exceptions.
    except Exception as error:
        raise DataError(f"{path} is no tokenizer: {error}") from error
    return backend
