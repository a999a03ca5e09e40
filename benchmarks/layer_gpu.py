"""One attention layer, forward + backward: what a training step pays per layer.

d_model 2048, 16/4 heads x 128, RoPE, full-width RMS qk-norm, no bias, bf16, batch 2 x 8192 tokens.
Cases: full causal, a window of 1024, documents of 1024. Rivals of the same run: the usual layer in
plain PyTorch, with qk-norm and RoPE in eager mode around SDPA (a dense mask where there is a window
or documents) and around flash-attn 2.

Eager times include launching from Python, some 3 ms where the host is slow; ``graph_fb_ms`` is the
same forward + backward replayed as one CUDA graph.

The floor is what the arithmetic takes at the rate of a large matrix product, plus the bytes of
qk-norm + RoPE at the rate of a copy. Nobody reaches it: attention runs at 60-70% of that rate.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._gpu import (
    Report,
    captured,
    copy_tbs,
    gemm_tflops,
    median_ms,
    paired_ms,
    peak_mib,
    require_cuda,
)
from olmo_core.config import DType
from olmo_core.nn.attention import (
    AttentionBackendName,
    AttentionConfig,
    GateConfig,
    GateGranularity,
)
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import RoPEConfig

BATCH, TOKENS, D_MODEL, HEADS, KV_HEADS, HEAD_DIM, SPAN = 2, 8192, 2048, 16, 4, 128, 1024
CASES = ("full", "window", "documents")
DTYPE = torch.bfloat16


class EagerLayer(nn.Module):
    """The layer as it is usually written, around an attention function."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False, device="cuda", dtype=DTYPE)
        self.w_q, self.w_out = linear(D_MODEL, D_MODEL), linear(D_MODEL, D_MODEL)
        self.w_k, self.w_v = (linear(D_MODEL, KV_HEADS * HEAD_DIM) for _ in range(2))
        self.q_scale = nn.Parameter(torch.ones(D_MODEL, device="cuda"))
        self.k_scale = nn.Parameter(torch.ones(KV_HEADS * HEAD_DIM, device="cuda"))
        self.attention = attention
        half = torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM
        angle = torch.outer(torch.arange(TOKENS, device="cuda").float(), 500_000.0**-half)
        angle = torch.cat([angle, angle], -1)[:, None]
        self.sin, self.cos = angle.sin(), angle.cos()

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (weight * y).to(x.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        y = x.float()
        first, second = y.chunk(2, -1)
        return (y * self.cos + torch.cat([-second, first], -1) * self.sin).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.norm(self.w_q(x), self.q_scale), self.norm(self.w_k(x), self.k_scale)
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in (q, k, self.w_v(x)))
        return self.w_out(self.attention(self.rotate(q), self.rotate(k), v).flatten(2))


def sdpa(case: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    mask = None
    if case != "full":
        i = torch.arange(TOKENS, device="cuda")
        mask = i[:, None] >= i
        mask &= i[:, None] - i < SPAN if case == "window" else i[:, None] // SPAN == i // SPAN

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2)

    return attention


def flash_2(case: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if case == "documents":
        cu = documents()

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = flash_attn_varlen_func(q, k, v, cu, cu, SPAN, SPAN, causal=True)
            return out.unflatten(0, (BATCH, TOKENS))

        return packed
    window = (SPAN - 1, 0) if case == "window" else (-1, -1)
    return functools.partial(flash_attn_func, causal=True, window_size=window)


def documents() -> Tensor:
    return torch.arange(0, BATCH * TOKENS + 1, SPAN, dtype=torch.int32, device="cuda")


def ours(backend: str, case: str) -> Callable[[Tensor], Tensor]:
    config = AttentionConfig(
        n_heads=HEADS, n_kv_heads=KV_HEADS, bias=False, rope=RoPEConfig(), dtype=DType.bfloat16,
        qk_norm=LayerNormConfig(name=LayerNormType.rms, bias=False),
        backend=None if backend == "auto" else AttentionBackendName(backend),
    )  # fmt: skip
    if case == "window":
        from olmo_core.nn.attention import SlidingWindowAttentionConfig

        config.sliding_window = SlidingWindowAttentionConfig([SPAN], False, False)
    layer = config.build(D_MODEL, layer_idx=0, n_layers=1, init_device="cuda")
    if case == "documents":
        return functools.partial(layer, cu_doc_lens=documents(), max_doc_len=SPAN)
    return layer


def step(layer: Callable[[Tensor], Tensor]) -> dict[str, float]:
    module = layer.func if isinstance(layer, functools.partial) else layer
    assert isinstance(module, nn.Module)
    inputs = [
        torch.randn(BATCH, TOKENS, D_MODEL, device="cuda", dtype=DTYPE).requires_grad_()
        for _ in range(2)
    ]
    dout = torch.randn_like(inputs[0])

    def run(x: Tensor) -> None:
        for leaf in (x, *module.parameters()):
            leaf.grad = None
        layer(x).backward(dout)

    calls = [functools.partial(run, x) for x in inputs]
    times = {"fb_ms": round(median_ms(calls), 3)}
    with torch.no_grad():
        times["fwd_ms"] = round(median_ms([functools.partial(layer, x) for x in inputs]), 3)
    times["peak_mib"] = round(peak_mib(calls[0]))
    try:
        times["graph_fb_ms"] = round(median_ms([captured(call) for call in calls]), 3)
    except RuntimeError as e:
        print(f"no CUDA graph: {str(e).splitlines()[0][:150]}", flush=True)
    return times


def gate() -> dict[str, float]:
    """What attention's gate adds to a layer's forward + backward, in ms: both of one run."""

    def build(gate: GateConfig | None) -> nn.Module:
        config = AttentionConfig(
            n_heads=HEADS, n_kv_heads=KV_HEADS, bias=False, rope=RoPEConfig(), dtype=DType.bfloat16,
            qk_norm=LayerNormConfig(name=LayerNormType.rms, bias=False), gate=gate,
        )  # fmt: skip
        return config.build(D_MODEL, layer_idx=0, n_layers=1, init_device="cuda")

    inputs = [
        torch.randn(BATCH, TOKENS, D_MODEL, device="cuda", dtype=DTYPE).requires_grad_()
        for _ in range(2)
    ]
    dout = torch.randn_like(inputs[0])

    def run(module: nn.Module, x: Tensor) -> None:
        for leaf in (x, *module.parameters()):
            leaf.grad = None
        module(x).backward(dout)

    plain, added = build(None), {}
    for granularity in GateGranularity:
        for full in (False, True):
            gated = build(GateConfig(granularity=granularity, full_precision=full))
            without, with_gate = paired_ms(
                [partial(run, plain, x) for x in inputs], [partial(run, gated, x) for x in inputs]
            )
            name = f"{granularity}{'_float32' if full else ''}_ms"
            added[name] = round(with_gate - without, 3)
    return added


def floor_ms(case: str, tflops: float, tbs: float) -> float:
    """Forward + backward: 3 x the projections, 3.5 x attention's forward (it recomputes scores)."""
    rows = BATCH * TOKENS
    projections = 2 * rows * D_MODEL * (2 * D_MODEL + 2 * KV_HEADS * HEAD_DIM)
    pairs = {
        "full": BATCH * TOKENS**2 / 2,
        "window": BATCH * (TOKENS * SPAN - SPAN**2 / 2),
        "documents": rows * SPAN / 2,
    }[case]
    flops = 3 * projections + 3.5 * 4 * pairs * HEADS * HEAD_DIM
    qk_bytes = 5 * rows * (HEADS + KV_HEADS) * HEAD_DIM * 2
    return flops / tflops / 1e9 + qk_bytes / tbs / 1e9


def _eager(attention: Callable[[str], Any], case: str) -> Any:
    return step(EagerLayer(attention(case)))


def _ours(backend: str, case: str) -> Any:
    return step(ours(backend, case))


def main() -> None:
    require_cuda()
    backends = sys.argv[1:] or ["auto", "torch", "flash_2", "flash_3", "flash_4", "te"]
    report = Report("layer_gpu")
    tflops = report.section("gemm_tflops", lambda: round(gemm_tflops(), 1))
    tbs = report.section("copy_tbs", lambda: round(copy_tbs(), 3))
    report.section("gate", gate)
    for case in CASES:
        floor = floor_ms(case, tflops, tbs)
        report.section(f"{case} floor_ms", partial(round, floor, 3))
        rivals: dict[str, Callable[[], Any]] = {
            "eager + SDPA": partial(_eager, sdpa, case),
            "eager + flash-attn 2": partial(_eager, flash_2, case),
        }
        for name in backends:
            rivals[name] = partial(_ours, name, case)
        for name, run in rivals.items():
            value = report.section(f"{case} {name}", run)
            if "fb_ms" in value:
                value["share_of_floor"] = round(floor / value["fb_ms"], 3)
    report.finish()


if __name__ == "__main__":
    main()
