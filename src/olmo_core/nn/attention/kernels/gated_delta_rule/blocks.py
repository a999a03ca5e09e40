"""How the scans over chunks are cut on each GPU: by the shared memory that a program may have.

A program carries all keys of a state for some columns of values, and loads chunks ahead. Elsewhere
the kernels take at most 88 KiB, on Blackwell, which has 227, 152.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from olmo_core.nn.attention.kernels.triton_driver import shared_memory_kib


@dataclass(frozen=True)
class ScanBlocks:
    """One row: where a program may have ``shared_kib``, for states of up to ``keys`` rows."""

    shared_kib: int
    keys: int
    columns: int
    """Of values. Fewer than 64 only where there are no instructions for groups of four warps, which
    Triton 3.6 feeds wrongly then: see :func:`.triton_shared.pad`."""
    forward_stages: int
    backward_stages: int
    """Chunks whose loads are in flight together."""
    warps: int


# 8.0 and 8.7 have 163 KiB, 8.6, 8.9, 12.0 and 12.1 have 99, 9.0 and 10 have 227. Most that is
# taken: of 227 218 (9.0) and 196 (10.0), of 163 122, of 99 92.
SCANS = (
    ScanBlocks(163, 128, columns=64, forward_stages=3, backward_stages=3, warps=4),
    ScanBlocks(163, 256, columns=64, forward_stages=1, backward_stages=1, warps=8),
    ScanBlocks(99, 128, columns=64, forward_stages=2, backward_stages=3, warps=4),
    ScanBlocks(99, 256, columns=32, forward_stages=1, backward_stages=1, warps=8),
)
LEAST_SHARED_KIB = min(row.shared_kib for row in SCANS)


def scan_blocks(keys: int, device: torch.device) -> ScanBlocks:
    """The first row that ``device`` has the memory for and that holds ``keys``."""
    available = shared_memory_kib(device)
    return next(row for row in SCANS if row.shared_kib <= available and keys <= row.keys)
