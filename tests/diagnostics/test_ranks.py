"""Ranks answer together; an error is an answer, a lost rank ends all, and new ones take over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gloo_ranks import RankError, errors_on_ranks, on_ranks
from olmo_core.diagnostics.ranks import Failure, Ranks

pytestmark = pytest.mark.distributed


def total(rank: int, n: int, x: int) -> tuple[int, int]:
    mine = torch.tensor(x * (rank + 1))
    dist.all_reduce(mine)
    return os.getpid(), int(mine)


def test_ranks_work_together_and_stay() -> None:
    (first, a), (second, b) = on_ranks(2, total, 5)
    assert a == b == 15 and first != second
    assert on_ranks(2, total, 1) == [(first, 3), (second, 3)]


def one_raises(rank: int, n: int) -> None:
    if rank == 1:
        raise KeyError("here")


def test_an_error_is_an_answer() -> None:
    assert errors_on_ranks(2, one_raises) == [None, "KeyError: 'here'"]
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*in one_raises"):
        on_ranks(2, one_raises)
    on_ranks(2, total, 1)


def sleeps(rank: int, n: int) -> None:
    time.sleep(60 * rank)


def dies(rank: int, n: int) -> None:
    if rank == 1:
        os._exit(3)


@pytest.mark.slow
def test_lost_ranks_end_and_are_replaced() -> None:
    before = [pid for pid, _ in on_ranks(2, total, 1)]
    with pytest.raises(RankError, match=r"no answer in 0\.5 s"):
        on_ranks(2, sleeps, timeout=0.5)
    ranks = Ranks(2)
    folder = Path(ranks._folder)
    assert folder.exists()
    died = "died: exit code 3. What it printed last is above."
    assert ranks.run(dies)[1] == Failure(died)
    assert not ranks.alive and not folder.exists()
    after = [pid for pid, _ in on_ranks(2, total, 1)]
    assert not set(before) & set(after)
