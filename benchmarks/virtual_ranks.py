"""Context parallelism without its messages: how even the work of ranks is, and what sharding costs.

Every rank's part is run in turn on this machine, forward and backward, by the ops that the layers
use; what would come from other ranks is there already. *balance* is the slowest rank over the mean;
*tax* is the sum of all ranks over the time of one process with the whole sequence, so 1.00 is ideal
for both. Neither says anything about communication, which goes on while kernels compute.

One document; log-normal documents (median 1500 tokens a shard of 16K, sigma 1.2; shorter shards
have shorter ones), without a limit and with one of half a shard; and the first with a window of a
quarter of a shard. bf16, 16 query heads and 4 kv heads of 128 on a GPU; float32, 4 and 2 of 32 on a
CPU. The next lines are the time to plan a batch on the host, of 8 ranks with 2,000 documents.

*delta* is the gated delta rule of a rank inside a document, over the rule alone on as many tokens:
T 8192, 16 heads of 128/256 on a GPU; T 2048, 4 key and 8 value heads of 64/128 on a CPU. An inner
rank finds its map of the state before its outputs, and its initial state's gradient before the
others; *two calls* is that by calling the rule twice, as a form without passes for it does.

    python -m benchmarks.virtual_ranks [delta]

takes some minutes on a CPU, and seconds for delta alone.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from benchmarks.sharded.clock import answered_at_once
from benchmarks.sharded.problems import log_normal, padded
from olmo_core.distributed import collectives
from olmo_core.distributed.collectives import Pending
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.backend import AttentionBackendName
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule, op
from olmo_core.nn.attention.kernels.table import choose
from olmo_core.nn.attention.parallel import gather, ring, state_exchange, ulysses
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.layout import LAYOUTS
from olmo_core.nn.attention.parallel.op import Shard
from olmo_core.nn.attention.parallel.plan import gather_plan
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.attention.parallel.schedule import attend_sharded
from olmo_core.nn.attention.segments import Segments

T = TypeVar("T")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS, KV_HEADS, DIM = (16, 4, 128) if CUDA else (4, 2, 32)
ROWS = (8192, 32768) if CUDA else (256, 1024)
RANKS = (2, 4, 8)
KERNEL = "flash_2" if CUDA else "torch"
RUNS = 3 if CUDA else 1
STYLES = ("llama3", "zig_zag", "balanced")
DELTA = (8192, 16, 16, 128, 256) if CUDA else (2048, 4, 8, 64, 128)
DELTA_RUNS = 31 if CUDA else 11


def masks(total: int, rows: int) -> Iterator[tuple[str, list[int], int]]:
    yield "one document", [0, total], -1
    median = 1500 * rows / 16384
    yield "log-normal", log_normal(total, median), -1
    yield "log-normal, short", log_normal(total, median, rows / 2), -1
    yield "window", [0, total], rows // 4


@contextmanager
def virtual_rank(rank: int, n: int) -> Iterator[None]:
    """Ops run as on ``rank`` of ``n``; messages are answered at once, with anything."""

    def place_in(group: str) -> tuple[int, int]:
        return rank, n

    modules: list[Any] = [collectives, gather, ring, ulysses]
    with answered_at_once(), ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "place_in", place_in))
        yield


def elapsed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds and the result; on a CPU of its own time, whoever else computes."""
    if not CUDA:
        begun = time.process_time()
        result = call()
        return time.process_time() - begun, result
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3, result


def seconds(call: Callable[[], Any]) -> float:
    """The median."""

    def run() -> float:
        run_ahead()
        return elapsed(call)[0]

    run()
    return statistics.median(run() for _ in range(RUNS))


def draw(tokens: int) -> tuple[list[Tensor], Tensor]:
    qkv = [
        torch.randn(1, tokens, n, DIM, device=DEVICE, dtype=DTYPE).requires_grad_()
        for n in (HEADS, KV_HEADS, KV_HEADS)
    ]
    return qkv, torch.randn(1, tokens, HEADS, DIM, device=DEVICE, dtype=DTYPE)


def both_ways(function: Callable[..., Tensor], qkv: list[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(function(*qkv), qkv, dout)


def unsharded(cu: list[int], window: int) -> float:
    qkv, dout = draw(cu[-1])
    lengths = torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    longest = max(b - a for a, b in pairwise(cu))
    segments = Segments.documents(lengths, longest, window=window)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, segments, scale=DIM**-0.5, kernel=KERNEL)

    return seconds(lambda: both_ways(whole, qkv, dout))


def of_ranks(style: str, n: int, rows: int, cu: list[int], window: int, stride: int) -> list[float]:
    """The seconds of each rank."""
    kind = RingAttentionLoadBalancerType(style)
    qkv, dout = draw(rows)
    lengths = torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    times = []
    for rank in range(n):
        context = ContextParallel(kind, kind.layout.name, stride, n, rank, "ring", 1, 0, "", "")

        def sharded(q: Tensor, k: Tensor, v: Tensor, context: ContextParallel = context) -> Tensor:
            return attend_sharded(
                q, k, v, context, lengths, window=window, scale=DIM**-0.5, kernel=KERNEL
            )

        with virtual_rank(rank, n):
            times.append(seconds(lambda: both_ways(sharded, qkv, dout)))
    return times


def plan_milliseconds(layout: str, rows: int) -> float:
    n = 8
    total, rng, cu = n * rows, random.Random(0), [0]
    while cu[-1] < total:
        cu.append(min(total, cu[-1] + max(2 * n, int(rng.gauss(1, 0.3) * total / 2000) // 16 * 16)))
    times = []
    for _ in range(5):
        reading = Reading(cu, torch.device("cpu"))
        start = time.perf_counter()
        gather_plan(reading, layout, n, n // 2, -1, 1)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def two_calls() -> Any:
    """Inside, forms of the delta rule have no passes for spans."""
    without = [
        replace(row, run=replace(row.run, span_forward=None, span_backward=None))
        for row in op.FORMS
    ]
    return mock.patch.object(op, "FORMS", tuple(without))


def run_ahead() -> None:
    """Keep a GPU busy while the host launches what is timed, as it is in training."""
    if CUDA:
        torch.cuda._sleep(4_000_000)


def delta() -> dict[str, Any]:
    """Milliseconds of the rule alone, and of a shard over it."""
    tokens, heads, value_heads, key_dim, value_dim = DELTA

    def randn(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, device=DEVICE)

    halves = [randn(heads, key_dim), randn(heads, key_dim), randn(value_heads, value_dim)]
    gates = [-0.2 * randn(value_heads).abs(), randn(value_heads).sigmoid()]
    inputs = [x.requires_grad_() for x in (*(x.to(DTYPE) for x in halves), *gates)]
    dout = torch.randn_like(inputs[2])
    shard = Shard(None, "contiguous", False, -1, 1, key_dim**-0.5, "", "", "")

    def gathered(x: Tensor, group: str) -> Pending:
        return Pending(torch.stack((x, x, x)))

    def whole() -> Tensor:
        return gated_delta_rule(*inputs, normalize_qk=True)[0]

    def sharded() -> Tensor:
        q, k, v, g, beta = inputs
        return state_exchange.sharded_gated_delta_rule(q, k, v, g, beta, shard, normalize_qk=True)

    cases = (("whole", whole, nullcontext), ("shard", sharded, nullcontext),
             ("two calls", sharded, two_calls))  # fmt: skip
    times: dict[tuple[str, str], list[float]] = {}
    with (
        mock.patch.object(state_exchange, "all_gather", gathered),
        mock.patch.object(state_exchange, "place_in", lambda _: (1, 3)),
    ):
        for run in range(DELTA_RUNS + 1):
            for name, rule, within in cases:
                with within():
                    run_ahead()
                    forward, out = elapsed(rule)
                    run_ahead()
                    backward, _ = elapsed(partial(torch.autograd.grad, out, inputs, dout))
                if run:  # the first warms up
                    times.setdefault((name, "forward"), []).append(forward)
                    times.setdefault((name, "backward"), []).append(backward)
    found: dict[str, Any] = {"T": tokens, "form": choose(op.FORMS, inputs[0], inputs[2]).name}
    for way in ("forward", "backward"):
        alone = times["whole", way]
        found[f"{way}_ms"] = round(1e3 * statistics.median(alone), 3)
        for name in ("shard", "two calls"):
            ratios = [a / b for a, b in zip(times[name, way], alone, strict=True)]
            found[f"{way}, {name}"] = round(statistics.median(ratios), 2)
    print(f"delta: {found}")
    return found


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:] == ["delta"]:
        print(json.dumps(delta()))
        return
    if CUDA:
        AttentionBackendName(KERNEL).assert_supported()
    strides = {"1": 1, "2": 2, "all": KV_HEADS}
    found: list[dict[str, Any]] = []
    print(f"{KERNEL}, {HEADS} query and {KV_HEADS} kv heads of {DIM}, {DTYPE}; balance and tax")
    print(f"{'':34}" + "".join(f"{f'{style}/{name}':>18}" for style in STYLES for name in strides))
    sizes = sorted(product(RANKS, ROWS), key=lambda size: size[0] * size[1])
    for n, rows in sizes:  # the long ones last, where they cost minutes
        for name, ends, window in masks(n * rows, rows):
            cu = padded(ends, 2 * n, n * rows)
            alone = unsharded(cu, window)
            line = f"{n} ranks x {rows:5}, {name:17}"
            for style in STYLES:
                for stride_name, stride in strides.items():
                    if style == "zig_zag" and window < 0 and stride > 1:
                        line += f"{'(ring)':>18}"  # all heads, whatever the stride
                        continue
                    times = of_ranks(style, n, rows, cu, window, stride)
                    balance = max(times) * n / sum(times)
                    tax = sum(times) / alone
                    line += f"{f'{balance:.2f} {tax:.2f}':>18}"
                    found.append(
                        {"ranks": n, "rows": rows, "mask": name, "style": style,
                         "head_stride": stride_name, "balance": balance, "tax": tax}
                    )  # fmt: skip
            print(line, flush=True)
    for rows in (8192, 32768):
        each = {name: round(plan_milliseconds(name, rows), 1) for name in LAYOUTS}
        print(f"plan of 8 ranks x {rows}, 2000 documents, ms: {each}")
        found.append({"plan_ms": each, "rows": rows})
    found.append(delta())
    print(json.dumps(found[-3:]))


if __name__ == "__main__":
    main()
