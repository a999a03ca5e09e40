"""What the host knows of a lengths tensor: its values, and all that was worked out from them.

A reading is kept with its tensor, so the layers of a step share one read, and one plan for each
kind of layer. The tensor's version is no proof that its bytes are those that were read (the buffers
of graphs and collectives change without it), so every use compares them: on the host for a CPU, by
an assertion on the device for a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from olmo_core.nn.lengths import host_lengths

T = TypeVar("T")

_CHANGED = (
    "The bytes of a lengths tensor changed without its version, after a plan for context "
    "parallelism was made from them. Pass each batch's lengths as a tensor of its own."
)


class Reading:
    """The values of a lengths tensor, and what follows from them.

    :param values: Cumulative lengths.
    :param device: Where the tensor is, and what is made from it belongs.
    :param factor: How often the tensor's values ``values`` are.
    """

    def __init__(self, values: list[int], device: torch.device, factor: int = 1):
        self.values = values
        self.device = device
        self.factor = factor
        self.agreed: set[Hashable] = set()
        """With what all ranks were seen to have the same tensor."""
        self._derived: dict[Hashable, Any] = {}

    def derive(self, key: Hashable, compute: Callable[[], T]) -> T:
        """``compute()``, once for each ``key``, which names all that it depends on beside this."""
        if key not in self._derived:
            with torch.inference_mode(False):
                self._derived[key] = compute()
        return self._derived[key]

    def times(self, factor: int) -> Reading:
        """The reading of lengths that are ``factor`` times as long."""

        def compute() -> Reading:
            longer = Reading([v * factor for v in self.values], self.device, factor)
            longer.agreed = self.agreed
            return longer

        return self if factor == 1 else self.derive(("times", factor), compute)

    def digest(self) -> bytes:
        """A fingerprint of the values."""
        return self.derive("digest", lambda: hashlib.sha256(str(self.values).encode()).digest())


class _Remembered:
    """A reading with the version and the bytes that it is of."""

    def __init__(self, lengths: Tensor):
        self.version = lengths._version
        self.bytes = lengths.detach().clone()
        self.reading = Reading(list(host_lengths(lengths)), lengths.device)

    def compare(self, lengths: Tensor) -> None:
        if lengths.device.type == "cuda":
            torch._assert_async((lengths == self.bytes).all(), _CHANGED)
        elif not torch.equal(lengths, self.bytes):
            raise RuntimeError(_CHANGED)


_READINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def read(lengths: Tensor) -> Reading:
    """What the host knows of ``lengths``; reads them if it does not know them yet.

    :raises RuntimeError: If their bytes changed without their version.
    """
    if lengths.is_inference():  # no version, so nothing to remember them by
        return Reading(lengths.tolist(), lengths.device)
    known: _Remembered | None = _READINGS.get(lengths)
    if known is None or known.version != lengths._version:
        with torch.inference_mode(False):
            known = _READINGS[lengths] = _Remembered(lengths)
    else:
        known.compare(lengths)
    return known.reading


def is_known(lengths: Tensor) -> bool:
    """Whether ranks agreed on these lengths, with whatever facts."""
    known = None if lengths.is_inference() else _READINGS.get(lengths)
    return known is not None and known.version == lengths._version and bool(known.reading.agreed)


def read_documents(
    lengths: Tensor | None, factor: int, total: int, device: torch.device
) -> Reading:
    """The documents of a whole sequence.

    :param lengths: Its lengths over ``factor``; None for one document of ``total`` tokens.
    """
    if lengths is None:
        return _one_document(total, device)
    return read(lengths).times(factor)


@lru_cache(maxsize=16)
def _one_document(total: int, device: torch.device) -> Reading:
    return Reading([0, total], device)


def short(values: list[int]) -> str:
    """Values for a message."""
    if len(values) <= 8:
        return str(values)
    return f"{str(values[:8])[:-1]}, ... {len(values) - 8} more]"
