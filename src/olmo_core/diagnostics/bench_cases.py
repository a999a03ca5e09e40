"""The problems that ``bench`` times: who attends to whom, at which size.

Shapes: B batch, T tokens, H query heads, G key and value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from olmo_core.config import StrEnum
from olmo_core.memory import expect_room

__all__ = [
    "MAX_SECONDS",
    "MAX_SIZE",
    "BenchCase",
    "Problem",
    "Settings",
    "checked_tokens",
    "default_settings",
    "document_lengths",
    "expect_problems_fit",
]

MAX_SIZE = 2**31 - 1  # kernels count in int32
MAX_SECONDS = 3600


class BenchCase(StrEnum):
    """What is attended to."""

    full = "full"
    """Causal, every key before."""
    window = "window"
    """Causal, the last keys alone."""
    documents = "documents"
    """Causal within each of 16 packed documents of very different lengths."""
    decode = "decode"
    """One token over a cache of T keys."""


@dataclass(frozen=True)
class Settings:
    """The sizes of all problems."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int
    dtype: torch.dtype
    tokens: tuple[int, ...]
    decode_batch: int
    seconds: float
    """The time that one measurement may take, about."""
    error_tokens: int
    """Where the dense float64 reference is computed, which errors are taken against."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"batch {self.batch} (decode {self.decode_batch}), {self.n_heads}/{self.n_kv_heads} "
            f"heads x {self.head_dim}, window {self.window}, {dtype}"
        )


def default_settings(device: torch.device) -> Settings:
    """What a GPU trains with, or what a laptop can do in a minute or two."""
    if device.type == "cuda":
        tokens = (1024, 2048, 4096, 8192, 16384)
        return Settings(2, 16, 4, 128, 1024, torch.bfloat16, tokens, 32, 0.25, 1024)
    return Settings(1, 8, 2, 64, 256, torch.float32, (512, 1024, 2048), 8, 0.3, 512)


def document_lengths(tokens: int) -> list[int]:
    """16 documents of very different lengths, or fewer where ``tokens`` are few."""
    shares = (1, 30, 3, 90, 8, 2, 40, 5, 16, 1, 60, 12, 4, 24, 7, 17)  # of 320
    lengths = [share * tokens // 320 for share in shares]
    lengths[-1] += tokens - sum(lengths)
    return [n for n in lengths if n]


@dataclass(eq=False)
class Problem:
    """Inputs of one case at one length."""

    case: BenchCase
    settings: Settings
    n_tokens: int
    device: torch.device

    @property
    def batch(self) -> int:
        """B."""
        return self.settings.decode_batch if self.case == BenchCase.decode else self.settings.batch

    @property
    def window(self) -> int:
        """In keys, or -1."""
        return self.settings.window if self.case == BenchCase.window else -1

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.settings.head_dim**-0.5

    @cached_property
    def lengths(self) -> list[int]:
        """Of the documents of the flattened batch; each row has the same ones."""
        if self.case == BenchCase.documents:
            return document_lengths(self.n_tokens) * self.batch
        return [self.n_tokens] * self.batch

    @cached_property
    def cu_doc_lens(self) -> Tensor:
        """Their ends."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0).to(torch.int32)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H, D) and twice (B, T, G, D); for decode one query, and the whole cache."""
        s = self.settings
        n_queries = 1 if self.case == BenchCase.decode else self.n_tokens
        shapes = (
            (n_queries, s.n_heads),
            (self.n_tokens, s.n_kv_heads),
            (self.n_tokens, s.n_kv_heads),
        )
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(
                self.batch, n, h, s.head_dim, generator=generator, device=self.device, dtype=s.dtype
            ).requires_grad_(self.case != BenchCase.decode)
            for n, h in shapes
        )
        return q, k, v

    @cached_property
    def dout(self) -> Tensor:
        """The gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(1)
        q = self.qkv[0]
        return torch.randn(q.shape, generator=generator, device=self.device, dtype=q.dtype)

    @cached_property
    def mask(self) -> Tensor:
        """(T, T) bool, True where a query sees a key; of one row, since all rows are alike."""
        index = torch.arange(self.n_tokens, device=self.device)
        back = index[:, None] - index[None]
        seen = back >= 0
        if self.window > 0:
            seen &= back < self.window
        if self.case == BenchCase.documents:
            row = torch.tensor(document_lengths(self.n_tokens), device=self.device)
            document = torch.arange(len(row), device=self.device).repeat_interleave(row)
            seen &= document[:, None] == document[None]
        return seen

    @property
    def pairs(self) -> int:
        """Queries times the keys that each sees, of all rows and of one head."""
        if self.case == BenchCase.decode:
            return self.batch * self.n_tokens
        w = self.window if self.window > 0 else self.n_tokens
        return sum(
            n * (n + 1) // 2 - max(0, n - w) * (max(0, n - w) + 1) // 2 for n in self.lengths
        )

    def flops(self, backward: bool) -> float:
        """Two products per visible pair, a multiply-add as two; the backward pass has five."""
        forward = 4 * self.settings.head_dim * self.settings.n_heads * self.pairs
        return forward * (3.5 if backward else 1.0)

    @property
    def cache_bytes(self) -> int:
        """What one decoding step has to read."""
        _, k, v = self.qkv
        return k.numel() * k.element_size() + v.numel() * v.element_size()

    def smaller(self) -> Problem:
        """The same case where the dense reference is affordable, the window in proportion."""
        n = min(self.n_tokens, self.settings.error_tokens)
        window = max(1, min(self.settings.window, n // 4))
        batch = min(2, self.settings.decode_batch)
        settings = replace(self.settings, batch=1, decode_batch=batch, window=window)
        return Problem(self.case, settings, n, self.device)


def checked_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """Lengths in order, each once."""
    return tuple(sorted(set(tokens)))


def expect_problems_fit(
    cases: Sequence[BenchCase], settings: Settings, device: torch.device
) -> None:
    """:raises OLMoConfigurationError: if the largest problem's inputs exceed the memory."""
    s, longest = settings, max(settings.tokens)
    heads = s.n_heads * (BenchCase.decode not in cases or len(cases) > 1) + 2 * s.n_kv_heads
    rows = s.decode_batch if list(cases) == [BenchCase.decode] else s.batch
    n_bytes = rows * longest * heads * s.head_dim * s.dtype.itemsize
    expect_room(f"inputs of {longest} tokens ({s})", n_bytes, device)
