"""One gated delta net layer, forward + backward: what a training step pays for it, and where.

d_model 2048, 16 heads of 128 keys and 256 values, bf16, batch 2 x 8192 tokens, beside the same
layer in plain torch around the same rule (what the kernels replace), and the floor: its matrix
products at the rate of a large one, plus the bytes of convolution, gates and norm at the rate of a
copy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks._gpu import (
    Report,
    captured,
    copy_tbs,
    gemm_tflops,
    median_ms,
    peak_mib,
    require_cuda,
)
from olmo_core.config import DType
from olmo_core.nn.attention import GatedDeltaNetConfig

BATCH, TOKENS, D_MODEL, DTYPE = 2, 8192, 2048, torch.bfloat16


def build(**options: Any) -> nn.Module:
    config = GatedDeltaNetConfig(dtype=DType.bfloat16, **options)
    return config.build(D_MODEL, layer_idx=0, n_layers=1, init_device="cuda")


@contextmanager
def plain() -> Iterator[None]:
    """Inside, everything around the rule is computed in plain torch."""
    from olmo_core.nn.attention.gated_delta_net import layer as module
    from olmo_core.nn.attention.kernels.convolution import op
    from olmo_core.nn.attention.kernels.gates import op as gates

    with ExitStack() as stack:
        one_by_one = lambda convs, xs, cu=None, states=None, checked=False: [  # noqa: E731
            conv(x, cu) for conv, x in zip(convs, xs, strict=True)
        ]
        for owner, name, value in (
            (op, "ROWS", op.ROWS[-1:]),
            (gates, "GATES", gates.GATES[-1:]),
            (gates, "GATED_NORM", gates.GATED_NORM[-1:]),
            (module, "convolve_together", one_by_one),
            (module, "project", lambda linears, x: [w(x) for w in linears]),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def step(layer: Callable[..., Tensor], module: nn.Module, graph: bool = True) -> dict[str, float]:
    inputs = [
        torch.randn(BATCH, TOKENS, D_MODEL, device="cuda", dtype=DTYPE).requires_grad_()
        for _ in range(2)
    ]
    dout = torch.randn_like(inputs[0])

    def run(x: Tensor) -> None:
        for leaf in (x, *module.parameters()):
            leaf.grad = None
        layer(x).backward(dout)

    calls = [partial(run, x) for x in inputs]
    times = {"fb_ms": round(median_ms(calls), 3)}
    with torch.no_grad():
        times["fwd_ms"] = round(median_ms([partial(layer, x) for x in inputs]), 3)
    times["peak_mib"] = round(peak_mib(calls[0]))
    if graph:
        times["graph_fb_ms"] = round(median_ms([captured(call) for call in calls]), 3)
    return times


def lengths() -> Tensor:
    """Documents of 1 to 2000 tokens."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(1, 2000, (200,), generator=generator).cumsum(0)
    total = BATCH * TOKENS
    ends = ends[ends < total]
    return torch.tensor([0, *ends.tolist(), total], dtype=torch.int32, device="cuda")


def layer(compiled: bool = False, documents: bool = False, **options: Any) -> dict[str, float]:
    module = build(**options)
    call: Callable[..., Tensor] = module
    if documents:
        call = partial(module, cu_doc_lens=lengths())
    if compiled:
        call = torch.compile(call, fullgraph=True)
    return step(call, module, graph=not compiled and not documents)


def before() -> dict[str, float]:
    with plain():
        return layer()


def rule(batch: int, tokens: int, heads: int, value_heads: int, K: int, V: int) -> dict[str, float]:
    """The rule alone."""
    from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule

    def inputs() -> list[Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(batch, tokens, *shape, device="cuda")

        halves = [randn(heads, K), randn(heads, K), randn(value_heads, V)]
        gates = [-0.2 * randn(value_heads).abs(), 2 * randn(value_heads).sigmoid()]
        return [x.requires_grad_() for x in (*(x.to(DTYPE) for x in halves), *gates)]

    sets = [inputs() for _ in range(2)]
    dout = torch.randn(batch, tokens, value_heads, V, device="cuda", dtype=DTYPE)

    def forward(args: list[Tensor]) -> None:
        with torch.no_grad():
            gated_delta_rule(*args, normalize_qk=True)

    def both(args: list[Tensor]) -> None:
        torch.autograd.grad(gated_delta_rule(*args, normalize_qk=True)[0], args, dout)

    calls = {"fwd_ms": forward, "fb_ms": both}
    return {
        name: round(median_ms([partial(call, args) for args in sets]), 3)
        for name, call in calls.items()
    }


def decoding(batch: int = 32) -> dict[str, float]:
    """A token of the rule, and of the whole layer, each replayed as a CUDA graph."""
    from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule_step_

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, 16, *shape, device="cuda")

    q, k, v = (randn(n).to(DTYPE) for n in (128, 128, 256))
    g, beta = -randn().abs(), randn().sigmoid()
    states = [randn(128, 256) for _ in range(3)]  # a graph does not keep what it replays on
    steps = [
        captured(partial(gated_delta_rule_step_, q, k, v, g, beta, state, normalize_qk=True))
        for state in states
    ]
    size = 2 * 4 * batch * 16 * 128 * 256
    rule_ms = median_ms(steps)
    module: Any = build()
    module.init_kv_cache_manager(batch, 4096)
    x = torch.randn(batch, 1, D_MODEL, device="cuda", dtype=DTYPE)
    with torch.no_grad():
        module(x)
        layer_ms = median_ms([captured(partial(module, x))])
    return {
        "rule_ms": round(rule_ms, 4),
        "rule_tbs": round(size / rule_ms / 1e9, 3),
        "layer_ms": round(layer_ms, 4),
    }


_FIRST_CALL = """
import contextlib, sys, time
from unittest import mock
clock = [time.perf_counter()]
def lap():
    clock.append(time.perf_counter())
    print(clock[-1] - clock[-2], flush=True)
import torch
from benchmarks.gated_delta_net_gpu import D_MODEL, DTYPE, build
from olmo_core.nn.attention.gated_delta_net import layer as module
from olmo_core.nn.attention.kernels import launch, triton_driver
torch.zeros(1, device="cuda")
lap()
import triton
lap()
x = torch.randn(2, 1024, D_MODEL, device="cuda", dtype=DTYPE).requires_grad_()
torch.cuda.synchronize()
lap()
(x @ x.mT).sum().backward()
torch.cuda.synchronize()
lap()
assert triton_driver.triton_refusal(x) is None
lap()
class Everything:
    def __contains__(self, key):
        return True
layer, how = build(), contextlib.ExitStack()
if sys.argv[1] in ("launch", "op"):
    how.enter_context(mock.patch.object(module, "first_of_its_kind", lambda *_: False))
if sys.argv[1] == "launch":
    how.enter_context(mock.patch.object(launch, "_started", Everything()))
torch.cuda.synchronize()
lap()
with how:
    y = layer(x)
    torch.cuda.synchronize()
    lap()
    y.backward(torch.randn_like(y))
    torch.cuda.synchronize()
    lap()
    layer(x).sum().backward()
    torch.cuda.synchronize()
    lap()
"""
_BEFORE = "torch_s", "triton_s", "tensor_s", "matmul_s", "driver_s", "build_s"
_LAPS = *_BEFORE, "forward_s", "backward_s", "second_s"


def first_call() -> dict[str, dict[str, float]]:
    """Seconds that a first forward and backward take, with nothing compiled and no cache: where
    each launch compiles its kernel, each op all that it will launch, or the layer what all of its
    ops will; and the last with a full cache, which is what a first call takes besides.

    ``whole_s`` has Triton's import and the driver that it compiles for itself in it, as a first
    call has; imports of torch, the first tensor and the first matrix product not.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for how in ("launch", "op", "layer", "layer, cached"):
            mode, *cached = how.split(", ")
            cache = os.path.join(folder, mode)
            assert os.path.exists(cache) == bool(cached)
            out = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL, mode],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                check=True, stdout=subprocess.PIPE, text=True,
            ).stdout  # fmt: skip
            laps = dict(zip(_LAPS, map(float, out.split()), strict=True))
            parts = "triton_s", "driver_s", "forward_s", "backward_s"
            laps["whole_s"] = sum(laps[part] for part in parts)
            found[how] = {lap: round(seconds, 2) for lap, seconds in laps.items()}
    return found


def profile(top: int = 40) -> str:
    """Device time by kernel over one forward and backward."""
    module = build()
    x = torch.randn(BATCH, TOKENS, D_MODEL, device="cuda", dtype=DTYPE).requires_grad_()
    dout = torch.randn_like(x)
    module(x).backward(dout)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as prof:
        module(x).backward(dout)
        torch.cuda.synchronize()
    rows = [e for e in prof.key_averages() if e.device_type.name == "CUDA"]
    rows.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows) / 1e3
    lines = [f"kernels {total:.2f} ms in {sum(e.count for e in rows)} launches"]
    lines += [
        f"  {e.self_device_time_total / 1e3:8.3f} ms {e.count:6d} x {e.key[:70]}"
        for e in rows[:top]
    ]
    return "\n".join(lines)


def floor_ms(tflops: float, tbs: float) -> dict[str, float]:
    rows, keys, values, heads = BATCH * TOKENS, 2048, 4096, 16
    weights = D_MODEL * (2 * keys + 3 * values + 2 * heads)
    products = 3 * 2 * rows * weights / tflops / 1e9
    convolution = 5 * rows * (2 * keys + values) * 2 / tbs / 1e9
    norm = 8 * rows * values * 2 / tbs / 1e9
    parts = {"products_ms": products, "convolution_ms": convolution, "norm_ms": norm}
    return {name: round(value, 3) for name, value in parts.items()}


def main() -> None:
    require_cuda()
    report = Report("gated_delta_net_gpu")
    tflops = report.section("gemm_tflops", lambda: round(gemm_tflops(), 1))
    tbs = report.section("copy_tbs", lambda: round(copy_tbs(), 3))
    report.section("floor", partial(floor_ms, tflops, tbs))
    sections: dict[str, Callable[[], Any]] = {
        "layer": layer,
        "layer, documents": partial(layer, documents=True),
        "layer, compiled": partial(layer, compiled=True),
        "layer, 32 value heads of 128": partial(layer, n_v_heads=32, expand_v=1.0),
        "plain": before,
        "rule": partial(rule, BATCH, TOKENS, 16, 16, 128, 256),
        "rule, B8 T2048 128/128": partial(rule, 8, 2048, 16, 16, 128, 128),
        "rule, 16 and 32 heads of 128": partial(rule, BATCH, TOKENS, 16, 32, 128, 128),
        "decoding, batch 32": decoding,
        "first call": first_call,
        "profile": profile,
    }
    chosen = sys.argv[1:] or list(sections)
    for name in chosen:
        report.section(name, sections[name])
    report.finish()


if __name__ == "__main__":
    main()
