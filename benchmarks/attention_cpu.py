"""Attention on one CPU thread: windows and documents against what one would write without them.

Eight heads of 64, float32, forward and backward. A dense mask pays for every pair of tokens, so a
window of 256 keys out of 8192 leaves 16 times less to do; what is lost of that goes into blocks and
calls. Full causal attention is torch's own flash kernel, so there the target is to lose nothing.
Rivals run alternately, and the time is the thread's CPU time, which other processes disturb least;
each number is the median of the samples, each ratio the median of the pairs; growth compares the
least times. Saved bytes are those of the distinct tensors that autograd keeps for backward.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.nn.attention import Attention, AttentionBackendName
from olmo_core.nn.rope import RoPEConfig

HEADS, HEAD_DIM, WINDOW = 8, 64, 256
D_MODEL = HEADS * HEAD_DIM
RESULTS = Path(__file__).parent / "results" / "attention_cpu.json"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cpu_ms(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def rivals(ours: Callable[[], Any], other: Callable[[], Any], samples: int) -> dict[str, float]:
    """Median times of both in ms, and how many times faster ours is."""
    ours(), other()
    pairs = [(cpu_ms(ours), cpu_ms(other)) for _ in range(samples)]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ours_ms": a, "other_ms": b, "ratio": statistics.median(y / x for x, y in pairs)}


def attention(window: int | None = None, cu_doc_lens: Tensor | None = None) -> Attend:
    """The torch backend, (1, T, H, D) to the same."""
    backend = AttentionBackendName.torch.build(
        head_dim=HEAD_DIM,
        n_heads=HEADS,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return lambda q, k, v: backend((q, k, v), cu_doc_lens=cu_doc_lens)


def sdpa(mask: Tensor | None) -> Attend:
    """torch's SDPA with a dense mask, or causal without one."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return out.transpose(1, 2)

    return attend


def sliced_loop(lengths: list[int]) -> Attend:
    """A causal SDPA call for each slice: autograd makes a full-size gradient of every slice."""
    bounds = list(pairwise(ends(lengths).tolist()))

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        outs = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True)
            for a, b in bounds
        ]
        return torch.cat(outs, dim=2).transpose(1, 2)

    return attend


def split_loop(lengths: list[int]) -> Attend:
    """The same over ``split``, whose gradient is one ``cat``: the best loop there is."""

    def attend(*qkv: Tensor) -> Tensor:
        documents = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in qkv), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in documents]
        return torch.cat(outs, dim=2).transpose(1, 2)

    return attend


def window_mask(n: int) -> Tensor:
    back = torch.arange(n)[:, None] - torch.arange(n)
    return (back >= 0) & (back < WINDOW)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tiny_documents(n: int, count: int = 300) -> list[int]:
    """``count`` lengths, 1 to about twice the mean, that fill ``n`` tokens."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(n - 1, generator=generator)[: count - 1].sort().values + 1
    bounds = [0, *cuts.tolist(), n]
    return [b - a for a, b in pairwise(bounds)]


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dout = (torch.randn(1, n, HEADS, HEAD_DIM) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def both(attend: Attend, n: int) -> Callable[[], Any]:
    """Forward and backward on the same inputs for every rival of a length."""
    torch.manual_seed(n)
    q, k, v, dout = inputs(n)
    return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout)


def saved_bytes(forward: Callable[[], Any]) -> int:
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return sum(kept.values())


class DenseMaskLayer(nn.Module):
    """The layer that one would write: the same projections, RoPE and SDPA with a dense mask."""

    def __init__(self, layer: Attention, mask: Tensor):
        super().__init__()
        self.layer, self.attend = layer, sdpa(mask)

    def forward(self, x: Tensor) -> Tensor:
        a = self.layer
        q, k, v = (w(x).unflatten(-1, (HEADS, HEAD_DIM)) for w in (a.w_q, a.w_k, a.w_v))
        assert a.rope is not None
        q, k = a.rope(q, k, head_first=False)
        out: Tensor = a.w_out(self.attend(q, k, v).flatten(2))
        return out


def layer_both(layer: nn.Module, n: int) -> Callable[[], Any]:
    torch.manual_seed(n)
    x, dout = torch.randn(1, n, D_MODEL, requires_grad=True), torch.randn(1, n, D_MODEL)
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dout)


def window_layer() -> Attention:
    torch.manual_seed(0)
    return Attention(
        d_model=D_MODEL, n_heads=HEADS, bias=False, rope=RoPEConfig(), window_size=WINDOW
    )


def decoding(prompt: int, steps: int) -> dict[str, float]:
    """Per token after a prompt: a cached step against the whole sequence again."""
    torch.manual_seed(0)
    layer = Attention(d_model=D_MODEL, n_heads=HEADS, bias=False, rope=RoPEConfig()).eval()
    x = torch.randn(1, prompt + steps, D_MODEL)
    with torch.inference_mode():
        layer.init_kv_cache_manager(1, prompt + steps)
        layer(x[:, :prompt])
        cached = [cpu_ms(lambda t=t: layer(x[:, t : t + 1])) for t in range(prompt, prompt + steps)]  # type: ignore[misc]
        layer.kv_cache_manager = None
        whole = [cpu_ms(lambda t=t: layer(x[:, : t + 1])) for t in range(prompt, prompt + 8)]  # type: ignore[misc]
    a, b = statistics.median(cached), statistics.median(whole)
    return {"ours_ms": a, "other_ms": b, "ratio": b / a}


class Report:
    """Rows as they come; the whole as JSON."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def ratio(self, what: str, against: str, got: dict[str, float], target: float | None) -> None:
        verdict = self._judge(got["ratio"] >= target) if target else ""
        goal = f"target >= {target:g}x, {verdict}" if target else ""
        self.rows.append({"what": what, "against": against, **got, "target": target})
        times = f"{got['ours_ms']:8.1f} ms   {got['other_ms']:8.1f} ms"
        print(f"{what:36} {times}   {got['ratio']:6.2f}x  {goal}  ({against})", flush=True)

    def growth(self, what: str, got: list[float], limit: float) -> None:
        verdict = self._judge(max(got) <= limit)
        shown = ", ".join(f"{x:.2f}x" for x in got)
        self.rows.append({"what": what, "growth": got, "limit": limit})
        print(f"{what:36} {shown}   limit {limit:g}x, {verdict}", flush=True)

    @staticmethod
    def _judge(good: bool) -> str:
        return "met" if good else "MISSED"


def doublings(values: list[float]) -> list[float]:
    return [b / a for a, b in pairwise(values)]


def main() -> None:
    torch.set_num_threads(1)
    report = Report()
    long = 8192

    print(f"{'forward and backward':36} {'ours':>11}   {'other':>11}    ratio")
    for n, target, samples in ((4096, 6.0, 5), (long, 12.0, 3)):
        got = rivals(both(attention(WINDOW), n), both(sdpa(window_mask(n)), n), samples)
        report.ratio(f"window {WINDOW}, T {n}", "dense-mask SDPA", got, target)
    for n, samples in ((2048, 9), (4096, 7)):
        got = rivals(both(attention(), n), both(sdpa(None), n), samples)
        report.ratio(f"full causal, T {n}", "plain SDPA", got, 0.95)

    equal = [long // 16] * 16
    got = rivals(both(attention(None, ends(equal)), long), both(attention(), long), 3)
    report.ratio(f"16 equal documents, T {long}", "one long document", got, None)
    tiny = tiny_documents(long)
    for name, loop, samples in (("slices", sliced_loop, 3), ("split", split_loop, 9)):
        got = rivals(both(attention(None, ends(tiny)), long), both(loop(tiny), long), samples)
        report.ratio(f"300 tiny documents, T {long}", f"SDPA over {name}, and cat", got, None)

    layer = window_layer()
    for n, target, samples in ((4096, 3.0, 3), (long, 6.0, 3)):
        dense = DenseMaskLayer(layer, window_mask(n))
        got = rivals(layer_both(layer, n), layer_both(dense, n), samples)
        report.ratio(f"layer d {D_MODEL}, window {WINDOW}, T {n}", "dense-mask layer", got, target)
    report.ratio("decode, a token after 2048", "whole forward again", decoding(2048, 64), None)

    lengths = (2048, 4096, long)
    cases: dict[str, Callable[[int], Attend]] = {
        f"window {WINDOW}": lambda n: attention(WINDOW),
        "documents of 512": lambda n: attention(None, ends([512] * (n // 512))),
    }
    print(f"\ngrowth per doubling, T {lengths[0]} to {lengths[-1]}")
    for name, make in cases.items():
        calls = [both(make(n), n) for n in lengths]
        for call in calls:
            call()
        rounds = [[cpu_ms(call) for call in calls] for _ in range(9)]
        times = [min(column) for column in zip(*rounds, strict=True)]
        report.growth(f"{name}, time", doublings(times), 2.2)
        kept = []
        for n in lengths:
            attend, (q, k, v, _) = make(n), inputs(n)
            kept.append(float(saved_bytes(lambda a=attend, x=(q, k, v): a(*x))))  # type: ignore[misc]
        report.growth(f"{name}, saved bytes", doublings(kept), 2.2)
    calls = [layer_both(layer, n) for n in lengths]
    rounds = [[cpu_ms(call) for call in calls] for _ in range(5)]
    times = [min(column) for column in zip(*rounds, strict=True)]
    report.growth(f"layer, window {WINDOW}, time", doublings(times), 2.2)
    kept = [
        float(saved_bytes(lambda n=n: layer(torch.randn(1, n, D_MODEL, requires_grad=True))))  # type: ignore[misc]
        for n in lengths
    ]
    report.growth(f"layer, window {WINDOW}, saved bytes", doublings(kept), 2.2)

    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report.rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report.rows))


if __name__ == "__main__":
    main()
