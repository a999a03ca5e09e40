"""The vocabulary: the 256 bytes and one token that ends a document.

A document of n bytes is n + 1 predictions: from EOD its first byte, ..., from its last byte EOD.
EOD therefore also starts every document, and a model generates from an empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

EOD = 256
VOCAB_SIZE = 257


def encode(text: str | bytes) -> list[int]:
    """The tokens of a document's beginning: EOD, then the bytes of ``text`` (a str as UTF-8)."""
    data = text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text
    return [EOD, *data]


def decode(tokens: Iterable[int]) -> str:
    """The text of ``tokens`` without EOD; bytes that are not UTF-8 become U+FFFD."""
    return bytes(t for t in tokens if t != EOD).decode("utf-8", errors="replace")
