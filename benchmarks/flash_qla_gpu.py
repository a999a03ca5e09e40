"""FlashQLA's row of the gated delta rule's table beside the Triton kernels, in one run.

    python -m benchmarks.flash_qla_gpu compile   # what times and GPU tests need, side by side
    python -m benchmarks.flash_qla_gpu times     # lines for `flash_qla_times.MEASURED`

Without an argument both. It has a script of its own since its packages exclude flash-attn 4's. Its
kernels are compiled for the heads, for documents, and for an incoming state, not for lengths. Those
compiled are 16 key heads with 32 value heads of 128 (dense, with a state, with documents, with
both) and with 16 (dense).
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._gpu import Report, paired_ms, peak_mib, require_cuda
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla import flash_qla_gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla_times import Measured

LIMIT_S = 140.0


class Shape(NamedTuple):
    batch: int
    tokens: int
    key_heads: int
    value_heads: int
    value_dim: int


SHAPES = (Shape(2, 8192, 16, 16, 256), Shape(8, 2048, 16, 16, 128), Shape(2, 8192, 16, 32, 128))


def inputs(shape: Shape) -> list[Tensor]:
    """q, k, v, g, beta as a layer makes them."""

    def randn(*dims: int) -> Tensor:
        return torch.randn(shape.batch, shape.tokens, *dims, device="cuda")

    q, k = (randn(shape.key_heads, 128).bfloat16() for _ in range(2))
    v = randn(shape.value_heads, shape.value_dim).bfloat16()
    g, beta = -0.2 * randn(shape.value_heads).abs(), 2 * randn(shape.value_heads).sigmoid()
    return [q, k, v, g, beta]


def calls(rule: Callable[..., Any], sets: list[list[Tensor]], gradients: bool) -> list[Any]:
    def forward(args: list[Tensor]) -> None:
        with torch.no_grad():
            rule(*args, normalize_qk=True)

    def both(args: list[Tensor], dout: Tensor) -> None:
        leaves = [x.detach().requires_grad_() for x in args]
        torch.autograd.grad(rule(*leaves, normalize_qk=True)[0], leaves, dout)

    if gradients:
        douts = [torch.randn_like(args[2]) for args in sets]
        return [lambda a=a, d=d: both(a, d) for a, d in zip(sets, douts)]
    return [lambda a=a: forward(a) for a in sets]


def measure(shape: Shape, gradients: bool) -> dict[str, Any]:
    sets = [inputs(shape) for _ in range(2)]
    theirs, ours = (
        calls(rule, sets, gradients) for rule in (flash_qla_gated_delta_rule, gated_delta_rule)
    )
    start = time.perf_counter()
    theirs[0]()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    ms = [round(x, 3) for x in paired_ms(theirs, ours, ahead=True)]
    line = Measured(*shape, gradients, *ms)
    print(f"    Measured{tuple(line)},", flush=True)
    peaks = [round(peak_mib(x[0])) for x in (theirs, ours)]
    return {
        "flash_qla_ms": ms[0],
        "triton_ms": ms[1],
        "flash_qla_mib": peaks[0],
        "triton_mib": peaks[1],
        "first_call_s": round(first, 1),
    }


class Part(NamedTuple):
    """What one process compiles: a stage of a kind of call, few tokens long."""

    stage: str
    value_heads: int = 32
    documents: bool = False
    state: bool = False


KINDS = [(32, False, False), (16, False, False), (32, True, False), (32, False, True)]
KINDS += [(32, True, True)]
PARTS = [Part(stage, *kind) for stage in ("forward", "states") for kind in KINDS]
PARTS += [Part("gradients", *kind) for kind in KINDS[:3]] + [Part("triton")]


def compile_part(part: Part) -> None:
    if part.stage == "triton":
        for shape in SHAPES:
            for gradients in (False, True):
                calls(gated_delta_rule, [inputs(shape._replace(tokens=150))], gradients)[0]()
        torch.cuda.synchronize()
        return
    # The batch decides how wide the tiles of forward are: that of the times and of the tests.
    batch = 2 if part.value_heads == 32 else 8
    q, k, v, g, beta = inputs(Shape(batch, 90, 16, part.value_heads, 128))
    rows, ends = batch, None
    if part.documents:
        ends = torch.tensor([0, 1, 67, 68, 133, 180], dtype=torch.int32, device="cuda")
        rows = 1
    state = v.new_zeros(rows, part.value_heads, 128, 128).float() if part.state else None
    if part.stage == "forward":
        with torch.no_grad():
            flash_qla_gated_delta_rule(
                q, k, v, g, beta, initial_state=state, cu_doc_lens=ends, normalize_qk=True
            )
        torch.cuda.synchronize()
        return
    kernels: Any = importlib.import_module("flash_qla.ops.gated_delta_rule.chunk")
    if ends is not None:
        q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta))
        ends, rows = ends.long(), ends.shape[0] - 1
        if state is not None:
            state = state.expand(rows, -1, -1, -1).contiguous()
    factors = v.new_zeros(*v.shape[:3], 64)
    common = {"k": k, "v": v, "a": factors, "g": g, "b": beta, "cu_seqlens": ends}
    if part.stage == "states":
        kernels.fused_gdr_h(initial_state=state, output_final_state=False, output_h=True, **common)
    else:
        chunks = 2 if ends is None else 7
        states = v.new_zeros(v.shape[0], chunks, part.value_heads, 128, 128)
        dfinal = v.new_zeros(rows, part.value_heads, 128, 128).float()
        dq, _, _, dg, *_ = kernels.fused_gdr_bwd(
            q=q, do=torch.zeros_like(v), dht=dfinal, h=states, scale=128**-0.5, **common
        )
        if part.value_heads > 16:
            kernels.group_reduce_vector(dq, 16)
        kernels.chunk_local_cumsum(
            dg, chunk_size=64, reverse=True, cu_seqlens=ends, zero_last_chunk=True
        )
        kernels.l2norm_bwd(q, g.new_ones(q.shape[:3]), torch.zeros_like(q))
    torch.cuda.synchronize()


def compile_all() -> dict[str, Any]:
    """Seconds until each part was there, all started at once; caches on disk keep the kernels."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.flash_qla_gpu", "part"]
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # not as many pools as processes
    seconds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:  # a pipe would fill, and stop who writes to it
        logs = [Path(folder, str(i)) for i in range(len(PARTS))]
        processes = []
        for i, path in enumerate(logs):
            with path.open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [*command, str(i)], env=env, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        for part, process, path in zip(PARTS, processes, logs):
            try:
                process.wait(max(1.0, LIMIT_S - (time.perf_counter() - start)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            name = f"{part.stage}, {part.value_heads} value heads"
            name += ", documents" * part.documents + ", state" * part.state
            said = path.read_text(errors="replace")
            took = re.search(r"^compiled in ([\d.]+) s$", said, re.MULTILINE)
            lines = said.strip().splitlines() or ["nothing said"]
            seconds[name] = float(took[1]) if took else f"failed: {lines[-1][:150]}"
            print(f"{name:48s} {seconds[name]}", flush=True)
            if took is None:
                print("\n".join(line[:200] for line in lines[-12:]), flush=True)
    return {"all": round(time.perf_counter() - start, 1), **seconds}


def main(what: str) -> None:
    require_cuda()
    report = Report("flash_qla_gpu")
    if what in ("", "compile"):
        report.section("compile, seconds", compile_all)
    if what in ("", "times"):
        for shape in SHAPES:
            for gradients in (False, True):
                ways = "forward and backward" if gradients else "forward"
                name = f"{'x'.join(map(str, shape))}, {ways}"
                report.section(name, partial(measure, shape, gradients))
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        begun = time.perf_counter()
        compile_part(PARTS[int(sys.argv[2])])
        print(f"\ncompiled in {time.perf_counter() - begun:.1f} s", flush=True)
    else:
        main(sys.argv[1] if sys.argv[1:] else "")
