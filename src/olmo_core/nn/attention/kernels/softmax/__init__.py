"""Softmax attention: a kernel a file, imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from olmo_core.nn.attention.kernels.softmax.protocol import Capabilities, Feature, Kernel

__all__ = [
    "Capabilities",
    "Feature",
    "Kernel",
    "capabilities_of",
    "declare_kernel",
    "get_kernel",
    "kernel_names",
    "register_kernel",
]

_FILES: dict[str, str] = {}
_KERNELS: dict[str, Kernel] = {}


def declare_kernel(name: str, file: str) -> None:
    """Say that the kernel called ``name`` is the ``KERNEL`` of ``file``, and its row that file's
    ``CAPABILITIES``.

    :param file: In this package, without suffix.
    """
    _FILES[name] = file


def kernel_names() -> Iterable[str]:
    """The kernels declared, in that order."""
    return _FILES.keys()


def capabilities_of(name: str) -> Capabilities:
    """The row of the kernel called ``name``."""
    return import_module(f"{__name__}.{_FILES[name]}").CAPABILITIES


def get_kernel(name: str) -> Kernel:
    """The kernel called ``name``; its file is imported by the first call."""
    if name not in _KERNELS:
        register_kernel(import_module(f"{__name__}.{_FILES[name]}").KERNEL)
    return _KERNELS[name]


def register_kernel(kernel: Kernel) -> None:
    """Make ``kernel`` the one of its name. Ops carry names, never objects, so that they compile."""
    _KERNELS[kernel.name] = kernel
