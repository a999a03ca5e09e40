"""Rank helpers that also work without a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "get_full_tensor",
    "get_rank",
    "get_world_size",
    "goes_over_gloo",
    "is_distributed",
    "local_part",
]


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
    # Known by name: importing torch.distributed.tensor takes longer than this library does.
    sharded: Any = tensor
    if getattr(sharded, "full_tensor", None) is None:
        return tensor
    in_memory_of_a_gpu = sharded.device.type not in ("cpu", "meta")
    if in_memory_of_a_gpu and goes_over_gloo(sharded.device_mesh):
        # With a GPU's memory gloo's gathering of DTensors ends the process.
        whole: torch.Tensor = sharded.cpu().full_tensor()
        return whole.to(sharded.device)
    whole = sharded.full_tensor()
    return whole


def goes_over_gloo(mesh: DeviceMesh) -> bool:
    """Whether messages of a mesh's tensors go over gloo: its ranks share a GPU, or have none.

    :param mesh: Of any number of dimensions.
    """
    group = mesh.get_group(0)
    return f"{mesh.device_type}:gloo" in dist.get_backend_config(group).split(",")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a ``DTensor``; any other tensor as it is."""
    to_local: Any = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor
