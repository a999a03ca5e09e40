"""Ranks that something else has started, asked by the first of them."""

from __future__ import annotations

import math

import pytest

from gloo_ranks import on_ranks
from olmo_core.diagnostics.ranks import Failure
from olmo_core.diagnostics.torchrun import StartedRanks
from olmo_core.distributed.launched import number_started

pytestmark = pytest.mark.distributed


def asked(rank: int, n: int) -> list[object]:
    ranks = StartedRanks()
    assert ranks.are_mine == (rank == 0)
    if not ranks.are_mine:
        ranks.serve()
        return []
    # Called with the rank and the number of ranks.
    answers = [ranks.run(math.gcd, 6), ranks.run(math.log)]
    ranks.end()
    return answers


def test_answers_and_errors_of_all_ranks() -> None:
    (divisors, (bad, good)), nothing = on_ranks(2, asked)
    assert divisors == [2, 1] and nothing == []
    assert isinstance(bad, Failure) and bad.message.startswith("ValueError: ") and good == 0


@pytest.mark.parametrize(
    ("missing", "n"), [(set(), 3), ({"RANK"}, 1), ({"WORLD_SIZE"}, 1), ({"MASTER_ADDR"}, 1)]
)
def test_how_many(missing: set[str], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some schedulers set a few of these for their own ends: that is no launcher."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name in missing:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, "3")
    assert number_started() == n
