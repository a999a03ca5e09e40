"""What the GPU benchmarks share: clocks, ceilings, and where results go.

Times are medians of single calls between CUDA events, after warm-up, over inputs that rotate, so
that the L2 cache does not serve them. Compare only numbers of one run.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Report",
    "captured",
    "copy_tbs",
    "gemm_tflops",
    "median_ms",
    "paired_ms",
    "peak_mib",
    "require_cuda",
]


def median_ms(calls: Sequence[Callable[[], Any]], *, warmup: int = 4, samples: int = 20) -> float:
    """The median time of a call; ``calls`` do the same with different inputs and take turns."""
    return _medians([calls], warmup, samples)[0]


def paired_ms(
    first: Sequence[Callable[[], Any]],
    second: Sequence[Callable[[], Any]],
    *,
    samples: int = 30,
    ahead: bool = False,
) -> tuple[float, float]:
    """The medians of two things measured alternately, so that drift hits both.

    :param ahead: Keep the device busy until a call is launched, as it is in the middle of a model:
        without it, a call from an idle device begins with the time that Python takes.
    """
    a, b = _medians([first, second], 4, samples, ahead)
    return a, b


_AHEAD_CYCLES = 10**7  # some 6 ms


def _medians(
    rivals: list[Sequence[Callable[[], Any]]], warmup: int, samples: int, ahead: bool = False
) -> list[float]:
    turns = [itertools.cycle(calls) for calls in rivals]
    for _ in range(warmup):
        for turn in turns:
            next(turn)()
    spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in rivals]
    torch.cuda.synchronize()
    for _ in range(samples):
        for turn, mine in zip(turns, spans, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call = next(turn)
            if ahead:
                torch.cuda._sleep(_AHEAD_CYCLES)
            start.record()
            call()
            stop.record()
            mine.append((start, stop))
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) for a, b in mine) for mine in spans]


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a step as one CUDA graph: its kernels without their launches from Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_mib(call: Callable[[], Any]) -> float:
    """Memory that a call takes at its peak, above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def require_cuda() -> None:
    """Leave, with the reason, where nothing can be measured."""
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device, and torch sees none here")


def _device_name() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def gemm_tflops() -> float:
    """The rate of an 8192^3 bf16 product: the ceiling of everything that multiplies matrices."""
    a, b, c = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return 2 * 8192**3 / median_ms([lambda: a @ b, lambda: b @ c, lambda: c @ a]) / 1e9


def copy_tbs() -> float:
    """Bytes read and written per second by a device copy of 1 GiB."""
    a, b = (torch.randn(2**28, device="cuda") for _ in range(2))
    return 2 * 2**30 / median_ms([lambda: a.copy_(b), lambda: b.copy_(a)]) / 1e9


class Report:
    """Collects named sections; a section that fails is a line in the report, not the end of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: dict[str, Any] = {"benchmark": name, "device": _device_name()}
        print(f"# {name}: {self.data['device']}", flush=True)

    def section(self, name: str, run: Callable[[], Any]) -> Any:
        try:
            value = run()
        except Exception as e:
            traceback.print_exc(limit=-3)
            value = {
                "failed": f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            }
        self.data[name] = value
        text = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:44s} {text}", flush=True)
        torch.cuda.empty_cache()
        return value

    def finish(self) -> None:
        line = json.dumps(self.data)
        if "OUT" in os.environ:
            Path(os.environ["OUT"], f"{self.name}.json").write_text(line + "\n")
        print(line, flush=True)
