"""FlashQLA's row of the rule's table, with a stand-in for the library that computes by definition
and asserts what the library does: how arguments are mapped, what is refused, what is remembered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.diagnostics import extras
from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet
from olmo_core.nn.attention.kernels.gated_delta_rule import (
    flash_qla,
    flash_qla_machine,
    flash_qla_times,
    rules,
)
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla import flash_qla_gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla_times import Measured
from olmo_core.nn.attention.kernels.gated_delta_rule.probe import Problem
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

PROBLEM = Problem(torch.device("cpu"), torch.bfloat16, 128, 128, 1, key_heads=1)
LENGTHS: list[Tensor] = []


class TwoOutputs(torch.autograd.Function):
    """One node for both outputs, as the library's: hooks of one see the other's gradient alone."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return out.clone(), states.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        assert all(x.stride() == torch.empty(x.shape).stride() for x in grads)
        return grads


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Any = None,
    initial_state: Any = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None, head_first: bool = False,
    state_v_first: bool = False, auto_cp: bool = True, enable_fwd_cp_cache: bool = True,
    cp_context: Any = None, force_intra_cp: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The signature and the assertions of flash_qla 0.1.3."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[3] == k.shape[3] == v.shape[3] == 128 and v.shape[2] % k.shape[2] == 0
    assert g.dtype == beta.dtype == torch.float32 and g.shape == beta.shape == v.shape[:3]
    given_ = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    assert all(x.stride() == torch.empty(x.shape).stride() for x in given_)
    assert output_final_state and not (auto_cp or head_first or state_v_first or force_intra_cp)
    assert isinstance(scale, float) and not torch.is_autocast_enabled("cpu")
    spans = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    if cu_seqlens is not None:
        assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64
        # What is derived from lengths is kept by the identity of a tensor.
        assert all(cu_seqlens is not known for known in LENGTHS)
        LENGTHS.append(cu_seqlens)
        ends = cu_seqlens.tolist()
        assert all(a < b for a, b in pairwise(ends)), "no empty documents"
        spans = [(0, a, b) for a, b in pairwise(ends)]
    if initial_state is not None:
        assert initial_state.dtype == torch.float32
        assert initial_state.shape == (len(spans), v.shape[2], 128, 128)
    outs, states = [], []
    for i, (row, start, stop) in enumerate(spans):
        parts = (x[row : row + 1, start:stop].double() for x in (q, k, v, g, beta))
        state = None if initial_state is None else initial_state[i : i + 1].double()
        out, state = gated_delta_rule_reference(
            *parts, scale=scale, initial_state=state, normalize_qk=use_qk_l2norm_in_kernel
        )
        outs.append(out)
        states.append(state)
    out = torch.cat(outs, 1).view(v.shape).to(q.dtype)
    answer: tuple[Tensor, Tensor] = TwoOutputs.apply(out, torch.cat(states).float())
    return answer


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("flash_qla")
    module.chunk_gated_delta_rule = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    monkeypatch.setattr(flash_qla, "_PROBED", {})
    LENGTHS.clear()
    yield module
    LENGTHS.clear()


def make(
    batch: int, tokens: int, heads: int, group: int, value_dim: int = 128, seed: int = 0
) -> list[Tensor]:
    """q, k, v, g and beta in bfloat16 and float32, none of them contiguous; beta up to 2."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(tokens, batch, *shape, generator=draw).transpose(0, 1)

    values = heads * group
    shapes = (heads, 128), (heads, 128), (values, value_dim)
    halves = [randn(*s).bfloat16() for s in shapes]
    return [*halves, -0.3 * randn(values).abs(), 2 * randn(values).sigmoid()]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    heads, group, parts = draw(st.sampled_from([(1, 1, 2), (2, 1, 1), (1, 3, 1), (2, 2, 2)]))
    if batch * tokens * heads < 2:
        tokens = 2
    value_dim = 128 * parts
    inputs = make(batch, tokens, heads, group, value_dim, draw(st.integers(0, 99)))
    options: dict[str, Any] = {"normalize_qk": draw(st.booleans())}
    if not options["normalize_qk"]:  # with beta near 2, longer keys than 1 grow beyond bounds
        inputs[1] = inputs[1] / inputs[1].float().norm(dim=-1, keepdim=True).bfloat16()
    if draw(st.booleans()):
        options["scale"] = 0.3
    rows = batch
    if draw(st.booleans()):
        cuts = st.lists(st.integers(0, batch * tokens), max_size=5)
        cu = [0, *sorted(draw(cuts)), batch * tokens]
        options["cu_doc_lens"] = torch.tensor(cu, dtype=torch.int32)
        rows = 1
    if draw(st.booleans()):
        shape = rows, heads * group, 128, value_dim
        options["initial_state"] = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
    return inputs, options


@given(problems(), st.sampled_from([(0,), (1,), (0, 1)]))
@settings(max_examples=40, deadline=None)
def test_it_computes_the_rule(
    problem: tuple[list[Tensor], dict[str, Any]], used: tuple[int, ...]
) -> None:
    inputs, options = problem
    LENGTHS.clear()
    answers = []
    for rule, wide in ((flash_qla_gated_delta_rule, False), (gated_delta_rule_reference, True)):
        given_, state = list(inputs), options.get("initial_state")
        if state is not None:
            given_.append(state)
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in given_]
        called = options if state is None else {**options, "initial_state": leaves[5]}
        out, final = rule(*leaves[:5], **called)
        dout = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape)
        cotangents = [dout.to(out.dtype), torch.full_like(final, 0.1)]
        asked, weights = ([pair[i] for i in used] for pair in ((out, final), cotangents))
        grads = torch.autograd.grad(asked, leaves, weights, materialize_grads=True)
        assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, leaves))
        assert wide or (out.dtype == torch.bfloat16 and final.dtype == torch.float32)
        answers.append([out, final, *grads])
    for got, want in zip(*answers, strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= 2e-2 * want.norm() + 1e-12


def test_autocast_decides_the_dtype() -> None:
    q, k, v, g, beta = (x.float() for x in make(1, 3, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = flash_qla_gated_delta_rule(q, k, v, g, beta)
    assert out.dtype == torch.bfloat16


def test_bad_input_is_refused_at_the_door() -> None:
    q, k, v, g, beta = make(1, 3, 1, 1)
    rule = flash_qla_gated_delta_rule
    with pytest.raises(ValueError, match="q and k"):
        rule(q, k[:, :2], v, g, beta)
    with pytest.raises(ValueError, match="bfloat16 and float16, not torch"):
        rule(q.float(), k.float(), v.float(), g, beta)
    with pytest.raises(ValueError, match="key_dim is 128, not 64"):
        rule(q[..., :64], k[..., :64], v, g, beta)
    with pytest.raises(ValueError, match="value_dim is a multiple of 128, not 96"):
        rule(q, k, v[..., :96], g, beta)
    with pytest.raises(ValueError, match="fewer than two keys"):
        rule(*(x[:, :1] for x in (q, k, v, g, beta)))
    for cu, error in (([0, 4], ValueError), ([1, 3], ValueError), ([0, 2, 1, 3], ValueError)):
        with pytest.raises(error):
            rule(q, k, v, g, beta, cu_doc_lens=torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(TypeError):
        rule(q, k, v, g, beta, cu_doc_lens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="initial_state"):
        rule(q, k, v, g, beta, initial_state=torch.zeros(1, 1, 128, 64))


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.requires_grad_() for x in make(1, 3, 1, 1)]
    for result in flash_qla_gated_delta_rule(*leaves):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(result.sum(), leaves[2:], create_graph=True)
        torch.autograd.grad(result.sum(), leaves[2:], retain_graph=True)


# When it serves


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
    monkeypatch.setattr(flash_qla_machine, "_package_refusal", lambda: facts.get("package"))
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
    "few tokens": ({"tokens": 4096}, {}, "no time of forward without gradients for 2 x 4096"),
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


@pytest.mark.usefixtures("gpu")
def test_who_must_see_one_op_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert "must see the rule" in str(flash_qla.flash_qla_refusal(*on_gpu()))


def test_a_times_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*times: Measured) -> str | None:
        monkeypatch.setattr(flash_qla_times, "MEASURED", times)
        return flash_qla_times.worth_it(*on_gpu(), False)

    small, large = (Measured(2, t, 16, 16, 256, False, 1.0, 1.2) for t in (4096, 8192))
    assert told(small) is None and told(large) is None
    assert "took 1.00 ms" in str(told(small, large._replace(triton_ms=1.02)))
    assert "no time" in str(told(large._replace(batch=4, tokens=4096)))
    assert "no time" in str(told(large._replace(tokens=16384)))
    assert "no time" in str(told(large._replace(gradients=True)))
    assert "no time" in str(told())


# The probe


def test_the_probe_tells_right_from_wrong(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usable, reason = flash_qla._probe(PROBLEM, True)
    assert usable and "forward and backward" in reason
    assert flash_qla._probe(PROBLEM, False)[1].endswith("forward")

    def wrong(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = stand_in(*inputs, **options)
        return 1.1 * out, state

    def wrong_state(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = stand_in(*inputs, **options)
        return out, 1.1 * state

    def wrong_gate(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        *others, beta = inputs
        return stand_in(*others, beta.detach() + 0 * beta, **options)

    def nothing(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = stand_in(*inputs, **options)
        return out * float("nan"), state

    def no_documents(*inputs: Tensor, cu_seqlens: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return stand_in(*inputs, cu_seqlens=None, **options)

    for gradients in (False, True):
        for function in (wrong, wrong_state, nothing, no_documents):
            flash_qla._PROBED.clear()
            library.chunk_gated_delta_rule = function
            usable, reason = flash_qla._probe(PROBLEM, gradients)
            assert not usable and "is off by" in reason, function
    flash_qla._PROBED.clear()
    library.chunk_gated_delta_rule = wrong_gate
    assert flash_qla._probe(PROBLEM, False)[0] and not flash_qla._probe(PROBLEM, True)[0]

    def broken(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("nvcc failed\nand more")

    flash_qla._PROBED.clear()
    library.chunk_gated_delta_rule = broken
    assert flash_qla._probe(PROBLEM, False) == (
        False,
        "its probe failed: RuntimeError: nvcc failed",
    )


def test_what_a_probe_said_holds_for_what_it_was_made_for(library: Any) -> None:
    calls = []

    def counted(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(inputs[0].dtype)
        raise RuntimeError("refuses")

    library.chunk_gated_delta_rule = counted
    changes: list[dict[str, Any]] = [
        {}, {"dtype": torch.float16}, {"value_dim": 256}, {"group": 2}, {"key_heads": 2},
        {"batch": 2}, {"key_dim": 128},
    ]  # fmt: skip
    for n in (1, 2):
        for change in changes:
            flash_qla._probe(replace(PROBLEM, **change), False)
        assert len(calls) == 6, n
    flash_qla._probe(PROBLEM, True)
    assert len(calls) == 7

    def full(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(None)
        raise torch.OutOfMemoryError("none left")

    library.chunk_gated_delta_rule = full
    flash_qla._PROBED.clear()
    for n in (8, 9):
        assert flash_qla._probe(PROBLEM, False) == (False, "its probe found no memory")
        assert len(calls) == n


def test_modes_of_the_caller_do_not_reach_the_probe() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        assert flash_qla._probe(PROBLEM, True)[0]


# The machine


def test_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, here = flash_qla_machine, {"flash_qla", "tilelang"}
    versions = {"apache-tvm-ffi": "0.1.12", "nvidia-cuda-nvcc": "13.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise machine.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(machine, "find_spec", lambda name: name if name in here else None)
    monkeypatch.setattr(machine.metadata, "version", version)
    monkeypatch.setattr(
        machine.metadata, "requires", lambda name: ["torch", "apache-tvm-ffi<0.1.13,>=0.1.11"]
    )
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "/nowhere")
    ask = machine._package_refusal.__wrapped__
    monkeypatch.delitem(sys.modules, "flash_qla")
    assert ask() is None
    for missing in sorted(here):
        here.discard(missing)
        assert 'pip install "olmo-attention[flash-qla]"' in ask()
        here.add(missing)
    versions["apache-tvm-ffi"] = "0.1.15.post2"
    assert "older than 0.1.13, and 0.1.15.post2 is here, as flash-attn 4" in ask()
    del versions["apache-tvm-ffi"]
    assert ask() == "it needs apache-tvm-ffi, which is not installed"
    versions["apache-tvm-ffi"] = "0.1.12"
    del versions["nvidia-cuda-nvcc"]
    assert "compiles with nvcc, and there is none: set CUDA_HOME" in ask()
    assert not {"flash_qla", "tilelang"} & set(sys.modules)


def test_nvcc_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(flash_qla_machine.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not flash_qla_machine._has_nvcc()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert flash_qla_machine._has_nvcc()


def test_without_it_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_qla", None)  # an import would raise
    flash_qla_machine._package_refusal.cache_clear()
    q, _, v, _, _ = make(1, 3, 1, 1)
    assert "not flash_qla, since it runs on CUDA devices, not on cpu" in str(
        rules.choose_rule(q, v)
    )
    usable, reason = flash_qla.flash_qla_usable("cpu")
    assert not usable and "not on cpu" in reason


def test_doctor_says_what_it_is_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    purpose, probe, _ = extras.EXTRAS["flash_qla"]
    assert "10-60 s a kernel" in purpose and "excludes flash-attn 4" in purpose
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert probe(torch.device("cpu"))[1] == 'not installed: pip install "olmo-attention[flash-qla]"'
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    monkeypatch.setattr(extras.metadata, "version", lambda name: {"flash-qla": "0.1.3"}[name])
    cause = "it runs on CUDA devices, not on cpu"
    assert probe(torch.device("cpu")) == ("0.1.3", cause)
    monkeypatch.setattr(flash_qla, "flash_qla_usable", lambda device: (True, "agrees"))
    assert probe(torch.device("cpu")) == ("0.1.3", "")


# The table and the layer


@pytest.mark.usefixtures("gpu")
def test_the_table_says_why() -> None:
    choice = rules.choose_rule(*on_gpu())
    assert choice.name == "flash_qla" and choice.run is flash_qla_gated_delta_rule
    assert "10 to 60 s each" in choice.reason
    names = [row.name for row in rules.RULES]
    assert names == ["flash_qla", "triton", "fla", "torch"]


def test_the_layer_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = GatedDeltaNet(
        d_model=32, n_heads=1, n_v_heads=2, head_dim=128, expand_v=2.0, dtype=torch.bfloat16
    ).requires_grad_(False)
    x = torch.randn(2, 5, 32).bfloat16()
    cu = torch.tensor([0, 1, 7, 10], dtype=torch.int32)

    def answers() -> list[Tensor]:
        outs = [layer(x), layer(x, cu_doc_lens=cu)]
        layer.init_kv_cache_manager(2, 16)
        outs.append(layer(x))
        layer.kv_cache_manager = None
        return outs

    want = answers()
    calls = []

    def run(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(inputs)
        return flash_qla_gated_delta_rule(*inputs, **options)

    row = replace(rules.RULES[0], run=run, refusal=lambda q, v: None)
    monkeypatch.setattr(rules, "RULES", (row, *rules.RULES[1:]))
    for got, expected in zip(answers(), want, strict=True):
        assert (got - expected).norm() <= 2e-2 * expected.norm()
    assert len(calls) == 3
