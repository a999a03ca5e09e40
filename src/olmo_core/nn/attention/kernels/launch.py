"""Triton kernels are launched here, or only compiled: ahead of their use, and side by side.

The first call of a shape class compiles all kernels that it needs, a second or more each. Compiled
where they are launched they wait for each other, and backward's for the whole forward pass. So
whoever knows what will be launched says so before the first launch; a launch then waits for its own
kernel alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.triton_driver import INTERPRETED

_MOST_THREADS = 16

_thread = threading.local()
_rehearsal = threading.RLock()
_started: set[Hashable] = set()
_pending: dict[int, list[Future[None]]] = {}
"""What is being compiled of each kernel, by its id, until somebody has waited for it."""
_one_at_a_time: dict[int, threading.Lock] = {}
_hashing = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, or inside :class:`only_compiling` what compiles it for the arguments."""
    compile_ = getattr(_thread, "compile", None)
    if compile_ is not None:
        return partial(compile_, kernel, grid)
    if _pending and (tasks := _pending.get(id(kernel))):
        wait(tasks)  # an error is met again here, where it belongs
        _pending.pop(id(kernel), None)
    launcher: Callable[..., Any] = kernel[grid]
    return launcher


def _compile(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    return kernel.warmup(*args, grid=grid, **options)


class only_compiling:
    """Inside, this thread's launches compile their kernels and run nothing: tensors may be meta.

    :param compile_: Given a kernel, its grid and arguments, compiles it, or has it compiled.
    """

    def __init__(self, compile_: Callable[..., Any] = _compile) -> None:
        self._compile = compile_

    def __enter__(self) -> None:
        self._outside = getattr(_thread, "compile", None)
        _thread.compile = self._compile

    def __exit__(self, *_: object) -> None:
        _thread.compile = self._outside


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
    :param call: Launches kernels on what :func:`shaped_like` makes of tensors. It may itself call
        this function, for parts that have a key of their own.
    """
    if device.type != "cuda" or INTERPRETED or (key, device) in _started:
        return
    with _rehearsal:
        if (key, device) in _started:
            return
        try:
            with torch.cuda.device(device), only_compiling(partial(_start, device)):
                call()
        except Exception:  # the call that this one rehearses meets it again
            return
        finally:
            _started.add((key, device))


def _start(
    device: torch.device, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any
) -> None:
    task = _compilers().submit(_compile_all, device, kernel, grid, args, options)
    _pending.setdefault(id(kernel), []).append(task)


def _compile_all(
    device: torch.device, kernel: Any, grid: tuple[int, ...], args: Any, options: Any
) -> None:
    """The kernel and what launches it, which up to Triton 3.6 a C compiler makes for each."""
    from triton.runtime import driver

    _hash_compiler()
    # Asked for twice, by forward and backward, the second finds what the first compiled.
    mine = _one_at_a_time.setdefault(id(kernel), threading.Lock())
    with torch.cuda.device(device), mine:
        compiled = _compile(kernel, grid, *args, **options)
        driver.active.launcher_cls(compiled.src, compiled.metadata)  # stays in Triton's cache


def _hash_compiler() -> None:
    """Triton's key of itself, a hash of its 0.4 GiB: once, not in each thread at the same time."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # elsewhere in other versions, which only costs time
        return
    with _hashing:
        triton_key()


@cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="triton-compiler"
    )
