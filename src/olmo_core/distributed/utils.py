"""Rank helpers that also work without a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["get_full_tensor", "get_rank", "get_world_size", "is_distributed", "local_part"]


def is_distributed() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in ``group`` (the default group if None); 0 without distributed.

    -1 if this process is not in ``group``, as in torch.
    """
    return dist.get_rank(group) if is_distributed() else 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in ``group`` (the default group if None); 1 without distributed."""
    return dist.get_world_size(group) if is_distributed() else 1


def get_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor behind a ``DTensor``; any other tensor as it is.

    A collective for a sharded ``DTensor``: every rank of its mesh has to call it.
    """
    # Looked up by name: importing torch.distributed.tensor takes longer than this library does.
    full_tensor: Any = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor is not None else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a ``DTensor``; any other tensor as it is."""
    to_local: Any = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor
