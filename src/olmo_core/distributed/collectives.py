"""The messages that ranks of one group exchange: groups by name, asynchronous, counted.

Ops carry the *name* of a process group, since a group object can be neither compiled nor pickled.
Nothing here is differentiable by itself: ops that exchange say what their gradient exchanges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Pending",
    "Traffic",
    "all_gather",
    "count_traffic",
    "exchange",
    "gather_integers",
    "gather_rows",
    "group_named",
    "place_in",
    "rotate",
    "swap",
]


@dataclass
class Traffic:
    """What this process has sent to others."""

    messages: int = 0
    bytes: int = 0


_COUNTING: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what :func:`exchange`, :func:`rotate`, :func:`swap` and :func:`all_gather` send while
    the block runs."""
    traffic = Traffic()
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        _COUNTING.remove(traffic)


class Pending:
    """A tensor that is on its way."""

    def __init__(self, result: Tensor, work: Any = None, sent: Tensor | None = None):
        # What is sent must live until the message has left, and memory is reused when it is freed.
        self._held: tuple[Tensor, Any, Tensor | None] | None = (result, work, sent)

    def wait(self) -> Tensor:
        """The tensor, once: nothing of it is kept. On a GPU the current stream waits, not the
        host."""
        assert self._held is not None
        result, work, _ = self._held
        if work is not None:
            work.wait()
        self._held = None
        return result


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    resolve: Any = dist.distributed_c10d.__dict__["_resolve_process_group"]
    return resolve(name)


def place_in(group: str) -> tuple[int, int]:
    """This process's rank in a group, and the group's size."""
    found = group_named(group)
    return dist.get_rank(found), dist.get_world_size(found)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: str) -> Pending:
    """Send each rank its part of the rows. All ranks of the group must call this together.

    :param x: ``(sum(send), ...)``, contiguous: the rows for rank 0, then those for rank 1 ...
    :param send: How many rows each rank is sent, this one included.
    :param receive: How many rows each rank sends, as they say in their ``send``.
    :returns: ``(sum(receive), ...)``, likewise by rank; ``x`` itself in a group of one.
    """
    rank, size = place_in(group)
    if size == 1:
        return Pending(x)
    row_bytes = x.element_size() * (x.numel() // max(1, x.shape[0]))
    for traffic in _COUNTING:
        sent = [rows for i, rows in enumerate(send) if i != rank and rows > 0]
        traffic.messages += len(sent)
        traffic.bytes += sum(sent) * row_bytes
    result = x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(
        result, x, list(receive), list(send), group=group_named(group), async_op=True
    )
    return Pending(result, work, x)


def rotate(x: Tensor, group: str) -> Pending:
    """Send ``x`` to the next rank of the ring, and receive the previous rank's.

    An exchange in which each rank has one neighbour: backends send nothing for empty parts, and
    gloo's point-to-point messages, unlike its exchange, take no CUDA tensors.

    :param x: Contiguous, of the same shape on all ranks.
    """
    rank, size = place_in(group)
    send, receive = [0] * size, [0] * size
    send[(rank + 1) % size] = receive[(rank - 1) % size] = x.shape[0]
    return exchange(x, send, receive, group)


def swap(x: Tensor, group: str) -> Tensor:
    """Give block ``i`` of ``x`` to rank ``i``, and get its block for this rank in its place.

    :param x: ``(ranks, ...)``, contiguous.
    :returns: Like ``x``, a tensor of its own.
    """
    ones = [1] * x.shape[0]
    swapped = exchange(x, ones, ones, group).wait()
    return x.clone() if swapped is x else swapped


def all_gather(x: Tensor, group: str) -> Pending:
    """Give ``x`` to all ranks.

    :param x: Contiguous, of the same shape on all ranks.
    :returns: ``(ranks, *x.shape)``.
    """
    _, size = place_in(group)
    if size == 1:
        return Pending(x.unsqueeze(0))
    for traffic in _COUNTING:
        traffic.messages += size - 1
        traffic.bytes += (size - 1) * x.numel() * x.element_size()
    result = x.new_empty((size, *x.shape))
    work = dist.all_gather(list(result.unbind(0)), x, group=group_named(group), async_op=True)
    return Pending(result, work, x)


def gather_integers(value: int, group: str, device: torch.device) -> Tensor:
    """An int64 of each rank, ``(ranks,)``, on ``device``, which the group's backend must take."""
    # Unlike torch.tensor, torch.full does not wait for a GPU.
    return gather_rows(torch.full((1,), value, dtype=torch.int64, device=device), group)[:, 0]


def gather_rows(x: Tensor, group: str) -> Tensor:
    """``x`` of each rank, ``(ranks, *x.shape)``; of the same shape on all."""
    everyone = [torch.empty_like(x) for _ in range(place_in(group)[1])]
    dist.all_gather(everyone, x, group=group_named(group))
    return torch.stack(everyone)
