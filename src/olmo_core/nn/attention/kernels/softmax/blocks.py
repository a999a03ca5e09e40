"""Cutting a varlen problem into rectangles, for kernels that loop over segments on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_core.nn.attention.segments import Segments


class Block(NamedTuple):
    """Queries ``[q0, q1)`` over keys ``[k0, k1)``.

    Query ``r`` of the block sees key ``c`` of the block if ``c <= r + diagonal`` and
    ``c > r + diagonal - window``; all keys if ``diagonal`` is None.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    diagonal: int | None = None
    window: int = -1

    @property
    def is_square(self) -> bool:
        """Plain causal attention of tokens to themselves."""
        return self.diagonal == 0 and self.window < 0 and self.q1 - self.q0 == self.k1 - self.k0

    @property
    def shape_key(self) -> tuple[int, int, int, int] | None:
        """What the mask depends on, or None if every query sees every key."""
        n, m = self.q1 - self.q0, self.k1 - self.k0
        if self.diagonal is None:
            return None
        cut_right = self.diagonal < m - 1
        cut_left = 0 < self.window <= n - 1 + self.diagonal
        return (n, m, self.diagonal, self.window) if cut_right or cut_left else None

    def mask(self, device: torch.device) -> Tensor:
        """``(n, m)`` bool, True where a query sees a key."""
        assert self.diagonal is not None
        n, m = self.q1 - self.q0, self.k1 - self.k0
        query = torch.arange(n, device=device)[:, None] + self.diagonal
        key = torch.arange(m, device=device)[None]
        seen = key <= query
        return seen if self.window < 0 else seen & (key > query - self.window)


def blocks(s: Segments, n_q: int, n_k: int, *, rows: int, whole_squares: bool) -> Iterator[Block]:
    """The blocks of a problem. Each query that sees a key is in exactly one of them.

    :param rows: Queries in a block that needs a mask. A window of W then costs ``W + rows - 1``
        keys a block, so time and memory grow with T * W.
    :param whole_squares: Leave causal squares whole, for kernels that skip their upper half.
    """
    cu_q, cu_k = s.host_lengths(n_q, n_k)
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        if q0 == q1 or k0 == k1:
            continue
        if not s.causal:
            for x in range(q0, q1, q1 - q0 if whole_squares else rows):
                yield Block(x, min(x + rows, q1) if not whole_squares else q1, k0, k1)
            continue
        q0 = max(q0, q1 - (k1 - k0))  # with more queries than keys the first ones see nothing
        n, offset = q1 - q0, (k1 - k0) - (q1 - q0)
        window = s.window if 0 < s.window < k1 - k0 else -1
        done = 0
        if offset == 0 and whole_squares:
            done = n if window < 0 else min(n, window)
            yield Block(q0, q0 + done, k0, k0 + done, 0)
        for x in range(done, n, rows):
            y = min(x + rows, n)
            first = max(0, offset + x - window + 1) if window > 0 else 0
            yield Block(q0 + x, q0 + y, k0 + first, k0 + offset + y, offset + x - first, window)
