"""Time, memory and error of attention against sequence length.

Times are medians of eager calls after a warm-up. Memory is the peak of what one forward and
backward allocates on top of its inputs. The error is the largest of a row's, forward and gradients,
against the dense float64 reference, at a length where that is affordable.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from olmo_core.diagnostics.bench_cases import BenchCase, Problem, Settings
from olmo_core.diagnostics.contenders import Attend, Contender, Unavailable
from olmo_core.nn.attention.kernels.softmax.reference import dense_attention
from olmo_core.nn.functional import largest_row_error

__all__ = ["Measurement", "Plan", "median_ms", "peak_bytes", "plan", "run"]

_MIN_RUNS, _MAX_RUNS = 3, 200


@dataclass(frozen=True)
class Measurement:
    """One contender, one case, one length."""

    name: str
    is_peer: bool
    case: str
    tokens: int
    forward_ms: float | None = None
    both_ms: float | None = None
    """Forward and backward; None where there is no backward."""
    tflops: float | None = None
    """Of forward and backward, or of forward alone where there is no backward."""
    gb_per_s: float | None = None
    """What a decoding step reads of the cache."""
    peak_mb: float | None = None
    error: float | None = None
    error_tokens: int | None = None
    reason: str = ""
    """Why nothing was measured."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        row = asdict(self)
        return {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in row.items()
        }


@dataclass(frozen=True)
class Plan:
    """One measurement to make."""

    contender: Contender
    case: BenchCase
    tokens: int

    def __str__(self) -> str:
        return f"{self.case} {self.tokens}: {self.contender.name}"


def plan(who: Sequence[Contender], cases: Sequence[BenchCase], tokens: Sequence[int]) -> list[Plan]:
    """Everybody on one problem before the next one, short problems first."""
    return [Plan(c, case, n) for case in cases for n in tokens for c in who]


def run(todo: Sequence[Plan], settings: Settings, device: torch.device) -> Iterator[Measurement]:
    """Measure one after the other. A contender that fails is a row with the reason."""
    errors: dict[tuple[str, BenchCase, int], float] = {}
    problem: Problem | None = None
    for item in todo:
        if problem is None or (problem.case, problem.n_tokens) != (item.case, item.tokens):
            problem = Problem(item.case, settings, item.tokens, device)
        head = (item.contender.name, item.contender.is_peer, str(item.case), item.tokens)
        try:
            small = problem.smaller()
            key = (item.contender.name, item.case, small.n_tokens)
            if key not in errors:
                errors[key] = _error(item.contender.prepare(small), small)
            yield _measure(
                head, item.contender.prepare(problem), problem, errors[key], small.n_tokens
            )
        except Unavailable as e:
            yield Measurement(*head, reason=str(e))
        except Exception as e:  # out of memory, a kernel that fails: named, and the others go on
            lines = str(e).strip().splitlines() or [""]
            yield Measurement(*head, reason=f"{type(e).__name__}: {lines[0][:200]}")


def _measure(
    head: tuple[str, bool, str, int], attend: Attend, p: Problem, error: float, error_tokens: int
) -> Measurement:
    q, k, v = p.qkv

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), p.dout)

    seconds = p.settings.seconds
    forward_ms = median_ms(forward, p.device, seconds)
    if p.case == BenchCase.decode:
        rate = p.cache_bytes / forward_ms / 1e6
        peak = peak_bytes(forward, p.device)
        return Measurement(
            *head, forward_ms, None, None, rate, _megabytes(peak), error, error_tokens
        )
    both_ms = median_ms(both, p.device, seconds)
    tflops = p.flops(backward=True) / both_ms / 1e9
    peak = peak_bytes(both, p.device)
    return Measurement(
        *head, forward_ms, both_ms, tflops, None, _megabytes(peak), error, error_tokens
    )


def _megabytes(n: int | None) -> float | None:
    return None if n is None else n / 1e6


def _error(attend: Attend, p: Problem) -> float:
    """The largest error of the output and the gradients."""
    inputs = p.qkv
    if p.case == BenchCase.decode:
        with torch.no_grad():
            got: list[Tensor] = [attend(*inputs)]
    else:
        out = attend(*inputs)
        got = [out, *torch.autograd.grad(out, inputs, p.dout)]
    device = "cpu" if p.device.type == "mps" else p.device
    mask = p.mask[-1:] if p.case == BenchCase.decode else p.mask
    exact = [x.detach().to(device, torch.float64).requires_grad_() for x in inputs]
    truth, _ = dense_attention(exact[0], exact[1], exact[2], mask.to(device), p.scale)
    want = [truth]
    if p.case != BenchCase.decode:
        want += torch.autograd.grad(truth, exact, p.dout.to(truth))
    return largest_row_error(got, want)


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of ``call``: at least 3 runs, and as many more as fit into ``seconds``."""
    call()
    times: list[float] = []
    start = perf_counter()
    while len(times) < _MIN_RUNS or (perf_counter() - start < seconds and len(times) < _MAX_RUNS):
        times.append(_once_ms(call, device))
    return statistics.median(times)


def _once_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = perf_counter()
    call()
    if device.type == "mps":
        torch.mps.synchronize()
    return 1e3 * (perf_counter() - start)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most that ``call`` holds at once, beyond what there was before; None where unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
