"""When FlashQLA serves: by what it can't do, by times, by a probe; and who says so."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from olmo_core.diagnostics import extras
from olmo_core.nn.attention.kernels.gated_delta_rule import (
    flash_qla,
    flash_qla_machine,
    flash_qla_times,
    rules,
)
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla import flash_qla_gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla_times import Measured
from olmo_core.nn.attention.kernels.gated_delta_rule.probe import Problem

CUDA = torch.device("cuda", 0)


@dataclass
class OnGpu:
    """What a tensor on a GPU tells of itself."""

    shape: torch.Size
    dtype: torch.dtype = torch.bfloat16
    requires_grad: bool = False
    device: torch.device = CUDA
    is_cuda: bool = True

    def numel(self) -> int:
        return self.shape.numel()


def on_gpu(
    batch: int = 2, tokens: int = 8192, heads: int = 16, values: int = 16, value_dim: int = 256,
    key_dim: int = 128, **options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    rows = batch, tokens
    return tuple(
        OnGpu(torch.Size(shape), **options)
        for shape in ((*rows, heads, key_dim), (*rows, values, value_dim))
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hopper GPU with all that it needs, measured as faster in the shapes of ``on_gpu``."""
    facts: dict[str, Any] = {"probes": [], "capability": (9, 0), "capturing": False}
    times = (
        Measured(2, 8192, 16, 16, 256, False, 0.5, 0.6),
        Measured(2, 8192, 16, 16, 256, True, 2.7, 2.1),
    )

    def probe(problem: Problem, gradients: bool) -> tuple[bool, str]:
        facts["probes"].append((problem, gradients))
        return facts.get("answer", (True, "agrees"))

    monkeypatch.setattr(flash_qla, "_probe", probe)
    monkeypatch.setattr(flash_qla_times, "MEASURED", times)
    monkeypatch.setattr(flash_qla_machine, "_package_refusal", lambda _: facts.get("package"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: facts["capturing"])
    return facts


def test_it_serves_where_it_measured_faster(gpu: dict[str, Any]) -> None:
    assert flash_qla.flash_qla_refusal(*on_gpu()) is None
    problem = Problem(CUDA, torch.bfloat16, 128, 256, 1, key_heads=16, batch=2)
    assert gpu["probes"] == [(problem, False)]
    gpu["answer"] = False, "its probe is off by 1.0e+00"
    assert flash_qla.flash_qla_refusal(*on_gpu()) == "its probe is off by 1.0e+00"


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "package": ({}, {"package": "it is not installed"}, "it is not installed"),
    "Ampere": ({}, {"capability": (8, 0)}, "9.0, and cuda:0 has 8.0"),
    "Blackwell": ({}, {"capability": (10, 0)}, "9.0, and cuda:0 has 10.0"),
    "float32": ({"dtype": torch.float32}, {}, "not torch.float32"),
    "keys": ({"key_dim": 64}, {}, "key_dim is 128, not 64"),
    "values": ({"value_dim": 192}, {}, "a multiple of 128, not 192"),
    "one key": ({"batch": 1, "tokens": 1, "heads": 1}, {}, "fewer than two keys"),
    "nothing": ({"tokens": 0}, {}, "fewer than two keys"),
    "32 bits": ({"tokens": 2**18}, {}, "32 bits, and v has 2147483648"),
    "gradients": ({"requires_grad": True}, {}, "took 2.70 ms where the Triton kernels' took 2.10"),
    "few tokens": (
        {"tokens": 4096},
        {},
        "no measurement speaks for forward without gradients of 2 x 4096",
    ),
    "few heads": ({"heads": 8, "values": 8, "tokens": 2**15}, {}, "8 key and 8 value heads"),
    "group": ({"heads": 8}, {}, "8 key and 16 value heads of 256"),
    "narrow": ({"value_dim": 128}, {}, "16 value heads of 128"),
    "graph": ({}, {"capturing": True}, "CUDA graph"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_not_probed(gpu: dict[str, Any], case: str) -> None:
    shape, facts, message = REFUSED[case]
    gpu.update(facts)
    reason = flash_qla.flash_qla_refusal(*on_gpu(**shape))
    assert reason is not None and message in reason and not gpu["probes"]


def test_gradients_count_where_they_are_recorded(gpu: dict[str, Any]) -> None:
    wanting = on_gpu(requires_grad=True)
    with torch.no_grad():
        assert flash_qla.flash_qla_refusal(*wanting) is None
    assert flash_qla.flash_qla_refusal(*wanting) is not None
    q, v = on_gpu()
    assert flash_qla.flash_qla_refusal(q, replace(v, requires_grad=True)) is not None


def test_the_dtype_of_autocast_is_what_was_probed(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")  # whose autocast can be had anywhere
    monkeypatch.setattr(flash_qla, "machine_refusal", lambda device: None)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_qla.flash_qla_refusal(*on_gpu(device=cpu)) is None
        assert len(gpu["probes"]) == 1
        reason = flash_qla.flash_qla_refusal(*on_gpu(device=cpu, dtype=torch.float16))
    assert reason == "autocast makes torch.bfloat16 of inputs of torch.float16"
    assert len(gpu["probes"]) == 1


@pytest.mark.usefixtures("gpu")
def test_who_must_see_one_op_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert "must see the rule" in str(flash_qla.flash_qla_refusal(*on_gpu()))


def test_without_it_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_qla", None)  # an import would raise
    flash_qla_machine._package_refusal.cache_clear()
    q = v = torch.zeros(1, 3, 1, 128)
    assert "not flash_qla, since it runs on CUDA devices, not on cpu" in str(
        rules.choose_rule(q, v)
    )


def test_doctor_says_what_it_is_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    purpose, probe, _ = extras.EXTRAS["flash_qla"]
    assert "40-90 s a kernel" in purpose and "excludes flash-attn 4" in purpose
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert probe(torch.device("cpu"))[1] == 'not installed: pip install "olmo-attention[flash-qla]"'
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    monkeypatch.setattr(extras.metadata, "version", lambda name: {"flash-qla": "0.1.3"}[name])
    cause = "it runs on CUDA devices, not on cpu"
    assert probe(torch.device("cpu")) == ("0.1.3", cause)
    monkeypatch.setattr(flash_qla_machine, "machine_refusal", lambda device: None)
    assert probe(torch.device("cpu")) == ("0.1.3", "")


@pytest.mark.usefixtures("gpu")
def test_the_table_says_why() -> None:
    choice = rules.choose_rule(*on_gpu())
    assert choice.name == "flash_qla" and choice.run is flash_qla_gated_delta_rule
    assert "40 to 90 s each" in choice.reason
    names = [row.name for row in rules.RULES]
    assert names == ["flash_qla", "triton", "fla", "torch"]
