"""Attention and qk-norm + RoPE alone, forward + backward.

First each backend against the library that it wraps, called directly and measured alternately: the
price of the backend, which should be under 3% at 4096 tokens and more. And qk-norm + RoPE of the
layer (full-width RMS, batch 2 x 8192, 16/4 heads x 128) against eager mode and ``torch.compile``;
its floor is five passes over q and k.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._gpu import Report, captured, copy_tbs, median_ms, paired_ms, require_cuda
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.attention.kernels.rope_qk_norm import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rope_only,
)
from olmo_core.nn.attention.kernels.softmax import te

HEADS, KV_HEADS, HEAD_DIM, SPAN = 16, 4, 128, 1024
DTYPE = torch.bfloat16
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cumulative(total: int) -> Tensor:
    return torch.arange(0, total + 1, SPAN, dtype=torch.int32, device="cuda")


def direct_flash_2(batch: int, tokens: int, case: str) -> Attend:
    import flash_attn

    if case == "documents":
        cu = cumulative(batch * tokens)
        return lambda q, k, v: flash_attn.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), cu, cu, SPAN, SPAN, causal=True
        ).view(q.shape)
    window = (SPAN - 1, 0) if case == "window" else (-1, -1)
    return functools.partial(flash_attn.flash_attn_func, causal=True, window_size=window)


def direct_flash_4(batch: int, tokens: int, case: str) -> Attend:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    if case == "documents":
        cu = cumulative(batch * tokens)
        return lambda q, k, v: first(
            flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=cu, cu_seqlens_k=cu,
                max_seqlen_q=SPAN, max_seqlen_k=SPAN, causal=True,
            )
        ).view(q.shape)  # fmt: skip
    if case == "window":
        return lambda q, k, v: first(flash_attn_func(q, k, v, window_size=(SPAN - 1, 0)))
    return lambda q, k, v: first(flash_attn_func(q, k, v, causal=True))


def direct_te(batch: int, tokens: int, case: str) -> Attend:
    te.library()  # with the cuDNN that torch uses, where there are two
    from transformer_engine.pytorch import DotProductAttention

    window = (SPAN - 1, 0) if case == "window" else None
    layout = "thd" if case == "documents" else "bshd"
    mask = "padding_causal" if case == "documents" else "causal"
    module = DotProductAttention(
        HEADS, HEAD_DIM, num_gqa_groups=KV_HEADS, qkv_format=layout, attn_mask_type=mask,
        window_size=window,
    )  # fmt: skip
    if case == "documents":
        cu = cumulative(batch * tokens)
        return lambda q, k, v: module(
            *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=cu, cu_seqlens_kv=cu,
            max_seqlen_q=SPAN, max_seqlen_kv=SPAN,
        ).view(q.shape)  # fmt: skip
    return lambda q, k, v: module(q, k, v).view(q.shape)


def direct_torch(batch: int, tokens: int, case: str) -> Attend:
    if case != "full":
        raise NotImplementedError("torch has no public op for windows or documents with GQA")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def direct_flash_3(batch: int, tokens: int, case: str) -> Attend:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    if case == "documents":
        cu = cumulative(batch * tokens)
        return lambda q, k, v: flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), cu, cu, SPAN, SPAN, causal=True
        ).view(q.shape)
    window = (SPAN - 1, 0) if case == "window" else (-1, -1)
    return functools.partial(flash_attn_func, causal=True, window_size=window)


DIRECT: dict[str, Callable[[int, int, str], Attend]] = {
    "torch": direct_torch,
    "flash_2": direct_flash_2,
    "flash_3": direct_flash_3,
    "flash_4": direct_flash_4,
    "te": direct_te,
}


def ours(name: str, batch: int, tokens: int, case: str) -> Attend:
    backend = AttentionBackendName(name).build(
        head_dim=HEAD_DIM, n_heads=HEADS, n_kv_heads=KV_HEADS,
        window_size=(SPAN - 1, 0) if case == "window" else (-1, -1),
    )  # fmt: skip
    if case == "documents":
        cu = cumulative(batch * tokens)
        return lambda q, k, v: backend((q, k, v), cu_doc_lens=cu, max_doc_len=SPAN)
    return lambda q, k, v: backend((q, k, v))


def overhead(name: str, batch: int, tokens: int, case: str) -> dict[str, Any]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    sets = [
        [torch.randn(batch, tokens, h, HEAD_DIM, device="cuda", dtype=DTYPE) for h in heads]
        for _ in range(2)
    ]
    dout = torch.randn_like(sets[0][0])
    backward = name != "flash_3"  # the wheel at hand has forward alone

    def run(f: Attend, qkv: list[Tensor]) -> None:
        if not backward:
            with torch.no_grad():
                f(*qkv)
            return
        leaves = [x.detach().requires_grad_() for x in qkv]
        torch.autograd.grad(f(*leaves), leaves, dout)

    mine, theirs = ours(name, batch, tokens, case), DIRECT[name](batch, tokens, case)
    a, b = paired_ms(
        [functools.partial(run, mine, s) for s in sets],
        [functools.partial(run, theirs, s) for s in sets],
    )
    what = "fb" if backward else "fwd"
    times = {f"{what}_ms": round(a, 3), f"library_{what}_ms": round(b, 3), "ratio": round(a / b, 3)}
    if backward:
        times["graph_fb_ms"] = graphed_ms(mine, sets, dout)
    return times


def graphed_ms(f: Attend, sets: list[list[Tensor]], dout: Tensor) -> float:
    """Forward and backward in one CUDA graph: the kernels alone."""

    def both(leaves: list[Tensor]) -> None:
        torch.autograd.grad(f(*leaves), leaves, dout)

    leaves = [[x.detach().requires_grad_() for x in qkv] for qkv in sets]
    graphs = [captured(functools.partial(both, qkv)) for qkv in leaves]
    return round(median_ms(graphs), 3)


def alone(name: str, batch: int, tokens: int, case: str) -> dict[str, float]:
    """For cases that the library has no public call for."""
    f = ours(name, batch, tokens, case)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    qkv = [
        torch.randn(batch, tokens, h, HEAD_DIM, device="cuda", dtype=DTYPE).requires_grad_()
        for h in heads
    ]
    dout = torch.randn_like(qkv[0])
    eager = median_ms([lambda: torch.autograd.grad(f(*qkv), qkv, dout)])
    return {"fb_ms": round(eager, 3), "graph_fb_ms": graphed_ms(f, [qkv], dout)}


def qk_problem(per_head: bool, tokens: int = 8192) -> tuple[list[list[Tensor]], dict[str, Any]]:
    sets = []
    for _ in range(3):
        q, k = (torch.randn(2, tokens, h, HEAD_DIM, device="cuda", dtype=DTYPE) for h in (16, 4))
        weights = [torch.ones(HEAD_DIM * (1 if per_head else h), device="cuda") for h in (16, 4)]
        sets.append([q, k, *weights])
    angle = torch.randn(tokens, HEAD_DIM // 2, device="cuda")
    angle = torch.cat([angle, angle], -1)
    return sets, {"eps": 1e-5, "per_head": per_head, "sin": angle.sin(), "cos": angle.cos()}


def qk_ms(f: Callable[..., Any], per_head: bool = False, weights: bool = True) -> dict[str, float]:
    sets, options = qk_problem(per_head)
    dout = [torch.randn_like(x) for x in sets[0][:2]]

    def forward(q: Tensor, k: Tensor, *w: Tensor) -> Any:
        named = dict(zip(("q_weight", "k_weight"), w, strict=True)) if weights else {}
        return f(q, k, **named, **options)

    def both(tensors: list[Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (tensors if weights else tensors[:2])]
        out = forward(*leaves, *(tensors[2:] if not weights else []))
        torch.autograd.grad(out, leaves, dout)

    fb = median_ms([functools.partial(both, s) for s in sets], warmup=8, samples=40)
    with torch.no_grad():
        fwd = median_ms([functools.partial(forward, *s) for s in sets], warmup=8, samples=40)
    return {"fb_ms": round(fb, 4), "fwd_ms": round(fwd, 4)}


def qk_graphed_ms() -> dict[str, float]:
    """The kernels without their launches from Python: forward and backward in one CUDA graph."""
    sets, options = qk_problem(False)
    dout = [torch.randn_like(x) for x in sets[0][:2]]
    graphs = []
    for tensors in sets:
        leaves = [x.detach().requires_grad_() for x in tensors]

        def both(leaves: list[Tensor] = leaves) -> None:
            q, k, q_weight, k_weight = leaves
            out = qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, **options)
            torch.autograd.grad(out, leaves, dout)

        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            both()
        graphs.append(graph.replay)
    return {"fb_ms": round(median_ms(graphs, warmup=8, samples=40), 4)}


def rope_ms() -> dict[str, float]:
    return qk_ms(lambda q, k, *, sin, cos, **_: rope_only(q, k, sin, cos), weights=False)


def measure_qk(report: Report) -> None:
    tbs = report.section("copy_tbs", lambda: round(copy_tbs(), 3))
    q_and_k = 2 * 8192 * (HEADS + KV_HEADS) * HEAD_DIM * 2
    report.section("qk floor", lambda: {"fb_ms": round(5 * q_and_k / tbs / 1e9, 4)})
    report.section("qk kernel", lambda: qk_ms(qk_norm_rope))
    report.section("qk kernel, CUDA graph", qk_graphed_ms)
    report.section("qk kernel, per head", lambda: qk_ms(qk_norm_rope, per_head=True))
    report.section("qk RoPE alone", rope_ms)
    report.section("qk eager", lambda: qk_ms(qk_norm_rope_reference))
    report.section("qk torch.compile", lambda: qk_ms(torch.compile(qk_norm_rope_reference)))


def main() -> None:
    require_cuda()
    names = sys.argv[1:] or ["qk", *DIRECT]
    report = Report("kernels_gpu")
    if "qk" in names:
        measure_qk(report)
    for name in DIRECT:
        for case in ("full", "window", "documents") if name in names else ():
            for batch, tokens in ((4, 4096), (2, 8192)):
                run = alone if name == "torch" and case != "full" else overhead
                report.section(
                    f"{name} {case} {batch} x {tokens}",
                    functools.partial(run, name, batch, tokens, case),
                )
    report.finish()


if __name__ == "__main__":
    main()
