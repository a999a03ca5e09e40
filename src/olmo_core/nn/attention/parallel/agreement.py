"""Ranks that were given different input raise; they do not hang, and do not compute something else.

What ranks send each other follows from the lengths of the documents and from the shapes of the
layer. Before the first message that depends on new lengths, all ranks compare a digest of both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.distributed.collectives import gather_integers, group_named
from olmo_core.exceptions import DisagreementError
from olmo_core.nn.attention.parallel.readings import Reading, is_known, short

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
    :raises DisagreementError: If ranks differ, or another rank refused its input.
    """
    key = (facts, reading.factor, everyone)
    if remember and key in reading.agreed:
        return
    try:
        check()
    except Exception:
        gather_integers(_REFUSED, everyone, reading.device)
        raise
    text = f"the lengths are {short(reading.values)}; {facts}"
    wait = remember or reading.device.type != "cuda"
    same_everywhere(f"{reading.digest().hex()} {facts}", text, everyone, reading.device, wait=wait)
    if remember:
        reading.agreed.add(key)


def same_everywhere(
    value: object, text: str, everyone: str, device: torch.device, *, wait: bool = True
) -> None:
    """See that all ranks have the same ``value``.

    :param text: What it is, for the message.
    :param wait: Whether the host waits for the answer, or leaves it to an assertion on the device.
    :raises DisagreementError: If ranks differ, or one refused its input.
    """
    fingerprint = hashlib.sha256(str(value).encode()).digest()[:8]
    mine = int.from_bytes(fingerprint, "big", signed=True) or 1
    digests = gather_integers(mine, everyone, device)
    if wait:
        _compare(digests.tolist(), text, everyone)
    else:
        message = "The ranks of a context-parallel group were given different shapes or dtypes."
        torch._assert_async((digests == mine).all(), message)


def announce_errors(
    lengths: Any, device: torch.device, everyone: str
) -> AbstractContextManager[None]:
    """Tell the other ranks, who wait for this one to agree, of an error raised inside.

    For checks before :func:`agree`. Where these lengths are known nobody waits; nor does anybody
    while a graph is compiled.

    :param lengths: That this rank was given; anything, for want of a tensor.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _announcing(lengths, device, everyone)


@contextmanager
def _announcing(lengths: Any, device: torch.device, everyone: str) -> Iterator[None]:
    try:
        yield
    except DisagreementError:  # all ranks have it
        raise
    except Exception:
        if not (isinstance(lengths, Tensor) and is_known(lengths)):
            gather_integers(_REFUSED, everyone, device)
        raise


def _compare(digests: list[int], text: str, everyone: str) -> None:
    if len(set(digests)) == 1 and digests[0] != _REFUSED:
        return
    group = group_named(everyone)
    ranks = [dist.get_global_rank(group, i) for i in range(len(digests))]
    refused = [rank for rank, digest in zip(ranks, digests, strict=True) if digest == _REFUSED]
    if refused:
        raise DisagreementError(
            f"Rank {_listed(refused)} of this context-parallel group refused its input, and raises "
            "an error that says why. All ranks must call a layer with the same documents, and with "
            "equal shards of them."
        )
    differ = [rank for rank, digest in zip(ranks, digests, strict=True) if digest != digests[0]]
    raise DisagreementError(
        f"The ranks of a context-parallel group were given different input: rank {_listed(differ)} "
        f"differs from rank {ranks[0]}. All must call a layer with the same documents, and with "
        "equal shards of them. Compare this with the messages of the others: "
        f"on rank {dist.get_rank()}, {text}."
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
