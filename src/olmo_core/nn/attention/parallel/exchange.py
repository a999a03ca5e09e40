"""Which rows ranks send each other, by interval arithmetic on spans, and the exchange itself.

Every rank works out its own row and column of the table "who sends what to whom" from what all
ranks hold and want, so no rank has to ask another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_core.distributed import collectives
from olmo_core.nn.attention.parallel.layout import SpanTable, count_up


@dataclass(frozen=True)
class Exchange:
    """The rows that one rank sends and receives. Indices are int64, on the device of the data."""

    held: int
    """How many rows this rank holds."""
    wanted: int
    """How many rows it wants, repeated ones included."""
    send: Tensor
    """Its rows that others want, and its own: those for rank 0, then those for rank 1 ..."""
    n_send: list[int]
    n_receive: list[int]
    place: Tensor | None
    """For each wanted row, where it is among the received ones; None if that is their order."""
    first: Tensor | None
    """For each received row, the first wanted row that it serves."""
    again: list[tuple[Tensor, Tensor]]
    """Received rows, each once, and a further wanted row that each of them serves."""
    home: list[tuple[Tensor | None, Tensor]]
    """In rounds, held rows, each once, and where among the sent ones each of them is: rank after
    rank. None stands for all held rows in order."""
    moves: bool
    """Whether any rank sends anything to another: the same answer on all ranks."""

    def to(self, device: torch.device) -> Exchange:
        """The same with its indices on ``device``."""
        place = None if self.place is None else self.place.to(device)
        first = None if self.first is None else self.first.to(device)
        again = [(rows.to(device), wanted.to(device)) for rows, wanted in self.again]
        home = [
            (None if rows is None else rows.to(device), at.to(device)) for rows, at in self.home
        ]
        return Exchange(
            self.held, self.wanted, self.send.to(device), self.n_send, self.n_receive,
            place, first, again, home, self.moves,
        )  # fmt: skip

    def fetch(self, x: Tensor, group: str) -> Callable[[], Tensor]:
        """Start the exchange.

        :param x: The held rows, ``(b, held, ...)``.
        :returns: What waits for the wanted rows and gives them, ``(b, wanted, ...)``.
        """
        packed = x.index_select(1, self.send).transpose(0, 1).contiguous()
        pending = self._start(packed, self.n_send, self.n_receive, group)

        def wait() -> Tensor:
            rows = pending.wait().transpose(0, 1)
            return rows if self.place is None else rows.index_select(1, self.place)

        return wait

    def give_back(self, d: Tensor, group: str) -> Callable[[], Tensor]:
        """Start the adjoint: gradients of wanted rows go to the ranks that hold them.

        They travel in the dtype of ``d`` and are added up in float32 (float64 for float64), rank
        after rank: the same bits each time.

        :param d: ``(b, wanted, ...)``.
        :returns: What waits and gives the sums, ``(b, held, ...)``, in the accumulator's dtype.
        """
        rows = d if self.first is None else d.index_select(1, self.first)
        if self.again:
            rows = rows.to(accumulator(d.dtype))
            for received, wanted in self.again:
                rows.index_add_(1, received, d.index_select(1, wanted).to(rows.dtype))
            rows = rows.to(d.dtype)
        rows = rows.transpose(0, 1).contiguous()
        pending = self._start(rows, self.n_receive, self.n_send, group)

        def wait() -> Tensor:
            back, dtype = pending.wait().transpose(0, 1), accumulator(d.dtype)
            total = None
            for held, places in self.home:
                part = back.index_select(1, places).to(dtype)
                if held is None:
                    total = part
                    continue
                if total is None:
                    total = d.new_zeros((d.shape[0], self.held, *d.shape[2:]), dtype=dtype)
                total.index_add_(1, held, part)  # each row once: no atomics meet
            assert total is not None
            return total

        return wait

    def _start(
        self, x: Tensor, send: list[int], receive: list[int], group: str
    ) -> collectives.Pending:
        if not self.moves:
            return collectives.Pending(x)
        return collectives.exchange(x, send, receive, group)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over ranks are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Intervals(NamedTuple):
    """``[start, stop)`` with neither end decreasing: ``(intervals,)``, int64."""

    start: Tensor
    stop: Tensor

    @property
    def length(self) -> Tensor:
        return self.stop - self.start

    def in_lane(self, lane: Tensor | int, width: int) -> _Intervals:
        """Moved to lane ``lane`` of many, each ``width`` wide: lanes never overlap."""
        return _Intervals(self.start + lane * width, self.stop + lane * width)

    def for_each(self, lanes: int, width: int) -> _Intervals:
        """A copy in every lane."""
        lane = torch.arange(lanes)[:, None]
        start, stop = self.in_lane(lane, width)
        return _Intervals(start.flatten(), stop.flatten())

    def merged(self) -> _Intervals:
        """Their union, as intervals that do not touch."""
        if len(self.start) == 0:
            return self
        edge = torch.ones(1, dtype=torch.bool)
        apart = self.start[1:] > self.stop[:-1]
        first, last = torch.cat([edge, apart]), torch.cat([apart, edge])
        return _Intervals(self.start[first], self.stop[last])

    def meet(self, pieces: _Intervals) -> tuple[Tensor, Tensor, _Intervals]:
        """Where they overlap ``pieces``, which are disjoint: which of both meet, and where."""
        low = torch.searchsorted(pieces.stop, self.start, right=True)
        high = torch.searchsorted(pieces.start, self.stop)
        count = (high - low).clamp(min=0)
        ours = torch.repeat_interleave(torch.arange(len(count)), count)
        theirs = count_up(low, count)
        start = torch.maximum(self.start[ours], pieces.start[theirs])
        stop = torch.minimum(self.stop[ours], pieces.stop[theirs])
        return ours, theirs, _Intervals(start, stop)


def plan_exchange(held: SpanTable, wanted: SpanTable, rank: int, n: int) -> Exchange:
    """What ``rank`` sends and receives so that every rank has the tokens that it wants.

    :param held: The spans of all ranks.
    :param wanted: The tokens that each rank wants, likewise; of a rank, neither ``start`` nor
        ``stop`` decreases. Spans may overlap, and tokens are then repeated.
    """
    width = int(held.stop.max()) + 1 if len(held.stop) else 1
    mine, want = (_Intervals(*table.of(rank)[2:]) for table in (held, wanted))

    # Sent: my rows that each rank wants, rank after rank.
    everyone = _Intervals(*wanted[2:]).in_lane(wanted.rank, width).merged()
    span, _, part = mine.for_each(n, width).meet(everyone)
    lane = part.start.div(width, rounding_mode="floor")
    span, part = span % max(1, len(mine.start)), part.in_lane(-lane, width)
    row = mine.length.cumsum(0) - mine.length
    send = count_up(row[span] + part.start - mine.start[span], part.length)
    n_send = _sums(lane, part.length, n)

    # Received: what I want of each rank's rows, rank after rank.
    holders = _Intervals(*held[2:]).in_lane(held.rank, width)
    _, _, part = want.merged().for_each(n, width).meet(holders)
    lane = part.start.div(width, rounding_mode="floor")
    n_receive = _sums(lane, part.length, n)
    position = part.length.cumsum(0) - part.length
    part = part.in_lane(-lane, width)
    order = part.start.argsort()
    received, position = _Intervals(*(x[order] for x in part)), position[order]

    in_order = _received_rows(want, received, position)
    place: Tensor | None = in_order
    first: Tensor | None = None
    again: list[tuple[Tensor, Tensor]] = []
    if torch.equal(in_order, torch.arange(sum(n_receive))):
        place = None
    else:
        number = want.length.cumsum(0) - want.length  # of the first wanted row of an interval
        todo = want
        while len(todo.start) > 0:
            # Ends don't decrease, so what an interval repeats is what is left of the last end.
            reached = torch.cat([todo.start[:1], todo.stop[:-1]])
            seen = torch.minimum(torch.maximum(todo.start, reached), todo.stop)
            new = _Intervals(seen, todo.stop)
            rows = _received_rows(new, received, position)
            wanted_rows = count_up(number + new.start - todo.start, new.length)
            if first is None:
                first = torch.empty_like(rows)
                first[rows] = wanted_rows
            else:
                again.append((rows, wanted_rows))
            repeated = seen > todo.start
            todo, number = _Intervals(todo.start[repeated], seen[repeated]), number[repeated]

    stays = torch.equal(held.start, wanted.start) and torch.equal(held.stop, wanted.stop)
    return Exchange(
        int(mine.length.sum()), int(want.length.sum()), send, n_send, n_receive,
        place, first, again, _rounds(send, n_send, int(mine.length.sum())), not stays,
    )  # fmt: skip


def _rounds(send: Tensor, n_send: list[int], held: int) -> list[tuple[Tensor | None, Tensor]]:
    """Sums of what comes back, rank after rank: see :attr:`Exchange.home`. There are as many rounds
    as ranks that want one row, which short documents make few."""
    times = torch.zeros(held, dtype=torch.int64)
    nth = torch.empty_like(send)
    for rows, mine in zip(send.split(n_send), nth.split(n_send), strict=True):
        mine.copy_(times[rows])
        times[rows] += 1  # a rank wants a row once
    rounds: list[tuple[Tensor | None, Tensor]] = []
    for turn in range(max(1, int(times.max()) if held else 1)):
        places = (nth == turn).nonzero().flatten()
        rows = send[places]
        if turn == 0 and len(places) == held:
            rounds.append((None, torch.empty_like(places).scatter_(0, rows, places)))
        else:
            rounds.append((rows, places))
    return rounds


def _received_rows(want: _Intervals, received: _Intervals, position: Tensor) -> Tensor:
    """Where each wanted token is among the received rows."""
    _, piece, part = want.meet(received)
    return count_up(position[piece] + part.start - received.start[piece], part.length)


def _sums(lane: Tensor, length: Tensor, n: int) -> list[int]:
    return torch.zeros(n, dtype=torch.int64).index_add_(0, lane, length).tolist()
