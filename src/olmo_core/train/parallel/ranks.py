"""What a run asks of its processes, answered for one.

:class:`.ManyRanks` answers for several; a run is written against this class and has one code path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from olmo_core.data import PackedBatch
from olmo_core.nn.transformer import Transformer
from olmo_core.train.checkpoint import random_state
from olmo_core.train.parallel.degrees import Degrees, deal
from olmo_core.utils import checked_device

__all__ = ["Ranks", "Tokens"]

T = TypeVar("T")


class Tokens(NamedTuple):
    """What one rank's model is called with."""

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64."""
    lengths: dict[str, Any]
    """Further keywords of :meth:`Transformer.forward`."""

    def to(self, device: torch.device) -> Tokens:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        lengths = {name: move(value) for name, value in self.lengths.items()}
        return Tokens(move(self.input_ids), move(self.labels), lengths)


class Ranks:
    """One process."""

    rank, size = 0, 1
    agreed: Exception | None = None
    """The last error that all ranks raised alike, so that one need tell it."""

    def __init__(self, degrees: Degrees | None = None) -> None:
        self.degrees = degrees or Degrees()

    def deal(self, **options: Any) -> None:
        """Set :attr:`degrees` as :func:`.deal` does."""
        with self.together():
            self.degrees = deal(self.size, **options)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, locks and prints."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """This rank's part of a batch's rows: (i, n) is the i-th of n."""
        return 0, 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside, all raise.

        Only where no collective is skipped by who fails: each rank comes to the end of the block by
        itself.
        """
        yield

    def on_first(self, function: Callable[..., T], *args: Any, **keywords: Any) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        return function(*args, **keywords)

    @contextmanager
    def entered_by_first(self, manager: AbstractContextManager[Any]) -> Iterator[None]:
        """The block of a ``with`` whose manager the first rank alone enters and leaves."""
        with ExitStack() as stack:
            with self.together():
                if self.is_first:
                    stack.enter_context(manager)
            yield

    def expect_same(self, **facts: object) -> None:
        """:raises OLMoConfigurationError: on all ranks if one has other facts, known by their
        ``str``."""

    def highest(self, number: int | None) -> int | None:
        """The largest number of any rank's, or None."""
        return number

    def mean(self, values: list[float]) -> list[float]:
        """Of all ranks, value by value."""
        return values

    def device(self, name: str | None) -> torch.device:
        """:raises OLMoConfigurationError: as :func:`checked_device`."""
        return checked_device(name)

    def share_model(self, model: Transformer, device: torch.device) -> None:
        """Make a model that has no weights yet this rank's part of it.

        :raises OLMoConfigurationError: if its sizes don't fit the degrees.
        """

    def settle(self, model: Transformer) -> None:
        """After a forward pass without backward: let go of what it has gathered."""

    def shard(self, batch: PackedBatch) -> Tokens:
        """This rank's tokens of its :attr:`share` of a batch."""
        return Tokens(batch.input_ids, batch.labels, batch.doc_lens._asdict())

    def seed(self, seed: int, step: int) -> None:
        """Before each step. One process draws on from where it was: its checkpoints say where."""

    def random_state(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """What the next steps draw from, for a checkpoint."""
        return random_state(device)

    def close(self) -> None:
        """Leave the others."""
