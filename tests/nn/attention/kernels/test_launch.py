"""Kernels that are compiled ahead, and launches that wait: with kernels that do nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olmo_core.config import DType
from olmo_core.nn.attention import GatedDeltaNetConfig
from olmo_core.nn.attention.kernels import launch, triton_driver
from olmo_core.nn.attention.kernels.launch import compile_ahead, only_compiling, shaped_like

pytestmark = pytest.mark.skipif(
    triton_driver.INTERPRETED or find_spec("triton") is None,
    reason="the interpreter compiles nothing",
)
GPU = torch.device("cuda", 0)
SECONDS = 30  # until a test that hangs fails


class Kernel:
    """Compiles when it may, and tells when it is asked to."""

    def __init__(self, log: list[tuple[str, str]], name: str, fails: bool = False) -> None:
        self.log, self.name, self.fails = log, name, fails
        self.may, self.asked = threading.Event(), threading.Event()
        self.compiling = self.most = 0

    def warmup(self, *args: Any, grid: tuple[int, ...]) -> Any:
        self.asked.set()
        self.compiling += 1
        self.most = max(self.most, self.compiling)
        assert self.may.wait(SECONDS)
        self.compiling -= 1
        if self.fails:
            raise RuntimeError("out of shared memory")
        self.log.append((self.name, "compiled"))
        return SimpleNamespace(src=self.name, metadata=None)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.log.append((self.name, "launched"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    from triton.runtime import driver

    log: list[tuple[str, str]] = []

    def made(src: str, metadata: object) -> None:
        log.append((src, "launcher"))

    monkeypatch.setattr(driver, "_active", SimpleNamespace(launcher_cls=made))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launch, "_hash_compiler", lambda: None)
    monkeypatch.setattr(launch, "_MOST_THREADS", 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for name, empty in (("_started", set()), ("_pending", {}), ("_one_at_a_time", {})):
        monkeypatch.setattr(launch, name, empty)
    launch._compilers.cache_clear()
    yield log
    launch._compilers().shutdown()
    launch._compilers.cache_clear()


def launch_all(*kernels: Kernel) -> None:
    for kernel in kernels:
        launch.launch(kernel, (1,))(0)


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_all_are_asked_for_at_once_and_each_launch_waits_for_its_own(
    log: list[tuple[str, str]],
) -> None:
    first, second, third = (Kernel(log, name) for name in ("first", "second", "third"))
    compile_ahead("class", GPU, lambda: launch_all(first, second, third))
    for kernel in (first, second, third):
        assert kernel.asked.wait(SECONDS)
    assert log == []
    second.may.set()
    launch_all(second)
    assert log == [("second", "compiled"), ("second", "launcher"), ("second", "launched")]
    waiting = in_thread(lambda: launch_all(first))
    waiting.join(0.05)
    assert waiting.is_alive() and ("first", "launched") not in log
    first.may.set()
    waiting.join(SECONDS)
    assert log[3:] == [("first", "compiled"), ("first", "launcher"), ("first", "launched")]
    third.may.set()
    launch_all(third)
    assert not launch._pending


def test_a_class_is_compiled_once_and_only_on_a_gpu(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(log, "kernel")
    kernel.may.set()
    for key, device in (
        ("one", GPU), ("one", GPU), ("two", GPU), ("one", torch.device("cuda", 1)),
        ("three", torch.device("cpu")), ("three", torch.device("meta")),
    ):  # fmt: skip
        compile_ahead(key, device, lambda: launch_all(kernel))
    launch_all(kernel)
    assert log.count(("kernel", "compiled")) == 3
    monkeypatch.setattr(launch, "INTERPRETED", True)
    compile_ahead("three", GPU, lambda: launch_all(kernel))
    launch_all(kernel)
    assert log.count(("kernel", "compiled")) == 3


def test_one_kernel_is_compiled_by_one_thread_at_a_time(log: list[tuple[str, str]]) -> None:
    """So the second time finds what the first compiled."""
    kernel = Kernel(log, "kernel")
    compile_ahead("both ways", GPU, lambda: launch_all(kernel, kernel))
    assert kernel.asked.wait(SECONDS)
    kernel.may.set()
    launch_all(kernel)
    assert kernel.most == 1 and log.count(("kernel", "compiled")) == 2


def test_an_error_is_left_to_the_launch(log: list[tuple[str, str]]) -> None:
    bad, good = Kernel(log, "bad", fails=True), Kernel(log, "good")
    bad.may.set()
    good.may.set()

    def call() -> None:
        launch_all(bad, good)
        raise ValueError("no such shape")

    compile_ahead("class", GPU, call)
    launch_all(bad, good)
    assert log.count(("bad", "launched")) == 1
    assert log[-1] == ("good", "launched") and ("good", "compiled") in log


def test_a_class_may_be_made_of_others(log: list[tuple[str, str]]) -> None:
    inner, outer = Kernel(log, "inner"), Kernel(log, "outer")
    inner.may.set()
    outer.may.set()

    def layer() -> None:
        compile_ahead("op", GPU, lambda: launch_all(inner))
        launch_all(outer)

    compile_ahead("layer", GPU, layer)
    compile_ahead("op", GPU, lambda: launch_all(inner))
    launch_all(inner, outer)
    assert sorted(log) == sorted(
        (name, what) for name in ("inner", "outer") for what in ("compiled", "launcher", "launched")
    )


def test_only_compiling_compiles_in_this_thread(log: list[tuple[str, str]]) -> None:
    kernel = Kernel(log, "kernel")
    kernel.may.set()
    with only_compiling():
        launch_all(kernel)
        other = in_thread(lambda: launch_all(kernel))
        other.join(SECONDS)
    launch_all(kernel)
    assert log == [("kernel", "compiled"), ("kernel", "launched"), ("kernel", "launched")]


def test_shapes_keep_strides_and_nothing_else() -> None:
    x = torch.zeros(4, 6, dtype=torch.float16)[:, ::2]
    like, none = shaped_like(x, None)
    assert none is None and like.is_meta
    assert (like.shape, like.stride(), like.dtype) == (x.shape, x.stride(), x.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="elsewhere the rule's kernels are tried first",
)
def test_the_first_calls_of_a_layer_compile_each_kernel_once_and_ahead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the compilers' threads alone."""
    from triton import knobs

    compiled: list[tuple[str, str, bool]] = []

    def heard(*, src: Any, cache_hit: bool, **_: Any) -> None:
        name = f"{src.fn.__module__}.{src.name}"
        compiled.append((name, threading.current_thread().name, cache_hit))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", heard)
    config = GatedDeltaNetConfig(n_heads=3, head_dim=80, dtype=DType.bfloat16)
    layer = config.build(128, layer_idx=0, n_layers=1, init_device="cuda")

    def run(batch: int, tokens: int, cu: torch.Tensor | None = None) -> list[torch.Tensor]:
        x = torch.randn(batch, tokens, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        y = layer(x, cu_doc_lens=cu)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    for batch, tokens in ((2, 100), (1, 333), (3, 64)):
        run(batch, tokens)
        assert len(compiled) == 11, compiled
    for ends in ([0, 60, 200], [0, 1, 2, 150, 200]):
        run(1, 200, torch.tensor(ends, dtype=torch.int32, device="cuda"))
        assert len(compiled) == 11 + 7, compiled  # the rule's and the convolution's
    names = [name for name, _, _ in compiled]
    assert len(set(names)) == 11 and all(names.count(name) <= 2 for name in names)
    assert all(thread.startswith("triton-compiler") for _, thread, _ in compiled), compiled
    assert not any(hit for _, _, hit in compiled)
