"""One decoding step of attention: a bandwidth benchmark.

Each of 32 rows has 8192 cached tokens of 4 kv heads x 128 in bf16, and one new query of 16 heads.
The step must read 512 MiB of keys and values and does next to no arithmetic, so the floor is those
bytes at the rate at which a copy moves bytes. Eager time includes launching from Python; a CUDA
graph's does not. Rivals of the same run: flash-attn 2's ``flash_attn_with_kvcache``, and SDPA with
a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._gpu import Report, captured, copy_tbs, median_ms, require_cuda
from olmo_core.nn.attention.decode import masked
from olmo_core.nn.attention.kernels.decode_triton import decode

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
CASES = ((32, 8192), (1, 8192), (8, 32768), (32, 1024))
DTYPE = torch.bfloat16

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def with_kvcache(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q, k, v, cache_seqlens=ends, causal=True)


STEPS: dict[str, Step] = {
    "decode": functools.partial(decode, scale=HEAD_DIM**-0.5),
    "flash-attn 2": with_kvcache,
    "masked SDPA": functools.partial(masked, scale=HEAD_DIM**-0.5),
}


def measure(step: Step, batch: int, tokens: int, tbs: float) -> dict[str, float]:
    shape = (batch, tokens, KV_HEADS, HEAD_DIM)
    copies = 2 if batch * tokens > 2**17 else 4
    starts = torch.zeros(batch, dtype=torch.int32, device="cuda")
    ends = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(copies):
        q = torch.randn(batch, 1, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
        k, v = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
        calls.append(functools.partial(step, q, k, v, starts, ends))
    floor = 2 * batch * tokens * KV_HEADS * HEAD_DIM * 2 / tbs / 1e9
    eager = median_ms(calls, samples=40)
    graphed = median_ms([captured(call) for call in calls], samples=40)
    return {
        "eager_ms": round(eager, 4),
        "graph_ms": round(graphed, 4),
        "floor_ms": round(floor, 4),
        "eager_share": round(floor / eager, 3),
        "graph_share": round(floor / graphed, 3),
    }


def main() -> None:
    require_cuda()
    report = Report("decode_gpu")
    tbs = report.section("copy_tbs", lambda: round(copy_tbs(), 3))
    for batch, tokens in CASES:
        for name, step in STEPS.items():
            report.section(
                f"batch {batch} x {tokens} {name}",
                functools.partial(measure, step, batch, tokens, tbs),
            )
    report.finish()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
