"""The gated delta rule on one CPU thread: plain torch here against plain torch in transformers.

4 heads, key dim 64, value dim 128, float32, T from 512 to 8192: small matrices, so that passes over
memory and the launching of operations cost as much as the arithmetic. The floor is the time that
the GEMMs alone take in this run, measured on buffers of the same shapes. CPU times, medians of 7
runs that alternate between the rules and go through all lengths: a machine's slow minute then meets
each of them. transformers' backward is quadratic: slices in its loop get gradients of full size.

    python -m benchmarks.gated_delta_rule

needs transformers and takes two minutes. Results go to results/gated_delta_rule_cpu.json as well.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.chunks import ChunkGrid

LENGTHS = (512, 1024, 2048, 4096, 8192)
HEADS, KEY_DIM, VALUE_DIM, RUNS = 4, 64, 128, 7
Times = dict[tuple[int, str, str], list[float]]
RESULTS = Path(__file__).parent / "results" / "gated_delta_rule_cpu.json"


def inputs(tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (1, tokens, HEADS)
    q, k = torch.randn(*shape, KEY_DIM), torch.randn(*shape, KEY_DIM)
    leaves = [q, k, torch.randn(*shape, VALUE_DIM), -torch.rand(shape), torch.rand(shape)]
    return [x.requires_grad_() for x in leaves]


def rivals() -> dict[str, Callable[..., Tensor]]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return {
        "here": lambda *x: gated_delta_rule(*x, normalize_qk=True)[0],
        "transformers": lambda *x: torch_chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)[
            0
        ],
    }


def gemm_floor(tokens: int) -> tuple[float, float]:
    """Milliseconds that the GEMMs of forward, and of forward and backward, take by themselves."""
    q = torch.empty(1, tokens, HEADS, KEY_DIM)
    grid = ChunkGrid.of(q, torch.empty(1, tokens, HEADS, VALUE_DIM))
    C, K, V, n = grid.chunk, KEY_DIM, VALUE_DIM, grid.block
    blocks = grid.chunks / n
    # (rows, inner, columns), chunks per call: scores, W, T V, W S, state, P U, Q S, ...
    forward = [(2 * C, K, C, n), (C, C, K, n), (C, C, V, n), (C, K, V, 1), (K, C, V, 1)]
    forward += [(C, C, V, n), (C, K, V, n)]
    # ... and in backward scores, W, P^T dO, Q^T dO, K dS, W^T dU, T^T dU, the rest two by two.
    backward = [(2 * C, K, C, n), (C, C, K, n), (C, C, V, n), (K, C, V, n), (C, K, V, 1)]
    backward += [(K, C, V, 1), (C, C, V, n), (2 * C, V, C, n), (2 * C, V, K, n), (C, V, K, n)]
    backward += [(2 * C, C, K, n), (C, 2 * C, K, n)]
    times = []
    for shapes in (forward, backward):
        total = 0.0
        for rows, inner, columns, chunks in shapes:
            a = torch.randn(chunks * HEADS, rows, inner)
            b = torch.randn(chunks * HEADS, inner, columns)
            out = torch.empty(chunks * HEADS, rows, columns)
            calls = n // chunks
            total += blocks * min(_seconds(_repeat(a, b, out, calls)) for _ in range(RUNS))
        times.append(1e3 * total)
    return times[0], times[0] + times[1]


def _repeat(a: Tensor, b: Tensor, out: Tensor, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            torch.bmm(a, b, out=out)

    return run


def _seconds(call: Callable[[], Any]) -> float:
    """The CPU time of a call: on a shared machine waiting for the core is not its work."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure() -> Times:
    """Milliseconds of each run, for each length, each of forward and both, and each rule."""
    rules = rivals()
    times: Times = {}
    for what in ("forward", "both"):
        for run in range(RUNS + 1):
            for tokens, (name, rule) in itertools.product(LENGTHS, rules.items()):
                x = inputs(tokens)
                cotangent = torch.randn(1, tokens, HEADS, VALUE_DIM)

                def call(
                    rule: Callable[..., Tensor] = rule,
                    x: list[Tensor] = x,
                    cotangent: Tensor = cotangent,
                    what: str = what,
                ) -> None:
                    with torch.set_grad_enabled(what == "both"):
                        out = rule(*x)
                    if what == "both":
                        torch.autograd.grad(out, x, cotangent)

                seconds = _seconds(call)
                if run:  # the first warms up
                    times.setdefault((tokens, what, name), []).append(1e3 * seconds)
    return times


def summary(tokens: int, times: Times) -> dict[str, float]:
    row: dict[str, float] = {"T": tokens}
    for what, floor in zip(("forward", "both"), gemm_floor(tokens), strict=True):
        here, theirs = (
            statistics.median(times[tokens, what, name]) for name in ("here", "transformers")
        )
        row[f"{what}_ms"], row[f"{what}_transformers_ms"] = round(here, 2), round(theirs, 2)
        row[f"{what}_factor"] = round(theirs / here, 2)
        row[f"{what}_floor_share"] = round(floor / here, 2)
    return row


def growth(what: str, times: Times) -> list[float]:
    """Our time over that at half the length: medians of the runs' ratios."""
    runs = [times[tokens, what, "here"] for tokens in LENGTHS]
    return [
        round(statistics.median(b / a for a, b in zip(half, whole, strict=True)), 2)
        for half, whole in itertools.pairwise(runs)
    ]


def main() -> None:
    torch.set_num_threads(1)
    times = measure()
    rows = []
    print(f"{'T':>6} {'forward':>9} {'peer':>9} {'x':>6} {'floor':>6}", end="")
    print(f" {'f+b':>9} {'peer':>9} {'x':>6} {'floor':>6}   (ms; floor: share that is GEMM)")
    for tokens in LENGTHS:
        row = summary(tokens, times)
        rows.append(row)
        print(f"{tokens:6}", end="")
        for what in ("forward", "both"):
            print(
                f" {row[f'{what}_ms']:9.1f} {row[f'{what}_transformers_ms']:9.1f}"
                f" {row[f'{what}_factor']:6.2f} {row[f'{what}_floor_share']:6.0%}",
                end="",
            )
        print(flush=True)
    growths = {what: growth(what, times) for what in ("forward", "both")}
    print(f"growth per doubling: forward {growths['forward']}, f+b {growths['both']}")
    result = {
        "benchmark": "gated_delta_rule",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "rows": rows,
        "growth": growths,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
