"""The processes that ``torchrun``, or a launcher that sets what it sets, has started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["join_started", "lost_another", "number_started"]

_SET = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def number_started() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {*os.environ} >= _SET else 1


def join_started(patience: timedelta, *, on_gpus: bool) -> None:
    """Make them the default process group.

    :param patience: How long a rank waits for the others.
    :param on_gpus: Each takes the one of its local rank; small messages go through the hosts.
    """
    backend = "gloo"
    if on_gpus:
        devices = torch.cuda.device_count()
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % devices)
        # NCCL refuses two ranks on one device; gloo takes CUDA tensors too, by way of the host.
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= devices:
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=patience)


def lost_another(error: Exception) -> bool:
    """Whether a message failed because its partner has gone, or does not answer."""
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    # What gloo raises is a RuntimeError that names its source file; and after a timeout, the last.
    signs = (
        "gloo/transport",
        "Connection closed by peer",
        "Application timeout caused pair closure",
    )
    return any(sign in str(error) for sign in signs)
