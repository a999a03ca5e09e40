"""Ranks that were given different input raise; they do not hang, and do not compute something else.

What ranks send each other follows from the lengths of the documents and from the shapes of the
layer. Before the first message that depends on new lengths, all ranks compare a digest of both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.distributed.collectives import gather_integers, group_named
from olmo_core.nn.attention.parallel.readings import Reading, is_known, short

__all__ = ["Facts", "agree", "announce_errors"]

_REFUSED = 0
"""What a rank sends whose own check failed. No digest is 0."""


class Facts(NamedTuple):
    """All that messages depend on, beside the lengths."""

    layout: str
    batch: int
    rows: int
    """Of one rank's shard, in each row of the batch."""
    heads: tuple[int, ...]
    head_dim: int
    head_stride: int
    window: int
    dtype: torch.dtype
    kernel: str

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items())


def agree(
    reading: Reading, facts: Facts, check: Callable[[], None], *, everyone: str, remember: bool
) -> None:
    """See that all ranks have the same lengths and facts.

    Costs one message of 8 bytes and, on a GPU, waits for it; nothing for lengths that were agreed
    on with these facts.

    :param reading: The lengths.
    :param check: Raises if this rank's input does not fit them. The others then raise too.
    :param everyone: The group of all ranks that share the sequence.
    :param remember: Whether the reading is of a tensor, so that a later call with it is about the
        same batch on all ranks. If not, every call compares; on a GPU without waiting.
    :raises ValueError: If ranks differ, or another rank refused its input.
    """
    key = (facts, reading.factor, everyone)
    if remember and key in reading.agreed:
        return
    try:
        check()
    except Exception:
        gather_integers(_REFUSED, everyone, reading.device)
        raise
    text = f"{reading.digest().hex()} {facts}".encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True) or 1
    digests = gather_integers(digest, everyone, reading.device)
    if not remember and reading.device.type == "cuda":
        message = "The ranks of a context-parallel group were given different shapes or dtypes."
        torch._assert_async((digests == digest).all(), message)
        return
    _compare(digests.tolist(), digest, reading, facts, everyone)
    if remember:
        reading.agreed.add(key)


@contextmanager
def announce_errors(lengths: Tensor | None, device: torch.device, everyone: str) -> Iterator[None]:
    """Tell the other ranks, who wait for this one to agree, of an error raised inside.

    For checks before :func:`agree`. Where these lengths are known nobody waits.
    """
    try:
        yield
    except Exception:
        if lengths is None or not is_known(lengths):
            gather_integers(_REFUSED, everyone, device)
        raise


def _compare(digests: list[int], mine: int, reading: Reading, facts: Facts, everyone: str) -> None:
    if digests.count(mine) == len(digests):
        return
    group = group_named(everyone)
    ranks = [dist.get_global_rank(group, i) for i in range(len(digests))]
    refused = [rank for rank, digest in zip(ranks, digests, strict=True) if digest == _REFUSED]
    if refused:
        raise ValueError(
            f"Rank {_listed(refused)} of this context-parallel group refused its input, and raises "
            "an error that says why. All ranks must call a layer with the same documents, and with "
            "equal shards of them."
        )
    differ = [rank for rank, digest in zip(ranks, digests, strict=True) if digest != digests[0]]
    raise ValueError(
        f"The ranks of a context-parallel group were given different input: rank {_listed(differ)} "
        f"differs from rank {ranks[0]}. All must call a layer with the same documents, and with "
        "equal shards of them. Compare this with the messages of the others: "
        f"on rank {dist.get_rank()} the lengths are {short(reading.values)}; {facts}."
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
