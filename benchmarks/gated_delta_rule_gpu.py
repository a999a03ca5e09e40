"""The gated delta rule on a GPU: Triton kernels, plain torch, both compiled, and fla, in one run.

Batch 2, 8192 tokens, 16 heads of 128 keys and 256 values, bf16, the size of a 2B model's layer. A
fused kernel would read the inputs and write the output once: that is the floor. The kernels here
also write each chunk's states and updates, which the backward pass reads. The torch form writes
every matrix of a chunk between its products, so it is bound by bytes, and by the launches of its
loop over chunks, not by arithmetic. The profiles say where the time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks._gpu import Report, copy_tbs, gemm_tflops, median_ms, peak_mib, require_cuda

B, T, H, K, V = 2, 8192, 16, 128, 256


def inputs(tokens: int, heads: int, dtype: torch.dtype, batch: int = B) -> list[Tensor]:
    """q, k, v, g, beta as a layer makes them, all wanting gradients."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, heads, *shape, device="cuda")

    q, k, v = (randn(n).to(dtype) for n in (K, K, V))
    g, beta = -0.2 * randn().abs(), 2 * randn().sigmoid()
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def correctness() -> dict[str, float]:
    """Relative errors against the float64 recurrence, worst of output and gradients."""
    from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule
    from olmo_core.nn.attention.kernels.gated_delta_rule.reference import (
        gated_delta_rule_reference,
    )

    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        low = inputs(150, 2, dtype)
        cu = torch.tensor([0, 1, 70, 220, 300], dtype=torch.int32, device="cuda")
        high = [x.detach().double().requires_grad_() for x in low]
        outs = []
        for function, args in ((gated_delta_rule, low), (gated_delta_rule_reference, high)):
            out, _ = function(*args, normalize_qk=True, cu_doc_lens=cu)
            dout = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype)
            outs.append((out, *torch.autograd.grad(out, args, dout)))
        errors[str(dtype).removeprefix("torch.")] = float(
            f"{max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*outs)):.1e}"
        )
    return errors


def times(run: Callable[..., Tensor], backward: bool = True) -> dict[str, float]:
    sets = [inputs(T, H, torch.bfloat16) for _ in range(2)]
    dout = torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16)

    def forward(args: list[Tensor]) -> None:
        with torch.no_grad():
            run(*args)

    def both(args: list[Tensor]) -> None:
        torch.autograd.grad(run(*args), args, dout)

    calls = {"fwd": [lambda s=s: forward(s) for s in sets]}
    if backward:
        calls["fb"] = [lambda s=s: both(s) for s in sets]
    result = {f"{n}_ms": round(median_ms(c, warmup=3, samples=10), 3) for n, c in calls.items()}
    return {**result, "peak_mib": round(peak_mib(calls["fb" if backward else "fwd"][0]))}


def rule(*args: Tensor) -> Tensor:
    from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule

    return gated_delta_rule(*args, normalize_qk=True)[0]


@contextmanager
def torch_form() -> Iterator[None]:
    """Inside, the rule is computed in plain torch."""
    from olmo_core.nn.attention.kernels.gated_delta_rule import op as module

    with mock.patch.object(module, "FORMS", module.FORMS[-1:]):
        yield


def in_torch(measure: Callable[[], Any]) -> Any:
    with torch_form():
        return measure()


def fla_form() -> Callable[..., Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        return out[0] if isinstance(out, tuple) else out

    return run


def profile(top: int = 14) -> str:
    """Device time by kernel over one forward and backward."""
    args = inputs(T, H, torch.bfloat16)
    dout = torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    torch.autograd.grad(rule(*args), args, dout)
    with torch.profiler.profile(activities=activities) as prof:
        torch.autograd.grad(rule(*args), args, dout)
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


def main() -> None:
    require_cuda()
    report = Report("gated_delta_rule_gpu")
    report.section("error against float64", correctness)
    report.data["gemm_tflops"] = round(gemm_tflops(), 1)
    bandwidth = copy_tbs()
    report.data["copy_tbs"] = round(bandwidth, 3)
    per_token = 2 * (2 * K + 2 * V) + 2 * 4  # q, k, v, o in bf16; g and beta in float32
    floor = 1e3 * B * T * H * per_token / (bandwidth * 1e12)
    report.section("floor: bytes of a fused forward", lambda: {"ms": round(floor, 3)})
    compiled: Callable[..., Tensor] = torch.compile(rule, fullgraph=True)
    report.section("kernels", lambda: times(rule))
    report.section("fla, forward", lambda: times(fla_form(), backward=False))
    report.section("fla, forward and backward", lambda: times(fla_form()))
    report.section("kernels, compiled", lambda: times(compiled))
    report.section("profile of the kernels", profile)
    report.section("torch", partial(in_torch, lambda: times(rule)))
    report.section("profile of torch", partial(in_torch, profile))
    torch.compiler.reset()
    report.section("torch, compiled", partial(in_torch, lambda: times(compiled)))
    report.finish()


if __name__ == "__main__":
    main()
