"""Tensors as kernels read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def rows(*tensors: Tensor | None) -> list[Any]:
    """Tensors, and None, with a contiguous last dimension."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
