"""What the gated delta net's kernels compile to on GPUs that are not here, and how often.

Triton compiles for any GPU; only a launch needs one. So a driver that names a GPU is all it takes.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from olmo_core.config import DType
from olmo_core.nn import dispatch
from olmo_core.nn.attention.gated_delta_net import layer as layer_module
from olmo_core.nn.attention.gated_delta_net.ahead import first_of_its_kind
from olmo_core.nn.attention.inputs import Call
from olmo_core.nn.attention.kernels import launch, triton_driver
from olmo_core.nn.attention.kernels.gated_delta_rule import RuleInputs, blocks, triton_rule
from olmo_core.nn.attention.kernels.launch import only_compiling

pytestmark = pytest.mark.skipif(
    triton_driver.INTERPRETED or find_spec("triton") is None or torch.cuda.is_available(),
    reason="the interpreter compiles nothing, and a GPU that is here is asked itself",
)
CUDA = torch.device("cuda", 0)
KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program may have, by compute capability."""


class Driver:
    """All that Triton asks of a driver while it compiles."""

    devices = itertools.count()

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.device = next(self.devices)  # for which no test before has compiled anything

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    from triton.runtime import driver

    capability: int = request.param
    monkeypatch.setattr(triton_driver, "_shared_memory_kib", lambda device: KIB[capability])
    monkeypatch.setattr(driver, "_active", Driver(capability))
    return capability


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every kernel that a launch compiles, with its name."""
    kernels = []

    def launched(kernel: Any, grid: tuple[int, ...]) -> Any:
        def compile_(*args: Any, **options: Any) -> None:
            kernels.append((kernel.fn.__name__, kernel.warmup(*args, grid=grid, **options)))

        return compile_

    from olmo_core.nn.attention.kernels.convolution import triton_walk
    from olmo_core.nn.attention.kernels.gated_delta_rule import (
        triton_backward,
        triton_forward,
        triton_shared,
        triton_span,
        triton_step,
        triton_token,
    )
    from olmo_core.nn.attention.kernels.gates import triton_gates

    modules = triton_backward, triton_forward, triton_shared, triton_span, triton_step
    for module in (*modules, triton_token, triton_gates, triton_walk):
        monkeypatch.setattr(module, "launch", launched)
    return kernels


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_rule(
    batch: int = 2, tokens: int = 1000, heads: int = 2, group: int = 1, key_dim: int = 128,
    value_dim: int = 256, documents: bool = False,
) -> None:  # fmt: skip
    """Forward and backward of the rule: what it would launch."""
    values = heads * group
    q, k, v = (empty(batch, tokens, heads, key_dim) for _ in range(3))
    v = empty(batch, tokens, values, value_dim)
    g, beta = (empty(batch, tokens, values, dtype=torch.float32) for _ in range(2))
    cu = empty(5, dtype=torch.int32) if documents else None
    if documents:
        q, k, v, g, beta = (x.flatten(0, 1)[None] for x in (q, k, v, g, beta))
    inputs = RuleInputs(q, k, v, g, beta, cu, 0.1, True)
    _, _, saved = triton_rule.triton_forward(inputs, None, save=True)
    assert saved is not None
    triton_rule.triton_backward(torch.empty_like(v), None, inputs, saved)


def run_around(batch: int = 2, tokens: int = 1000, documents: bool = False) -> None:
    """Convolution, gates, gated norm and a decoding token."""
    from olmo_core.nn.attention.kernels.convolution import triton_walk
    from olmo_core.nn.attention.kernels.gated_delta_rule import triton_step, triton_token
    from olmo_core.nn.attention.kernels.gates import triton_gates

    widths = (256, 256, 512)
    xs = [empty(batch, tokens, width) for width in widths]
    seen = empty(tokens, dtype=torch.int32) if documents else None
    convolution = [empty(width, 1, 4) for width in widths], [None] * 3, [None] * 3, seen, True
    triton_walk.launch_forward(xs, *convolution)
    triton_walk.launch_backward(xs, xs, *convolution)
    # Slices of one product, of which a single token's need no copy, and so may lie anywhere.
    a, b = empty(batch, tokens, 4), empty(batch, tokens, 8)[..., 4 if tokens == 1 else 0 :][..., :4]
    x = empty(batch, tokens, 4, 256)
    wide = empty(batch, tokens, 4, dtype=torch.float32)
    rate, weight = (empty(n, dtype=torch.float32) for n in (4, 256))
    triton_gates.decay_forward(a, b, rate, rate, None, True)
    triton_gates.decay_backward(wide, wide, a, b, rate, rate, None, True)
    triton_gates.norm_forward(x, x, weight, 1e-5)
    triton_gates.norm_backward(x, x, x, weight, 1e-5)
    triton_gates.sigmoid_forward(x, x, True)
    triton_gates.sigmoid_backward(x, x, x, True)
    q, v = empty(batch, 2, 128), empty(batch, 4, 256)
    gate = empty(batch, 4, dtype=torch.float32)
    state = empty(batch, 4, 128, 256, dtype=torch.float32)
    triton_step.launch_step(q, q, v, gate, gate, state, 0.1, True)
    gates = rate, rate, None, True
    triton_step.launch_step(q, q, v, a[:, 0], b[:, 0], state, 0.1, True, gates)
    history = empty(batch, 3, sum(widths))
    triton_token.launch_convolution([y[:, 0] for y in xs], *convolution[:2], history, True)


def run_span(key_dim: int, value_dim: int) -> None:
    """The map of a shard's span."""
    from olmo_core.nn.attention.kernels.gated_delta_rule import triton_span

    q, v = empty(1, 1000, 2, key_dim), empty(1, 1000, 4, value_dim)
    grid = triton_rule._grid(q, v)
    saved = triton_rule.saved_like(q, v)
    assert saved.erasers is not None
    factors = empty(grid.chunks, grid.rows, 7, grid.chunk, dtype=torch.float32)
    triton_span.launch_map(grid, q, factors, saved.erasers, saved.updates, 0)


def check_memory(gpu: int, compiled: list[Any]) -> None:
    taken = {name: kernel.metadata.shared for name, kernel in compiled}
    assert all(kernel.asm["cubin"] for _, kernel in compiled)
    assert max(taken.values()) <= KIB[gpu] << 10, taken


@pytest.mark.parametrize("gpu", [89, 100], indirect=True)
def test_the_rule_fits(gpu: int, compiled: list[Any]) -> None:
    """The least shared memory, and the compiler whose passes are its own."""
    run_rule()
    assert {name for name, _ in compiled} == {"_factors", "_prepare", "_scan", "_gradients"}
    check_memory(gpu, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", list(KIB), indirect=True)
def test_all_kernels_fit(gpu: int, compiled: list[Any]) -> None:
    run_around()
    run_rule()
    run_rule(key_dim=64, value_dim=64, documents=True)
    run_rule(key_dim=256, value_dim=256)
    run_rule(key_dim=96, value_dim=80, group=2)
    for dims in ((64, 64), (128, 256), (256, 256)):
        run_span(*dims)
    assert (
        "_map" in dict(compiled)
        and "_finish" in {name for name, _ in compiled}
        and "_step" in dict(compiled)
    )
    check_memory(gpu, compiled)


def test_each_gpu_has_blocks() -> None:
    assert min(KIB.values()) == blocks.LEAST_SHARED_KIB
    for row in blocks.SCANS:
        assert row.keys <= 256 and row.shared_kib in KIB.values()


class Counter:
    """Which kernels are asked for, by all that they are compiled for. Nothing is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton import knobs

        self.keys: set[tuple[str, str]] = set()
        monkeypatch.setattr(knobs.runtime, "jit_cache_hook", self)

    def __call__(self, **found: Any) -> bool:
        self.keys.add((found["fn"].name, found["key"]))
        return True


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize("documents", [False, True])
def test_other_lengths_and_documents_compile_nothing_anew(
    gpu: int, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    with only_compiling():
        for batch, tokens in ((1, 100), (2, 8192), (1, 1), (2, 333), (3, 64), (1, 1000)):
            run_rule(batch, tokens, documents=documents)
            run_around(1 if documents else batch, tokens, documents)
            expected = 5 + 11
            assert len(counter.keys) == expected, (batch, tokens)
        run_rule(key_dim=64)
        assert len(counter.keys) > expected


class WithoutAutocast:
    """The module ``torch`` for one that switches autocast off around what it calls."""

    def autocast(self, *_: Any, **__: Any) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve meta tensors, as those of a GPU that is here."""
    from olmo_core.nn.attention.gated_delta_net import ahead
    from olmo_core.nn.attention.kernels.convolution import op as convolution
    from olmo_core.nn.attention.kernels.gated_delta_rule import op as rule_op
    from olmo_core.nn.attention.kernels.gates import op as gates

    for module in (ahead, convolution, gates, triton_rule):
        monkeypatch.setattr(module, "triton_refusal", lambda x: None)
    monkeypatch.setattr(triton_rule, "_tested", lambda device: True)
    monkeypatch.setattr(triton_rule, "_device_reason", lambda q, v: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "is_observed", lambda inputs: False)
    # There is no autocast of meta tensors.
    monkeypatch.setattr(rule_op, "torch", WithoutAutocast())
    monkeypatch.setattr(rule_op, "cast_for_autocast", lambda *tensors: tensors)
    monkeypatch.setattr(launch, "_started", set())


def sizes_of(**options: Any) -> Any:
    from olmo_core.nn.attention import GatedDeltaNetConfig

    options = {"n_heads": 2, "head_dim": 64, "dtype": DType.bfloat16, **options}
    config = GatedDeltaNetConfig(**options)
    return config.build(128, layer_idx=0, n_layers=1, init_device="meta")


def stand_in(x: Tensor) -> Any:
    """What is asked of a tensor on a GPU."""
    names = "dtype", "shape", "requires_grad", "numel"
    return SimpleNamespace(device=CUDA, **{name: getattr(x, name) for name in names})


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(
    ("options", "documents", "padded", "backward"),
    [
        ({}, False, False, True),
        ({"conv_bias": True, "n_v_heads": 4}, True, False, True),
        ({"allow_neg_eigval": False}, False, True, False),
        ({"head_dim": 40, "expand_v": 1.5, "conv_size": 2}, True, True, True),
    ],
)
def test_what_a_layer_compiles_ahead_is_what_it_launches(
    gpu: int, on_hopper: None, options: Any, documents: bool, padded: bool, backward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rehearsed on shapes alone, each kernel has the key that its launch asks for."""
    counter = Counter(monkeypatch)
    layer = sizes_of(**options)
    x = empty(2, 100, 128).requires_grad_(backward)
    cu = empty(4, dtype=torch.int32) if documents else None
    padding = empty(2, 100, dtype=torch.bool) if padded else None
    with monkeypatch.context() as here:
        here.setattr(
            launch, "_start", lambda device, *asked, **named: launch._compile(*asked, **named)
        )
        with torch.set_grad_enabled(backward):
            layer._compile_ahead(stand_in(x), cu, padding)
    rehearsed = set(counter.keys)
    assert len(rehearsed) == (6 if not backward else 12 if "n_v_heads" in options else 11)
    counter.keys.clear()
    with only_compiling(), torch.set_grad_enabled(backward):
        # The lengths' and the padding's values are looked at, and a meta tensor has none.
        monkeypatch.setattr(
            layer_module, "read_call",
            lambda *_, **__: Call(None, None, 100, padding, {}),
        )  # fmt: skip
        monkeypatch.setattr(layer_module, "mask_rows", lambda x, padding: x)
        y = layer(x, cu_doc_lens=cu)
        if backward:
            y.backward(torch.empty_like(y))
    assert counter.keys == rehearsed


@pytest.mark.parametrize("gpu", [90], indirect=True)
def test_a_layer_asks_once_for_a_kind_of_call(
    gpu: int, on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(launch, "_start", lambda d, kernel, *_, **__: asked.append(kernel.__name__))
    layer, x, lengths = sizes_of(), empty(2, 100, 128), empty(4, dtype=torch.int32)
    layer._compile_ahead(stand_in(empty(0, 100, 128)), None, None)
    assert asked == []
    layer._compile_ahead(stand_in(x), None, None)
    assert len(asked) == 12  # the factors for both ways
    for again, one_layer in ((x, sizes_of()), (empty(1, 7, 128), layer)):
        one_layer._compile_ahead(stand_in(again), None, None)
    assert len(asked) == 12
    with torch.no_grad():
        layer._compile_ahead(stand_in(x), None, None)
    assert len(asked) == 12 + 6
    layer._compile_ahead(stand_in(x), lengths, None)
    assert len(asked) == 12 + 6 + 8  # rule and convolution
    asked.clear()
    monkeypatch.setattr(launch, "_started", set())
    monkeypatch.setattr(triton_rule, "_tested", lambda device: False)
    sizes_of()._compile_ahead(stand_in(x), None, None)
    assert len(asked) == 6 and not {"_prepare", "_gradients"} & set(asked)  # a probe decides


def test_a_layer_asks_before_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class FirstProduct(Exception):
        pass

    def project(*_: Any) -> None:
        raise FirstProduct

    layer = sizes_of()
    monkeypatch.setattr(layer, "_compile_ahead", lambda *given: done.append(given))
    monkeypatch.setattr(layer_module, "project", project)
    with FakeTensorMode():
        for module in layer.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    like = torch.empty(p.shape, dtype=p.dtype, device=CUDA)
                    module._parameters[name] = torch.nn.Parameter(like)
        x = torch.empty(2, 100, 128, dtype=torch.bfloat16, device=CUDA)
        with pytest.raises(FirstProduct):
            layer(x)
        assert done == [(x, None, None)]


def test_a_call_that_is_watched_is_no_first_one() -> None:
    """Under a mode nothing may be launched: a fake tensor has no data."""
    layer = sizes_of()
    with FakeTensorMode():
        x = torch.empty(2, 100, 128, dtype=torch.bfloat16, device=CUDA)
        assert not first_of_its_kind(layer, x, None, None)
    given = stand_in(x), None, None
    assert first_of_its_kind(layer, *given) and not first_of_its_kind(layer, *given)
    assert first_of_its_kind(copy.deepcopy(layer), *given)
