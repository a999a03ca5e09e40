"""The promise as cells, mixer x backend x dtype x property, each with its error and its bound.

packed = separate = sharded = cached = the dense float64 reference

The cells come from the capability table: each backend's features and dtypes, whether it is
installed or not. What the table refuses is a skipped cell with every reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch

from olmo_core.config import DType
from olmo_core.diagnostics.kernel_checks import CHECKS, Place
from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.measures import Comparison, worst
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.properties import PROPERTIES
from olmo_core.diagnostics.sharded import HYBRID, TP_CP
from olmo_core.diagnostics.subject import RANKS, Subject
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.capabilities import CAPABILITIES, Environment, Request, refusals
from olmo_core.nn.attention.kernels.softmax import Feature

__all__ = ["KERNEL", "QUICK_MIXERS", "Cell", "Outcome", "cells", "mixer_names", "run", "why_not"]

KERNEL = "kernel"
"""The mixer name of the rows without a layer: one for each feature of the table."""
QUICK_MIXERS = (KERNEL, "gqa", "window", "ngpt", "fused-window", "gdn")
QUICK_DTYPES = (torch.float32, torch.bfloat16)

_KERNEL_TITLES = {
    Feature.window: "windows = reference",
    Feature.documents: "segments = reference",
    Feature.packed_qkv: "packed qkv",
    Feature.kv_cache: "cached = full",
    Feature.left_padding: "left-padded = alone",
    Feature.dropout: "dropout",
    Feature.backward: "= reference",
    Feature.lse: "merged blocks = whole",
    Feature.deterministic: "same bits again",
    Feature.ring_cp: "steps of a ring = whole",
    Feature.ulysses_cp: "parts of the heads = whole",
}


@dataclass(frozen=True)
class Cell:
    """One check to make."""

    mixer: str
    backend: str
    dtype: torch.dtype
    prop: str
    """A key of ``PROPERTIES``, or a feature for the kernel rows."""

    @property
    def title(self) -> str:
        """What must hold."""
        if self.mixer == KERNEL:
            return _KERNEL_TITLES[Feature(self.prop)]
        return PROPERTIES[self.prop].title

    @property
    def features(self) -> frozenset[Feature]:
        """What the cell asks of its backend."""
        if self.mixer == KERNEL:
            return frozenset({Feature(self.prop)})
        return PROPERTIES[self.prop].features | MIXERS[self.mixer].features

    @property
    def is_sharded(self) -> bool:
        """Whether several processes check it together."""
        return self.mixer != KERNEL and PROPERTIES[self.prop].is_sharded

    def __str__(self) -> str:
        return f"{self.mixer}, {self.backend}, {DType.from_pt(self.dtype)}: {self.title}"


@dataclass(frozen=True)
class Outcome:
    """A cell and what came of it."""

    cell: Cell
    status: str
    """passed, failed or skipped."""
    error: float | None = None
    bound: float | None = None
    tensor: str = ""
    """The tensor nearest to its bound, whose error and bound these are."""
    reasons: tuple[str, ...] = ()
    """Why it was skipped, or what was raised."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        row = asdict(self)
        cell = row.pop("cell")
        cell["property"] = cell.pop("prop")
        if self.error is not None and not math.isfinite(self.error):
            row["error"] = str(self.error)  # JSON has no NaN
        cell["dtype"] = str(DType.from_pt(self.cell.dtype))
        return {**cell, "title": self.cell.title, **row}


def mixer_names(wanted: Iterable[str] | None) -> list[str]:
    """Rows by name or by class (attention, normalized, fused, gated_delta_net, kernel).

    :raises OLMoConfigurationError: For a name that is neither.
    """
    everything = [KERNEL, *MIXERS]
    if not wanted:
        return everything
    names: list[str] = []
    for name in wanted:
        found = [m.name for m in MIXERS.values() if name in (m.name, m.family)]
        if name == KERNEL:
            found = [KERNEL]
        if not found:
            families = dict.fromkeys(m.family for m in MIXERS.values())
            raise OLMoConfigurationError(
                f"There is no mixer {name!r}. Choose a class ({', '.join((*families, KERNEL))}) or "
                f"one layer ({', '.join(MIXERS)})."
            )
        names += found
    return [name for name in everything if name in names]


def cells(
    mixers: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    *,
    quick: bool = False,
    ranks: int = RANKS,
) -> list[Cell]:
    """All cells of some mixers and backends; of all of them by default.

    :param ranks: How many share the sharded ones. An even number from four on has those that are
        shared in two ways: heads and sequences, or sequences by a ring of Ulysses pairs.
    :param quick: Only float32 and bfloat16, and a mixer or two of each class where none are named.
    """
    names = mixer_names(mixers)
    if quick and not mixers:
        names = [name for name in names if name in QUICK_MIXERS]
    out = []
    for backend in backends or CAPABILITIES:
        for name in names:
            if name != KERNEL and not MIXERS[name].has_backend and backend != "torch":
                continue  # the gated delta net has one form, and it is torch's
            rows: Iterable[Any] = Feature if name == KERNEL else PROPERTIES
            if ranks < 4 or ranks % 2:
                rows = [row for row in rows if row not in (HYBRID, TP_CP)]
            dtypes = [d for d in CAPABILITIES[backend].dtypes if not quick or d in QUICK_DTYPES]
            out += [Cell(name, backend, dtype, str(row)) for row in rows for dtype in dtypes]
    return out


def run(todo: Iterable[Cell], device: torch.device, ranks: int = RANKS) -> Iterator[Outcome]:
    """Check cell by cell. A cell that raises has failed; nothing is raised from here.

    :param ranks: How many share the sharded ones.
    """
    environment = Environment.detect(device)
    head_dim = probe_head_dim(device)
    subject = cache(lambda name: Subject(MIXERS[name], head_dim, device, ranks))
    for cell in todo:
        if reasons := why_not(cell, subject, environment, head_dim, ranks):
            yield Outcome(cell, "skipped", reasons=tuple(reasons))
            continue
        prop = None if cell.mixer == KERNEL else PROPERTIES[cell.prop]
        start = perf_counter()
        try:
            if prop is None:
                place = Place(cell.backend, device, cell.dtype, head_dim)
                comparisons = CHECKS[Feature(cell.prop)](place)
            else:
                s = subject(cell.mixer)
                comparisons = prop.check(s, s.layer(cell.backend, cell.dtype), cell.dtype)
        except Exception as e:
            lines = str(e).strip().splitlines() or [""]
            reason = f"{type(e).__name__}: {lines[0][:300]}"
            yield Outcome(cell, "failed", reasons=(reason,), seconds=perf_counter() - start)
            continue
        yield _judged(cell, comparisons, perf_counter() - start)


def why_not(
    cell: Cell,
    subject: Callable[[str], Subject],
    environment: Environment,
    head_dim: int,
    ranks: int,
) -> list[str]:
    """Every reason why a cell can't be checked here; none if it can.

    :param subject: A mixer's, by its name.
    :param ranks: How many share a sharded cell.
    """
    request = Request(cell.dtype, head_dim, cell.features)
    reasons = refusals(CAPABILITIES[cell.backend], environment, request)
    if cell.dtype == torch.float64 and environment.device == "mps":
        reasons.append("mps has no float64")
    if cell.is_sharded and not reasons:
        layer = subject(cell.mixer).layer("torch", torch.float32)
        if reason := PROPERTIES[cell.prop].unsuited(layer, ranks):
            reasons.append(reason)
    return reasons


def _judged(cell: Cell, comparisons: list[Comparison], seconds: float) -> Outcome:
    w = worst(comparisons)
    status = "passed" if all(c.passed for c in comparisons) else "failed"
    return Outcome(cell, status, w.error, w.bound, w.what, (), seconds)
