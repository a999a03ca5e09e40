"""What may attend to what: one value for documents, windows, cached keys and key blocks.

Shape suffixes here and in the kernels: b batch, t tokens, q query tokens, k key tokens, h query
heads, g key and value heads, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from olmo_core.nn.lengths import host_lengths

__all__ = ["Segments"]


@dataclass(frozen=True, eq=False)
class Segments:
    """A *bottom-right varlen problem*: queries and keys cut into segments by cumulative lengths.

    Segment ``i`` of the queries sees segment ``i`` of the keys alone. Where ``causal``, its last
    query is aligned with its last key: query ``r`` of ``n`` sees key ``c`` of ``m`` if
    ``c <= r + (m - n)``. A query without keys gives 0.

    Without lengths the problem is *dense*: each row of the batch is one segment. Lengths are about
    the flattened batch, so a segment may cross a row.

    :param cu_q: Ends of the query segments, ``(segments + 1,)``, int32 on the queries' device, or
        None for a dense problem.
    :param cu_k: Ends of the key segments, likewise.
    :param max_q: An upper bound of the longest query segment.
    :param max_k: An upper bound of the longest key segment.
    :param causal: Whether queries see only keys up to their own position.
    :param window: How many keys a query sees at most, its own position included; -1 for all. Needs
        ``causal``.
    :param padded: Whether some segments are left padding, whose output is not read.
    """

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    causal: bool = True
    window: int = -1
    padded: bool = False

    def __post_init__(self) -> None:
        assert (self.cu_q is None) == (self.cu_k is None)
        assert self.window == -1 or (self.window > 0 and self.causal)

    @classmethod
    def dense(cls, n_q: int, n_k: int, *, causal: bool = True, window: int = -1) -> Segments:
        """One segment a row, ``n_q`` queries over ``n_k`` keys."""
        return cls(None, None, n_q, n_k, causal, window)

    @classmethod
    def documents(
        cls, cu: Tensor, longest: int, *, window: int = -1, padded: bool = False
    ) -> Segments:
        """Documents that attend causally to themselves."""
        return cls(cu, cu, longest, longest, True, window, padded)

    @property
    def effective_window(self) -> int:
        """The window, or -1 where it can't hide a key."""
        return -1 if self.window >= self.max_k else self.window

    def host_lengths(self, n_q: int, n_k: int) -> tuple[list[int], list[int]]:
        """Both cumulative lengths as ints, for kernels that loop on the host."""
        if self.cu_q is None or self.cu_k is None:
            return [0, n_q], [0, n_k]
        cu_q = host_lengths(self.cu_q)
        return cu_q, cu_q if self.cu_k is self.cu_q else host_lengths(self.cu_k)

    def materialize(self, n_q: int, n_k: int) -> Tensor:
        """The mask as a dense ``(n_q, n_k)`` bool tensor, True where a query sees a key.

        The oracle that tests compare with: built from the definition alone, quadratic in memory.
        """
        cu_q, cu_k = self.host_lengths(n_q, n_k)
        device = None if self.cu_q is None else self.cu_q.device
        mask = torch.zeros(n_q, n_k, dtype=torch.bool, device=device)
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
            query = torch.arange(q1 - q0, device=device)[:, None] + (k1 - k0) - (q1 - q0)
            key = torch.arange(k1 - k0, device=device)[None]
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=device)
            if self.causal:
                seen &= key <= query
            if self.window > 0:
                seen &= key > query - self.window
            mask[q0:q1, k0:k1] = seen
        return mask
