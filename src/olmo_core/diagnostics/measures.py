"""How far off a result may be: the rule behind every tick.

No tolerance is guessed. A *plain reference* (matmuls, a dense mask, a softmax) computes the same in
the same low precision, and its error against float64 is what that precision costs here. What is
checked may be off by :data:`FACTOR` times as much: it adds in another order and keeps other
intermediate results in low precision, but it loses nothing else. Nothing is wider than float64, so
its bound is the float32 reference's error times the ratio of the two machine epsilons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

__all__ = ["FACTOR", "Comparison", "bound", "reference_dtype", "worst"]

FACTOR = 6.0
"""The bound over the plain reference's own error, and over the rounding of the result."""


class Comparison(NamedTuple):
    """One tensor against what it should be."""

    what: str
    """The tensor: ``out``, ``dx``, ``d w_q.weight``."""
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Also False for NaN."""
        return self.error <= self.bound

    @property
    def ratio(self) -> float:
        """The error as a share of its bound; infinite for NaN."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)


def worst(comparisons: Iterable[Comparison]) -> Comparison:
    """The comparison nearest to its bound, or furthest beyond it."""
    return max(comparisons, key=lambda c: c.ratio)


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that the plain reference computes in to bound ``dtype``."""
    return torch.float32 if dtype == torch.float64 else dtype


def bound(reference_error: float, dtype: torch.dtype, stored: torch.dtype | None = None) -> float:
    """The error that a computation in ``dtype`` may have.

    :param reference_error: The plain reference's own, in :func:`reference_dtype`.
    :param stored: The result's dtype, if it is another: a float32 parameter's gradient in a float64
        layer is rounded to float32.
    """
    rounding = torch.finfo(dtype).eps / 2
    reference_error *= torch.finfo(dtype).eps / torch.finfo(reference_dtype(dtype)).eps
    return FACTOR * max(reference_error, rounding, torch.finfo(stored or dtype).eps / 2)
