"""Documents as libraries of the gated delta rule take them: non-empty ones, with a state each."""

from __future__ import annotations

import torch
from torch import Tensor


def library_documents(
    tensors: tuple[Tensor, ...], initial_state: Tensor | None, cu_doc_lens: Tensor
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor]:
    """Tensors (B, T, ...) in one row, a state for each document, and the ends of those that are
    not empty, int64 and of memory of their own. The host waits for how many they are.

    :param initial_state: (1, HV, K, V), the first document's, which may be empty.
    """
    ends = torch.unique_consecutive(cu_doc_lens).long()
    if initial_state is not None:
        first = torch.where(cu_doc_lens[1] > 0, initial_state, 0)
        rest = first.new_zeros(ends.shape[0] - 2, *first.shape[1:])
        initial_state = torch.cat((first, rest))
    return tuple(x.flatten(0, 1).unsqueeze(0) for x in tensors), initial_state, ends
