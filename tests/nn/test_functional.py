"""How far off a result is."""

from __future__ import annotations

import math

import pytest
import torch

from olmo_core.nn.functional import largest_row_error, row_error


def test_one_wrong_token_shows_at_its_size_however_long_the_sequence_is() -> None:
    want = torch.ones(1, 10_000, 4, dtype=torch.float64)
    got = want.clone()
    got[0, 77] = 0
    assert row_error(got, want) == pytest.approx(1.0)
    assert row_error(want, want) == 0


def test_vectors_scalars_and_nothing() -> None:
    assert row_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert row_error(torch.tensor(3.0), torch.tensor(4.0)) == pytest.approx(0.25)
    assert row_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


@pytest.mark.parametrize("place", [0, 1])
def test_the_largest_of_several_hides_no_nan(place: int) -> None:
    want = [torch.ones(2, 3), torch.ones(2, 3)]
    got = [torch.ones(2, 3), torch.full((2, 3), 1.5)]
    assert largest_row_error(got, want) == pytest.approx(0.5)
    got[place] = torch.full((2, 3), math.nan)
    assert math.isnan(largest_row_error(got, want))
