"""How one tensor there becomes one or more here, and back.

A layout is a pair of functions that undo each other. Rows are a matrix's outputs: its first
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """``here(there(x)) == x`` and ``there(here(x)) == x``, up to rounding where values change."""

    def here(self, x: Tensor) -> list[Tensor]:
        """Our tensors from theirs."""

    def there(self, ours: Sequence[Tensor]) -> Tensor:
        """Their tensor from ours."""


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def here(self, x: Tensor) -> list[Tensor]:
        return [x]

    def there(self, ours: Sequence[Tensor]) -> Tensor:
        (x,) = ours
        return x


SAME = Same()


@dataclass(frozen=True)
class Rows:
    """Several tensors stacked by rows, group by group.

    With ``sizes=(a, b)`` and two groups their rows are a of the first tensor, b of the second,
    a of the first, b of the second.
    """

    sizes: tuple[int, ...]
    """Rows of each tensor in one group."""
    groups: int = 1

    def here(self, x: Tensor) -> list[Tensor]:
        if x.shape[0] != self.groups * sum(self.sizes):
            raise ValueError(f"expected {self.groups * sum(self.sizes)} rows, got {x.shape[0]}")
        parts = x.unflatten(0, (self.groups, -1)).split(self.sizes, dim=1)
        return [part.flatten(0, 1) for part in parts]

    def there(self, ours: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.unflatten(0, (self.groups, -1)) for x in ours], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class ZeroCentred:
    """A norm's weight that is stored as its distance from one.

    Here it is the weight itself, in float32: bfloat16 near one is coarser than near zero.
    """

    factor: float = 1.0
    """Ours over theirs: a scale of the scores that has no place of its own."""

    def here(self, x: Tensor) -> list[Tensor]:
        return [(x.to(torch.promote_types(x.dtype, torch.float32)) + 1) * self.factor]

    def there(self, ours: Sequence[Tensor]) -> Tensor:
        (x,) = ours
        return x / self.factor - 1


@dataclass(frozen=True)
class PairedHalves:
    """Each head's rows in pairs (i, i + D/2): llama.cpp's order for its interleaved RoPE."""

    heads: int

    def here(self, x: Tensor) -> list[Tensor]:
        return [x.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)]

    def there(self, ours: Sequence[Tensor]) -> Tensor:
        (x,) = ours
        return x.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
