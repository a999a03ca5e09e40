"""Triton kernels are launched here, or only compiled: ahead of their use, and side by side.

The first call of a shape class compiles all kernels that it needs, a second or more each. Compiled
where they are launched they wait for each other, and backward's for the whole forward pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["await_compiled", "compile_ahead", "launch", "only_compiling", "shaped_like"]

_MOST_THREADS = 16

_thread = threading.local()
_lock = threading.Lock()
_started: dict[Hashable, Future[None]] = {}


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, or inside :class:`only_compiling` what compiles it for the arguments."""
    if getattr(_thread, "only_compiles", False):
        return partial(kernel.warmup, grid=grid)
    launcher: Callable[..., Any] = kernel[grid]
    return launcher


class only_compiling:
    """Inside, this thread's launches compile their kernels and run nothing: tensors may be meta."""

    def __enter__(self) -> None:
        _thread.only_compiles = True

    def __exit__(self, *_: object) -> None:
        _thread.only_compiles = False


def shaped_like(*tensors: Tensor | None) -> list[Any]:
    """The tensors without their memory: enough to compile for them."""
    return [
        None
        if x is None
        else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        for x in tensors
    ]


def compile_ahead(key: Hashable, device: torch.device, call: Callable[[], Any]) -> None:
    """Start to compile what ``call`` launches, all kernels side by side, and do not wait.

    Once for each key. An error is left to the launch itself, which shows it where it belongs.

    :param key: All that the kernels are compiled for, but for what is known of alignment: with too
        little in it, a launch compiles its kernel itself.
    :param device: Where they will run. On a CPU, in Triton's interpreter, there is nothing to do.
    :param call: Launches kernels on what :func:`shaped_like` makes of tensors.
    """
    if device.type != "cuda" or (key, device) in _started:
        return
    with _lock:
        if (key, device) not in _started:
            _started[key, device] = _callers().submit(_compile, device, call)


def await_compiled(key: Hashable, device: torch.device) -> None:
    """Wait for what :func:`compile_ahead` started for a key, if it did."""
    task = _started.get((key, device))
    if task is not None:
        task.result()


def _compile(device: torch.device, call: Callable[[], Any]) -> None:
    import triton

    mode = getattr(triton, "AsyncCompileMode", None)
    together = nullcontext() if mode is None else mode(_compilers(), ignore_errors=True)
    try:
        with torch.cuda.device(device), together, only_compiling():
            call()
    except Exception:  # the launch meets it again, in the thread that asked for it
        return


@cache
def _callers() -> ThreadPoolExecutor:
    """Threads that go through launches and wait for the compilers."""
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="compile-ahead")


@cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="triton-compiler"
    )
