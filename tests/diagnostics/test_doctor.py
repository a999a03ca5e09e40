"""``doctor`` as values: what works, what does not and why; nothing that goes wrong is raised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from olmo_core.diagnostics import doctor, extras
from olmo_core.diagnostics.kernel_checks import CHECKS
from olmo_core.diagnostics.verify import KERNEL, Cell, Outcome
from olmo_core.nn.attention import selection
from olmo_core.nn.attention.capabilities import CAPABILITIES, Environment
from olmo_core.nn.attention.kernels.softmax import Feature, get_kernel, register_kernel

CPU = torch.device("cpu")
H100 = Environment(
    "cuda", (9, 0), frozenset({"flash_attn_3", "flash_attn.cute", "transformer_engine"})
)


@pytest.fixture
def registered() -> Iterator[Any]:
    """Replaces kernels and forgets what was probed."""
    good = get_kernel("torch")
    yield register_kernel
    register_kernel(good)
    selection._PROBES.clear()


class Wrong:
    """Attends to the future: right shapes, wrong numbers."""

    name = "torch"

    def __init__(self) -> None:
        self.good = get_kernel("torch")

    def forward(self, q: Any, k: Any, v: Any, s: Any, **kwargs: Any) -> Any:
        out, lse, rng = self.good.forward(q, k, v, s, **kwargs)
        return out.flip(1), lse, rng

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        return self.good.backward(*args, **kwargs)


class Raises(Wrong):
    def backward(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("libfoo.so.12: undefined symbol\nmore")


def test_this_machine() -> None:
    announced: list[str] = []
    report = doctor.examine(CPU, announced.append)
    assert len(announced) == doctor.steps()
    assert report.healthy
    rows = {row.name: row for row in report.backends}
    assert list(rows) == list(CAPABILITIES)
    torch_row = rows["torch"]
    assert torch_row.works and not torch_row.cause and not torch_row.mend
    assert all(tick.status == "yes" for tick in torch_row.features.values())
    assert {(row.case, row.dtype) for row in report.choices} == {
        (case, dtype) for case in doctor.CASES for dtype in ("bfloat16", "float32")
    }
    assert all(row.backend == "torch" and row.form and row.reason for row in report.choices)
    json.dumps(report.as_dict())


@pytest.mark.slow
def test_processes_try_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where kernels compile and libraries crash."""
    announced: list[str] = []
    tried = doctor._try_in_processes(Environment(), CPU, announced.append, jobs=2)
    assert set(tried) == {"torch"}
    assert set(announced) == {f"torch: {feature}" for feature in CHECKS}
    together = doctor._backend(
        CAPABILITIES["torch"], Environment(), CPU, announced.append, tried["torch"]
    )
    assert together == doctor._backend(CAPABILITIES["torch"], Environment(), CPU)
    assert len(announced) == len(Feature)


def test_what_a_process_found_is_in_the_row() -> None:
    tried = {**dict.fromkeys(Feature, ""), Feature.lse: "its process died: SIGSEGV."}
    row = doctor._backend(CAPABILITIES["torch"], Environment(), CPU, tried=tried)
    assert row.works
    assert row.features[Feature.lse] == doctor.Tick("failed", "its process died: SIGSEGV.")
    cell = Cell(KERNEL, "te", torch.bfloat16, "lse")
    assert doctor._complaint(Outcome(cell, "passed", 0.1, 0.2, "dq")) == ""
    assert doctor._complaint(Outcome(cell, "failed", 0.3, 0.2, "dq")) == (
        "dq is off by 3.0e-01, more than 2.0e-01"
    )


@pytest.mark.parametrize("name", ["flash_2", "flash_3", "flash_4", "te"])
def test_an_absent_backend_has_one_cause_and_one_way_out(name: str) -> None:
    row = doctor._backend(CAPABILITIES[name], Environment(), CPU)
    assert not row.works
    assert "needs an NVIDIA GPU" in row.cause
    assert row.mend == "no command: use backend='torch' on this machine"
    assert {tick.status for tick in row.features.values()} == {"no"}


def test_what_pip_can_mend_is_a_command() -> None:
    row = doctor._backend(CAPABILITIES["te"], Environment("cuda", (9, 0)), CPU)
    assert "transformer_engine is not installed" in row.cause
    assert row.mend == 'pip install --no-build-isolation "transformer_engine[pytorch]"'


def test_installed_but_broken_is_a_cause(registered: Any) -> None:
    """The package is found, and then it does not import: as after an upgrade of torch."""
    row = doctor._backend(CAPABILITIES["flash_3"], H100, CPU)
    assert not row.works and row.cause
    assert row.mend.startswith("installed but broken")


@pytest.mark.parametrize(
    ("kernel", "cause"), [(Wrong, "out is off by"), (Raises, "OSError: libfoo")]
)
def test_a_tick_is_a_computation(registered: Any, kernel: type[Wrong], cause: str) -> None:
    registered(kernel())
    row = doctor._backend(CAPABILITIES["torch"], Environment(), CPU)
    assert not row.works
    assert row.cause.startswith(cause) and "\n" not in row.cause
    assert row.mend == "pip install --force-reinstall torch"


def test_a_feature_can_fail_alone(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(self: Wrong, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Any:
        return self.good.forward(*args, **kwargs)  # as if there were no dropout

    monkeypatch.setattr(Wrong, "forward", dropped)
    monkeypatch.setattr(
        Wrong, "backward", lambda self, *a, dropout_p=0.0, **k: self.good.backward(*a, **k)
    )
    registered(Wrong())
    row = doctor._backend(CAPABILITIES["torch"], Environment(), CPU)
    assert row.works
    failed = {f: t.why for f, t in row.features.items() if t.status == "failed"}
    assert set(failed) == {Feature.dropout}
    assert "draw" in failed[Feature.dropout]


def test_an_extra_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(device: torch.device) -> tuple[str, str]:
        raise SystemError("broken\nin two lines")

    monkeypatch.setitem(extras.EXTRAS, "triton", ("compiles", probe, "mend it"))
    row = doctor._guarded("triton", CPU)
    assert (row.works, row.cause, row.mend) == (False, "SystemError: broken", "mend it")


def test_a_choice_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core.nn.attention import selection

    def choose(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(selection, "choose", choose)
    assert {row.reason for row in doctor._choices(Environment(), CPU)} == {"RuntimeError: no"}
