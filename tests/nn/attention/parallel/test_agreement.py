"""Ranks that were given different input all raise, at once; and what is remembered of lengths is
attacked behind its back.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from gloo_ranks import errors_on_ranks, on_ranks
from nn.attention.parallel.schedules import (
    attend_on,
    context_of,
    dense,
    draw,
    forward_backward,
    int32,
    own_rows,
    worst,
)
from olmo_core.distributed import collectives
from olmo_core.nn.attention.kernels.softmax import get_kernel, register_kernel
from olmo_core.nn.attention.parallel import agreement, plan, readings
from olmo_core.nn.attention.parallel.agreement import announce_errors

pytestmark = pytest.mark.distributed

CU = [0, 8, 16, 40]
SCHEDULES = {"ring": ("zig_zag", -1), "gather": ("balanced", 5), "ulysses": (None, -1)}


class OtherKernel:
    """A kernel by another name."""

    name = "other"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return get_kernel("torch").forward(*args, **kwargs)


def call(
    rank: int,
    n: int,
    schedule: str,
    *,
    cu: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    rows: int = 0,
    heads: tuple[int, int] = (4, 2),
    lengths_dtype: torch.dtype = torch.int32,
    **more: Any,
) -> Tensor:
    """A call with what one rank may have other than the rest."""
    layout, window = SCHEDULES[schedule]
    cu = CU if cu is None else cu
    q, k, v, _ = (x[:, : 40 // n - rows].to(dtype) for x in draw(1, 40, heads, 8))
    lengths = None if cu == [] else torch.tensor(cu, dtype=lengths_dtype)
    context = context_of(n, layout, head_stride=more.pop("head_stride", 1))
    return attend_on(context, q, k, v, lengths=lengths, **{"window": window, **more})


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"cu": [0, 8, 32, 40]}, ""),
    "lengths of another sum": ({"cu": [0, 8, 44]}, "ValueError: The documents of the whole"),
    "decreasing lengths": ({"cu": [0, 16, 8, 40]}, "ValueError: Document lengths must start at 0"),
    "int64 lengths": ({"lengths_dtype": torch.int64}, "TypeError: Document lengths must be"),
    "empty lengths": ({"cu": [0]}, "ValueError: Document lengths must be 1-D"),
    "rows": ({"rows": 4}, "ValueError: The documents of the whole"),
    "dtype": ({"dtype": torch.bfloat16}, ""),
    "kernel": ({"kernel": "other"}, ""),
    "heads": ({"heads": (8, 2)}, ""),
    "window": ({"window": 3}, ""),
    "head_stride": ({"head_stride": 2}, ""),
}
"""What rank 1 has of its own, and its error if it can see by itself that something is wrong."""


def one_differs(rank: int, n: int, schedule: str, case: str) -> None:
    register_kernel(OtherKernel())
    call(rank, n, schedule)  # agreed, so what differs comes in a later batch
    started = time.monotonic()
    try:
        call(rank, n, schedule, **OTHER[case][0] if rank == 1 else {})
    finally:
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("schedule", "case"),
    [(s, c) for s in SCHEDULES for c in OTHER if (s, c) != ("ulysses", "head_stride")],
)
def test_one_rank_with_other_input(schedule: str, case: str) -> None:
    errors = errors_on_ranks(2, one_differs, schedule, case, timeout=20)
    theirs = OTHER[case][1]
    if theirs:
        assert errors[1] is not None and errors[1].startswith(theirs)
        assert errors[0] is not None and errors[0].startswith("DisagreementError: Rank 1 of this")
    else:
        for error in errors:
            assert error is not None and "rank 1 differs from rank 0" in error
        assert "on rank 1, the lengths are" in (errors[1] or "")
    on_ranks(2, call_only, schedule)  # and the group still works


def call_only(rank: int, n: int, schedule: str) -> None:
    call(rank, n, schedule)


def without_lengths(rank: int, n: int, schedule: str) -> None:
    for _ in range(2):
        call(rank, n, schedule, cu=[])
    call(rank, n, schedule, cu=[], rows=4 * rank)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_calls_without_lengths_are_compared_each_time(schedule: str) -> None:
    errors = errors_on_ranks(2, without_lengths, schedule, timeout=20)
    assert all(e is not None and "rank 1 differs from rank 0" in e for e in errors)


def at_the_door(rank: int, n: int) -> None:
    context = context_of(n, "balanced")
    lengths = int32(CU)
    with announce_errors(lengths, torch.device("cpu"), context.everyone):
        if rank == 1:
            raise TypeError("a check before the schedule")
    call(rank, n, "gather")


def test_an_error_before_the_schedule_reaches_the_other_ranks() -> None:
    first, second = errors_on_ranks(2, at_the_door, timeout=20)
    assert first is not None and first.startswith("DisagreementError: Rank 1 of this")
    assert second == "TypeError: a check before the schedule"


class Counted:
    """Counts reads of lengths, plans and agreements while it runs."""

    def __enter__(self) -> Counted:
        self.reads = self.plans = self.messages = 0
        self.real = readings.host_lengths, plan.plan_exchange, agreement.gather_integers

        def read(cu: Tensor) -> list[int]:
            self.reads += 1
            return self.real[0](cu)

        def make(*args: Any) -> Any:
            self.plans += 1
            return self.real[1](*args)

        def gather(*args: Any) -> Tensor:
            self.messages += 1
            return self.real[2](*args)

        readings.host_lengths, plan.plan_exchange = read, make
        agreement.gather_integers = gather
        return self

    def __exit__(self, *_: Any) -> None:
        readings.host_lengths, plan.plan_exchange, agreement.gather_integers = self.real


def one_read(rank: int, n: int) -> None:
    context, whole = context_of(n, "balanced"), draw(1, 40, (4, 2), 8)
    rows = own_rows("balanced", CU, rank, n)
    with Counted() as counted:
        lengths = int32(CU)
        for _ in range(3):
            for window in (-1, 5):
                forward_backward(context, whole, rows, lengths=lengths, window=window)
    assert (counted.reads, counted.plans, counted.messages) == (1, 2, 2)


def test_layers_share_a_read_and_a_plan_for_each_window() -> None:
    on_ranks(2, one_read)


def offloaded(rank: int, n: int) -> None:
    """Backward meets a copy of the lengths that it has never seen: it plans, and sends nothing."""
    whole = draw(1, 40, (4, 2), 8)
    for layout, window in (("zig_zag", -1), ("balanced", 5)):
        cu = [0, 8, 16, 40]
        rows = own_rows(layout, cu, rank, n)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: x.clone() if rank == 0 else x, lambda x: x
        )
        with Counted() as counted, hooks:
            got = forward_backward(
                context_of(n, layout), whole, rows, lengths=int32(cu), window=window
            )
        assert counted.messages == 1 and counted.reads == (2 if rank == 0 else 1)
        assert worst(got, [x[:, rows] for x in dense(*whole, cu, window)]) < 1e-12


def test_backward_does_without_the_remembered_lengths() -> None:
    on_ranks(2, offloaded)


def changed_in_place(rank: int, n: int, how: str) -> None:
    whole = draw(1, 40, (4, 2), 8)
    lengths = int32(CU)
    other = [0, 24, 32, 40]
    for cu in (CU, other):
        if cu is other:
            if how == "copy_":  # the version says so: the ranks agree anew
                lengths.copy_(int32(other))
            elif rank == 1 or how == "data everywhere":  # nothing says so
                lengths.data.copy_(int32(other))
        rows = own_rows("balanced", cu, rank, n)
        got = forward_backward(context_of(n, "balanced"), whole, rows, lengths=lengths, window=-1)
        assert worst(got, [x[:, rows] for x in dense(*whole, cu, -1)]) < 1e-12


def test_lengths_changed_in_place_are_planned_anew() -> None:
    on_ranks(2, changed_in_place, "copy_")


def test_bytes_that_change_behind_the_version_raise() -> None:
    errors = errors_on_ranks(2, changed_in_place, "data everywhere", timeout=20)
    for error in errors:
        assert error is not None and error.startswith("RuntimeError: The bytes of a lengths tensor")


def changed_before_backward(rank: int, n: int) -> None:
    lengths = int32(CU)
    q, k, v, _ = (x[:, :20].requires_grad_() for x in draw(1, 40, (4, 2), 8))
    out = attend_on(context_of(n, "balanced"), q, k, v, lengths=lengths)
    lengths.data.copy_(int32([0, 24, 32, 40]))
    out.sum().backward()


def test_bytes_that_change_before_backward_raise() -> None:
    for error in errors_on_ranks(2, changed_before_backward, timeout=20):
        assert error is not None and error.startswith("RuntimeError: The bytes of a lengths tensor")


def one_without_a_loss(rank: int, n: int) -> None:
    """A rank whose rows are all padding calls backward through its output all the same."""
    for schedule, (layout, window) in SCHEDULES.items():
        rows = own_rows(layout, CU, rank, n)
        whole = draw(1, 40, (4, 2), 8)
        *qkv, dout = whole
        dout = dout.clone()
        dout[:, own_rows(layout, CU, 1, n)] = 0
        want = dense(*qkv, dout, CU, window)
        inputs = [x[:, rows].clone().requires_grad_() for x in qkv]
        out = attend_on(context_of(n, layout), *inputs, lengths=int32(CU), window=window)
        loss = (out * dout[:, rows]).sum() if rank == 0 else out.sum() * 0
        loss.backward()
        got = [out.detach(), *(x.grad for x in inputs if x.grad is not None)]
        assert worst(got, [x[:, rows] for x in want]) < 1e-12, schedule


def test_a_rank_of_padding_alone() -> None:
    on_ranks(2, one_without_a_loss)


def test_traffic_is_counted_in_the_block_alone() -> None:
    with collectives.count_traffic() as traffic:
        pass
    assert traffic == collectives.Traffic() and collectives._COUNTING == []
