"""One decoding step of attention: a bandwidth benchmark.

Each of 32 rows has 8191 cached tokens of 4 kv heads x 128 in bf16, and one new token of 16 query
heads, whose key and value the step stores. The step must read 512 MiB of keys and values and does
next to no arithmetic, so the floor is those bytes at the rate at which a copy moves bytes. Eager
time includes launching from Python; a CUDA graph's does not. "backend" is a whole call of a backend
with its cache, and "decode" the kernels. Rivals of the same run: flash-attn 2's
``flash_attn_with_kvcache``, and SDPA with a mask, over a cache that has the new token already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._gpu import Report, captured, copy_tbs, median_ms, require_cuda
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.kernels.decode.torch_masked import masked
from olmo_core.nn.attention.kernels.decode.triton_split_kv import split_kv

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
CASES = ((32, 8192), (1, 8192), (8, 32768), (32, 1024))
DTYPE, SCALE = torch.bfloat16, HEAD_DIM**-0.5

Step = Callable[[], Tensor]


def new_token(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(batch, 1, h, HEAD_DIM, device="cuda", dtype=DTYPE)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def caches(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    shape = (batch, tokens, KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
    return keys, values


def kernels(batch: int, tokens: int) -> Step:
    before = torch.tensor(tokens - 1, dtype=torch.int32, device="cuda")
    leftpad = torch.zeros(batch, dtype=torch.int32, device="cuda")
    step = functools.partial(split_kv, *new_token(batch), *caches(batch, tokens), before, leftpad)
    return functools.partial(step, scale=SCALE, store=True)


def backend(batch: int, tokens: int) -> Step:
    # The longer the cache, the more often the step can be timed; it reads what is stored alone.
    attention = AttentionBackendName.torch.build(
        head_dim=HEAD_DIM, n_heads=HEADS, n_kv_heads=KV_HEADS
    )
    cache = KVCacheManager(batch, tokens + 100, KV_HEADS, HEAD_DIM, "cuda", DTYPE)
    qkv = new_token(batch)
    cache.update_seqlen(tokens - 1)
    return lambda: attention(qkv, kv_cache_manager=cache)


def flash_2(batch: int, tokens: int) -> Step:
    from flash_attn import flash_attn_with_kvcache

    q, k, v = new_token(batch)
    before = torch.full((batch,), tokens - 1, dtype=torch.int32, device="cuda")
    step = functools.partial(flash_attn_with_kvcache, q, *caches(batch, tokens), k=k, v=v)
    return functools.partial(step, cache_seqlens=before, causal=True)


def sdpa(batch: int, tokens: int) -> Step:
    q, _, _ = new_token(batch)
    first = torch.zeros(batch, dtype=torch.int32, device="cuda")
    stop = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    return functools.partial(masked, q, *caches(batch, tokens), first, stop, scale=SCALE)


STEPS: dict[str, Callable[[int, int], Step]] = {
    "decode": kernels,
    "backend": backend,
    "flash-attn 2": flash_2,
    "masked SDPA": sdpa,
}


def measure(
    step: Callable[[int, int], Step], batch: int, tokens: int, tbs: float
) -> dict[str, float]:
    copies = 2 if batch * tokens > 2**17 else 4
    calls = [step(batch, tokens) for _ in range(copies)]
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
