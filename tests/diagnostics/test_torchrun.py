"""Ranks that something else has started, asked by the first of them."""

from __future__ import annotations

import math

import pytest

from gloo_ranks import on_ranks
from olmo_core.diagnostics.ranks import Failure
from olmo_core.diagnostics.torchrun import StartedRanks, number_started

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
    ("environment", "n"), [({}, 1), ({"RANK": "1", "WORLD_SIZE": "3"}, 3), ({"WORLD_SIZE": "3"}, 1)]
)
def test_how_many(environment: dict[str, str], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert number_started() == n
