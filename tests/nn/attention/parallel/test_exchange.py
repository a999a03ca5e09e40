"""Exchange plans of all ranks, carried out here: each rank has what it wants, and so has its
adjoint. Then the real exchange: what is counted is what the plan says.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Iterator
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import (
    attend_on,
    context_of,
    draw,
    forward_backward,
    int32,
    own_rows,
)
from olmo_core.distributed import collectives
from olmo_core.distributed.collectives import count_traffic
from olmo_core.nn.attention.parallel.exchange import Exchange, plan_exchange
from olmo_core.nn.attention.parallel.layout import LAYOUTS, SpanTable
from olmo_core.nn.attention.parallel.plan import gather_plan
from olmo_core.nn.attention.parallel.readings import Reading

CPU = torch.device("cpu")


def random_documents(rng: random.Random, n: int) -> list[int]:
    cu = [0]
    for _ in range(rng.randint(1, 9)):
        cu.append(cu[-1] + 2 * n * rng.choice((0, 1, 1, 2, 3, 7)))
    return cu if cu[-1] else [0, 2 * n]


def seen(held: SpanTable, window: int) -> SpanTable:
    first = held.document
    if window > 0:
        first = torch.maximum(first, held.start - window + 1)
    return held._replace(start=first)


def cases() -> Iterator[tuple[SpanTable, SpanTable, int]]:
    """What ranks hold and want: the keys of a window, or another layout."""
    rng = random.Random(0)
    for _ in range(150):
        n = rng.randint(1, 5)
        cu = random_documents(rng, n)
        held = LAYOUTS[rng.choice(list(LAYOUTS))].table(cu, n)
        yield held, seen(held, rng.choice((-1, 1, 2, 5, 1000))), n
        yield held, LAYOUTS[rng.choice(list(LAYOUTS))].table(cu, n), n


def carry_out(plans: list[Exchange], packed: list[Tensor], back: bool = False) -> list[Tensor]:
    """An uneven all-to-all of rows, here."""
    parts = [x.split(p.n_receive if back else p.n_send) for x, p in zip(packed, plans, strict=True)]
    return [torch.cat([of_sender[rank] for of_sender in parts]) for rank in range(len(plans))]


def test_every_rank_receives_what_it_wants() -> None:
    for held, wanted, n in cases():
        plans = [plan_exchange(held, wanted, rank, n) for rank in range(n)]
        tokens = [held.of(rank).tokens() for rank in range(n)]
        received = carry_out(plans, [t[p.send] for t, p in zip(tokens, plans, strict=True)])
        total = 0
        for rank, (plan, rows) in enumerate(zip(plans, received, strict=True)):
            assert len(rows) == sum(plan.n_receive) and plan.held == len(tokens[rank])
            assert rows.unique().shape == rows.shape  # nothing is sent twice
            want = wanted.of(rank).tokens()
            assert torch.equal(rows if plan.place is None else rows[plan.place], want)
            assert plan.wanted == len(want)
            total += sum(c for i, c in enumerate(plan.n_receive) if i != rank)
        assert len({plan.moves for plan in plans}) == 1
        assert plans[0].moves or total == 0


def test_the_adjoint_gives_every_gradient_back() -> None:
    for held, wanted, n in cases():
        plans = [plan_exchange(held, wanted, rank, n) for rank in range(n)]
        size = int(held.stop.max())
        gradients = [torch.randn(p.wanted, dtype=torch.float64) for p in plans]
        expected = torch.zeros(size, dtype=torch.float64)
        packed = []
        for rank, (plan, d) in enumerate(zip(plans, gradients, strict=True)):
            expected.index_add_(0, wanted.of(rank).tokens(), d)
            rows = d.clone() if plan.first is None else d[plan.first]
            for received, again in plan.again:
                assert received.unique().shape == received.shape
                rows[received] += d[again]
            packed.append(rows)
        for rank, back in enumerate(carry_out(plans, packed, back=True)):
            held_rows = plans[rank].held
            total, last = torch.zeros(held_rows, dtype=torch.float64), torch.full((held_rows,), -1)
            for home, places in plans[rank].home:
                rows = torch.arange(held_rows) if home is None else home
                assert rows.unique().shape == rows.shape  # no two atomics meet
                assert (places > last[rows]).all()  # rank after rank
                total[rows] += back[places]
                last[rows] = places
            torch.testing.assert_close(total, expected[held.of(rank).tokens()])
            assert sum(len(places) for _, places in plans[rank].home) == len(back)


def test_short_documents_come_home_in_few_sums() -> None:
    held = LAYOUTS["contiguous"].table([*range(0, 8 * 64, 32), 8 * 64], 8)
    wanted = seen(held, -1)
    assert [len(plan_exchange(held, wanted, rank, 8).home) for rank in range(8)] == [1] * 8
    held = LAYOUTS["contiguous"].table([*range(0, 8 * 64, 48), 8 * 64], 8)
    wanted = seen(held, -1)
    assert max(len(plan_exchange(held, wanted, rank, 8).home) for rank in range(8)) == 2


def test_whole_documents_and_windows_of_one_key_stay_at_home() -> None:
    for cu, layout, window, moves in (
        ([0, 4, 8], "contiguous", -1, False),
        ([0, 4, 8], "balanced", -1, True),
        ([0, 8, 8], "contiguous", -1, True),
        ([0, 8, 8], "zig_zag", 1, False),
        ([0, 1, 2, 3, 4], "balanced", -1, False),
    ):
        held = LAYOUTS[layout].table(cu, 2)
        assert plan_exchange(held, seen(held, window), 0, 2).moves is moves, (cu, layout, window)


def needed_elsewhere(cu: list[int], layout: str, window: int, rank: int, n: int) -> set[int]:
    """The tokens of other ranks that a rank's queries see, by the definition."""
    own = own_rows(layout, cu, rank, n).tolist()
    keys: set[int] = set()
    for token in own:
        start = max(a for a, b in pairwise(cu) if a <= token < b)
        first = start if window < 0 else max(start, token - window + 1)
        keys |= set(range(first, token + 1))
    return keys - set(own)


def counted(rank: int, n: int) -> None:
    heads, dim = (6, 3), 4
    cu = [0, 5 * 2 * n, 5 * 2 * n, 6 * 2 * n, 8 * 2 * n]
    whole = [x.float() for x in draw(1, cu[-1], heads, dim)]
    lengths = int32(cu)
    for layout in LAYOUTS:
        rows = own_rows(layout, cu, rank, n)
        *qkv, dout = (x[:, rows] for x in whole)
        for window in (-1, 1, 3):
            missing = [needed_elsewhere(cu, layout, window, i, n) for i in range(n)]
            mine = set(rows.tolist())
            to_others = [len(keys & mine) for keys in missing]
            held_by = [set(own_rows(layout, cu, i, n).tolist()) for i in range(n)]
            from_others = [len(missing[rank] & tokens) for tokens in held_by]
            for stride in (1, 2, 3, 8):
                context = context_of(n, layout, head_stride=stride)
                if context.rotates(window):
                    continue
                inputs = [x.clone().requires_grad_() for x in qkv]
                messages = ceil(heads[1] / stride)
                with count_traffic() as traffic:
                    out = attend_on(context, *inputs, lengths=lengths, window=window)
                assert traffic.bytes == sum(to_others) * heads[1] * 2 * dim * 4
                assert traffic.messages == messages * sum(c > 0 for c in to_others)
                with count_traffic() as traffic:
                    out.backward(dout)
                assert traffic.bytes == (sum(to_others) + sum(from_others)) * heads[1] * 2 * dim * 4
                both = sum(c > 0 for c in to_others) + sum(c > 0 for c in from_others)
                assert traffic.messages == messages * both

    rows = own_rows("zig_zag", cu, rank, n)
    *qkv, dout = (x[:, rows] for x in whole)
    inputs = [x.clone().requires_grad_() for x in qkv]
    shard_bytes = len(rows) * heads[1] * 2 * dim * 4
    with count_traffic() as traffic:
        out = attend_on(context_of(n, "zig_zag"), *inputs, lengths=lengths)
    assert (traffic.messages, traffic.bytes) == (n - 1, (n - 1) * shard_bytes)
    with count_traffic() as traffic:
        out.backward(dout)
    assert (traffic.messages, traffic.bytes) == (2 * (n - 1), 2 * (n - 1) * shard_bytes)

    rows = own_rows(None, cu, rank, n)
    *qkv, dout = (x[:, rows] for x in whole)
    if heads[0] % n == 0:
        n_kv = heads[1] if heads[1] % n == 0 else heads[1] * n
        with count_traffic() as traffic:
            attend_on(context_of(n), *qkv, lengths=lengths)
        packed = (heads[0] + 2 * n_kv + heads[0]) * len(rows) * dim * 4
        assert (traffic.messages, traffic.bytes) == (2 * (n - 1), packed * (n - 1) // n)


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 3])
def test_what_is_sent_is_what_the_plan_says(n: int) -> None:
    on_ranks(n, counted)


class Living:
    """Counts the tensors that :func:`collectives.exchange` sent or received and that are not freed
    yet."""

    def __init__(self) -> None:
        self.pointers: set[int] = set()
        self.most = 0
        self.real = collectives.exchange

    def __enter__(self) -> Living:
        collectives.exchange = self.exchange
        return self

    def __exit__(self, *_: object) -> None:
        collectives.exchange = self.real

    def exchange(self, x: Tensor, *arguments: Any) -> Any:
        pending = self.real(x, *arguments)
        for tensor in (x, pending._held[0]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.pointers:
                self.pointers.add(storage.data_ptr())
                weakref.finalize(storage, self.pointers.discard, storage.data_ptr())
        for _ in range(100):  # gloo's thread lets go of a message a moment after it has come
            if len(self.pointers) > 2:
                time.sleep(0.005)
        self.most = max(self.most, len(self.pointers))
        return pending


def alive(rank: int, n: int) -> tuple[int, int]:
    """The most tensors of messages that a ring, and a gather by heads, have at once in forward."""
    cu = [0, 32 * n]
    most = []
    for layout, window in (("zig_zag", -1), ("balanced", -1)):
        rows = own_rows(layout, cu, rank, n)
        *qkv, _ = (x[:, rows] for x in draw(1, cu[-1], (5, 5), 8))
        context = context_of(n, layout, head_stride=2)
        with Living() as living:
            attend_on(context, *qkv, lengths=int32(cu), window=window)
        most.append(living.most)
    return most[0], most[1]


@pytest.mark.distributed
def test_two_shards_of_keys_or_two_groups_of_heads_are_alive() -> None:
    """A ring has the shard that it computes with and the next. A gather has both ends of the next
    group's message, and the group that it computes with: of that what was received, where it came
    in order (rank 3's two chunks touch), and elsewhere a copy in the order that is wanted."""
    assert on_ranks(4, alive) == [(2, 2), (2, 2), (2, 2), (2, 3)]


def alone(rank: int, n: int) -> None:
    x = torch.randn(1, 2, 3)
    swapped = collectives.swap(x, context_of(n).everyone)
    assert torch.equal(swapped, x) and swapped.data_ptr() != x.data_ptr()


@pytest.mark.distributed
def test_a_swap_of_one_rank_is_a_copy() -> None:
    on_ranks(1, alone)


def same_bits(rank: int, n: int) -> None:
    cu = [0, 3 * 2 * n, 9 * 2 * n]
    lengths = int32(cu)
    whole = [x.bfloat16() for x in draw(1, cu[-1], (4, 2), 8)]
    for layout, window in (("zig_zag", 9), ("balanced", -1), ("zig_zag", -1), (None, -1)):
        rows, context = own_rows(layout, cu, rank, n), context_of(n, layout)
        first, second = (
            forward_backward(context, whole, rows, lengths=lengths, window=window) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), layout


@pytest.mark.distributed
def test_the_same_bits_each_time() -> None:
    on_ranks(2, same_bits)


def test_a_plan_is_made_once_for_each_window() -> None:
    reading = Reading([0, 24, 48], CPU)
    plans = [gather_plan(reading, "zig_zag", 2, 0, w, 1) for w in (-1, 5, -1, 5)]
    assert plans[0] is plans[2] and plans[1] is plans[3] and plans[0] is not plans[1]
    assert gather_plan(reading, "zig_zag", 2, 1, -1, 1) is not plans[0]
    assert gather_plan(reading, "balanced", 2, 0, -1, 1) is not plans[0]
