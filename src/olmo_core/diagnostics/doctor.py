"""What works on this machine: each tick from a tiny forward and backward, each failure a value.

Nothing here raises for what a machine lacks, or for what a library does wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from olmo_core.config import DType
from olmo_core.diagnostics.extras import EXTRAS, Extra
from olmo_core.diagnostics.kernel_checks import CHECKS, Place
from olmo_core.diagnostics.machine import Machine, describe, probe_head_dim
from olmo_core.diagnostics.measures import worst
from olmo_core.diagnostics.verify import KERNEL, Cell, Outcome
from olmo_core.diagnostics.verify_processes import run_in_processes
from olmo_core.nn.attention.capabilities import (
    CAPABILITIES,
    Environment,
    Request,
    feature_reasons,
    installation_reasons,
)
from olmo_core.nn.attention.kernels.softmax import Capabilities, Feature

__all__ = ["CASES", "BackendRow", "ChoiceRow", "Report", "Tick", "examine", "steps"]

_UNTRIED = "not tried"

CASES: dict[str, frozenset[Feature]] = {
    "full": frozenset({Feature.backward}),
    "window": frozenset({Feature.backward, Feature.window}),
    "documents": frozenset({Feature.backward, Feature.documents}),
    "decode": frozenset({Feature.documents, Feature.kv_cache}),
}
"""What is asked of a backend in each case of the automatic choice."""


@dataclass(frozen=True)
class Tick:
    """Whether a backend has a feature here."""

    status: str
    """yes; no: the capability table says why; failed: it ought to."""
    why: str = ""


@dataclass(frozen=True)
class BackendRow:
    """A backend on this machine."""

    name: str
    title: str
    works: bool
    dtype: str
    """Of the probes."""
    cause: str
    """Why it does not work; empty if it does."""
    mend: str
    """The command, or the advice, that mends that; empty if there is nothing to mend."""
    features: dict[str, Tick]


@dataclass(frozen=True)
class ChoiceRow:
    """The automatic choice for one case."""

    case: str
    dtype: str
    backend: str
    form: str
    """Which of its implementations serves, where it has several."""
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that ``doctor`` prints."""

    machine: Machine
    backends: list[BackendRow]
    extras: list[Extra]
    choices: list[ChoiceRow]

    @property
    def healthy(self) -> bool:
        """Whether the torch backend works, which has to everywhere."""
        return all(row.works for row in self.backends if row.name == "torch")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def steps() -> int:
    """How many names :func:`examine` announces."""
    return len(CAPABILITIES) * len(Feature) + len(EXTRAS) + 1


def examine(device: torch.device, announce: Callable[[str], None] = lambda name: None) -> Report:
    """Try everything on ``device``.

    :param announce: Called with the name of each thing before it is tried.
    """
    environment = Environment.detect(device)
    several = device.type == "cuda"  # kernels compile there, and a library may crash
    tried = _try_in_processes(environment, device, announce) if several else {}
    backends = [
        _backend(c, environment, device, announce, tried.get(c.name)) for c in CAPABILITIES.values()
    ]
    extras = []
    for name in EXTRAS:
        announce(name)
        extras.append(_guarded(name, device))
    announce("automatic choice")
    return Report(describe(device), backends, extras, _choices(environment, device))


def _backend(
    c: Capabilities,
    environment: Environment,
    device: torch.device,
    announce: Callable[[str], None] = lambda name: None,
    tried: Mapping[Feature, str] | None = None,
) -> BackendRow:
    """A row of the report.

    :param tried: What went wrong for each feature, or nothing, where that is known already.
    """
    place = _place(c, device)

    def failure_of(feature: Feature) -> str:
        return _failure(place, feature) if tried is None else tried[feature]

    reasons = installation_reasons(c, environment)
    cause, mend = (reasons[0], _mend(c, environment)) if reasons else ("", "")
    features: dict[str, Tick] = {}
    if not cause and (failure := failure_of(Feature.backward)):
        cause, mend = failure, _reinstall(c)
    for feature in Feature:
        if tried is None or feature not in CHECKS:
            announce(f"{c.name}: {feature}")
        if cause:
            features[feature] = Tick("no", cause)
        elif refused := feature_reasons(c, [feature]):
            features[feature] = Tick("no", refused[0].partition(": ")[2])
        elif failure := failure_of(feature):
            features[feature] = Tick("failed", failure)
        else:
            features[feature] = Tick("yes")
    return BackendRow(
        c.name, c.title, not cause, str(DType.from_pt(place.dtype)), cause, mend, features
    )


def _place(c: Capabilities, device: torch.device) -> Place:
    # What is trained in: half precision on a GPU. A CPU computes in float32.
    dtype = torch.bfloat16 if device.type == "cuda" or c.name != "torch" else torch.float32
    return Place(c.name, device, dtype, probe_head_dim(device))


def _failure(place: Place, feature: Feature) -> str:
    """What goes wrong, or nothing."""
    try:
        w = worst(CHECKS[feature](place))
    except Exception as e:  # whatever a library does wrong is the answer
        return _first_line(e)
    return "" if w.passed else _off(w.what, w.error, w.bound)


def _try_in_processes(
    environment: Environment,
    device: torch.device,
    announce: Callable[[str], None],
    jobs: int = max(1, min(8, (os.cpu_count() or 1) // 2)),
) -> dict[str, dict[Feature, str]]:
    """:func:`_failure` of each backend that is installed and each feature, by several processes."""
    places = {
        c.name: _place(c, device)
        for c in CAPABILITIES.values()
        if not installation_reasons(c, environment)
    }
    tried = {name: dict.fromkeys(Feature, _UNTRIED) for name in places}
    # The table's last backends compile longest. Each process imports what it is given, so it is
    # given two features of a backend at a time.
    todo = [
        Cell(KERNEL, name, places[name].dtype, str(feature))
        for name in reversed(places)
        for feature in CHECKS
    ]
    pair = {str(feature): i // 2 for i, feature in enumerate(CHECKS)}
    checked = run_in_processes(
        todo, device, jobs, together=lambda cell: (cell.backend, pair[cell.prop])
    )
    with closing(checked):
        for outcome in checked:
            announce(f"{outcome.cell.backend}: {outcome.cell.prop}")
            tried[outcome.cell.backend][Feature(outcome.cell.prop)] = _complaint(outcome)
    return tried


def _complaint(outcome: Outcome) -> str:
    if outcome.reasons:
        return outcome.reasons[0]
    if outcome.status == "passed" or outcome.error is None or outcome.bound is None:
        return ""
    return _off(outcome.tensor, outcome.error, outcome.bound)


def _off(what: str, error: float, bound: float) -> str:
    return f"{what} is off by {error:.1e}, more than {bound:.1e}"


def _mend(c: Capabilities, environment: Environment) -> str:
    if any("GPU" in reason for reason in installation_reasons(c, environment)):
        return "no command: use backend='torch' on this machine"
    return c.install or "no command: use backend='torch'"


def _reinstall(c: Capabilities) -> str:
    if not c.install:
        return "pip install --force-reinstall torch"
    return f"installed but broken, build it again for torch {torch.__version__}: {c.install}"


def _guarded(name: str, device: torch.device) -> Extra:
    purpose, probe, mend = EXTRAS[name]
    try:
        version, cause = probe(device)
    except Exception as e:  # as above
        version, cause = "", _first_line(e)
    return Extra(name, purpose, not cause, version, cause, mend if cause else "")


def _choices(environment: Environment, device: torch.device) -> list[ChoiceRow]:
    rows = []
    for case, features in CASES.items():
        for dtype in (torch.bfloat16, torch.float32):
            try:
                backend, form, reason = _choice(case, features, dtype, environment, device)
            except Exception as e:  # as above
                backend, form, reason = "none", "", _first_line(e)
            rows.append(ChoiceRow(case, str(DType.from_pt(dtype)), backend, form, reason))
    return rows


def _choice(
    case: str,
    features: frozenset[Feature],
    dtype: torch.dtype,
    environment: Environment,
    device: torch.device,
) -> tuple[str, str, str]:
    from olmo_core.nn.attention.selection import choose

    head_dim = 128 if device.type == "cuda" else probe_head_dim(device)
    choice = choose(environment, Request(dtype, head_dim, features), device)
    form = _torch_form(case, dtype, head_dim, device) if choice.name == "torch" else ""
    reason = choice.reason
    if case == "decode":
        reason += f"; one token a step: {_step_form(dtype, head_dim, device)}, for every backend"
    return choice.name, form, reason


def _torch_form(case: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    from olmo_core.nn.attention.kernels.softmax import torch_sdpa
    from olmo_core.nn.attention.segments import Segments

    q = torch.empty(1, 8, 1, head_dim, dtype=dtype, device=device)
    if case in ("documents", "decode"):
        cu = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        segments = Segments.documents(cu, 5)
    else:
        segments = Segments.dense(8, 8, window=3 if case == "window" else -1)
    return torch_sdpa.choose(q, q, segments, 0.0)


def _step_form(dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    from olmo_core.nn.attention.kernels.decode import DECODE_KERNELS, choose_decode

    q = torch.empty(1, 1, 4, head_dim, dtype=dtype, device=device)
    return DECODE_KERNELS[choose_decode(q, q[:, :, :1]).name].title


def _first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:200]}".rstrip(": ")
