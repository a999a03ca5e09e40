"""The rule behind every tick."""

from __future__ import annotations

import math

import pytest
import torch

from olmo_core.diagnostics.measures import FACTOR, Comparison, bound, worst
from olmo_core.nn.functional import row_error


def test_wrong_shapes_and_nan_never_pass() -> None:
    want = torch.ones(3, 3)
    for got in (torch.ones(3, 2), torch.full((3, 3), math.nan)):
        c = Comparison("out", row_error(got, want), 1e9)
        assert not c.passed and c.ratio == math.inf
    assert not Comparison("bits", 1.0, 0.0).passed and Comparison("bits", 0.0, 0.0).passed


def test_the_worst_is_nearest_to_its_bound() -> None:
    a, b = Comparison("a", 1e-3, 1e-2), Comparison("b", 1e-7, 1e-7)
    assert worst([a, b]) is b
    nan = Comparison("c", math.nan, 1.0)
    assert worst([a, nan, b]) is nan


def test_bounds() -> None:
    assert bound(1e-2, torch.bfloat16) == pytest.approx(FACTOR * 1e-2)
    # Rounding the result is allowed even where the reference has no error by luck.
    assert bound(0.0, torch.float32) == FACTOR * 2**-24
    # float64 has no wider reference: float32's error, scaled.
    assert bound(2**-20, torch.float64) == pytest.approx(FACTOR * 2**-49)
    assert bound(2**-20, torch.float64, torch.float32) == FACTOR * 2**-24
