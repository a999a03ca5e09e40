"""Standard output and input as they come: full, closed, or of a narrow encoding."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any, TextIO

from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["SteadyOutput", "prepare_streams", "read_stdin", "silence_stdout"]

# What the reports print, where an encoding lacks it: one character for one, so that tables stay.
_ASCII = {"✓": "y", "✗": "x", "–": "-", "—": "-", "·": ".", "≤": "<", "×": "x", "…": "."}


def _encode_somehow(error: UnicodeError) -> tuple[bytes, int]:
    """Bytes of the command line that are no UTF-8 as they came; other characters as ASCII."""
    assert isinstance(error, UnicodeEncodeError)
    out = b""
    for char in error.object[error.start : error.end]:
        escaped = 0xDC80 <= ord(char) <= 0xDCFF
        out += bytes([ord(char) - 0xDC00]) if escaped else _ASCII.get(char, "?").encode()
    return out, error.end


codecs.register_error("olmo-core", _encode_somehow)


class _Nowhere(io.TextIOBase):
    """Takes everything."""

    def write(self, text: str) -> int:
        return len(text)


def prepare_streams() -> None:
    """Let every character be printed somehow, and output that is closed lead nowhere."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="olmo-core")


def silence_stdout() -> None:
    """What is still to be flushed leads nowhere: the interpreter would fail again at its exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # no file: a test's


def read_stdin() -> str:
    """All of standard input; bytes that are no UTF-8 are kept.

    :raises OLMoConfigurationError: if it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise OLMoConfigurationError("'-' reads standard input, which is closed")
    return sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")


class SteadyOutput(io.TextIOBase):
    """A stream that remembers its first failure and goes on without writing.

    A run does not end because nobody sees it any more: its terminal is gone, or its log's disk is
    full.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Any) -> None:
        if self.failure is None:
            try:
                action()
            except OSError as error:
                self.failure = error
                silence_stdout()
