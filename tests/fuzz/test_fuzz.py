"""300 drawn cases, 30 of them compiled; 2,700 more, 100 of them by Inductor, where time allows."""

from __future__ import annotations

import pytest

from fuzz.run import check_seed


@pytest.mark.parametrize("seed", range(300))
def test_case(seed: int) -> None:
    check_seed(seed, "aot_eager" if seed % 10 == 0 else None)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(300, 3000, 27))
def test_more(first: int) -> None:
    check_seed(first, "inductor")
    for seed in range(first + 1, first + 27):
        check_seed(seed)
