"""Ranks answer together; an error is an answer, a lost rank ends all, and new ones take over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gloo_ranks import RankError, errors_on_ranks, on_ranks, pool
from olmo_core.diagnostics.ranks import Failure, Ranks, first_failure
from olmo_core.distributed.launched import lost_another

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


def dies_beside_one_that_waits(rank: int, n: int) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(60)


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv",
        "Application timeout caused pair closure",  # of a later message on the same pair
    ],
)
def test_what_gloo_says_of_a_rank_that_is_gone(text: str) -> None:
    assert lost_another(RuntimeError(text)) and not lost_another(ValueError(text))
    assert not lost_another(RuntimeError("CUDA error"))


def waits_for_one_that_raises(rank: int, n: int) -> None:
    if rank == 1:
        raise KeyError("here")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")


def test_the_cause_is_told_before_its_consequences() -> None:
    late = Failure("no answer in 5 s", follows=True)
    died = Failure("died: SIGSEGV.")
    assert first_failure([late, 0, died, Failure("ValueError: here")]) == (2, died)
    assert first_failure([Failure("ValueError: here", "..."), died]) == (1, died)
    assert first_failure([late, late]) == (0, late)
    assert first_failure([0, None]) is None
    answers = pool(2).run(waits_for_one_that_raises)
    assert answers[0].follows and not answers[1].follows
    failed = first_failure(answers)
    assert failed is not None and (failed[0], failed[1].message) == (1, "KeyError: 'here'")


@pytest.mark.slow
def test_lost_ranks_end_and_are_replaced() -> None:
    before = [pid for pid, _ in on_ranks(2, total, 1)]
    with pytest.raises(RankError, match=r"no answer in 0\.5 s"):
        on_ranks(2, sleeps, timeout=0.5)
    ranks = Ranks(2)
    folder = Path(ranks._folder)
    assert folder.exists()
    died = "died: exit code 3. What it printed last is above."
    first, second = ranks.run(dies_beside_one_that_waits)
    assert first.follows and second == Failure(died)
    assert first.message == "ended, because rank 1 died"
    assert not ranks.alive and not folder.exists()
    after = [pid for pid, _ in on_ranks(2, total, 1)]
    assert not set(before) & set(after)
