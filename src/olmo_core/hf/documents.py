"""Documents in transformers' batches: where positions restart and where padding lies.

B: batch, T: queries, S: keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def packed_doc_lens(
    positions: Tensor, mask: Tensor | None, batch: int, tokens: int
) -> Tensor | None:
    """Cumulative lengths (N + 1,) int32 of the documents in rows of ``tokens``; None for one a row.

    :param positions: (B, T) or (1, T), which restart with each document.
    :param mask: (B, T), 0 for padding: positions mean nothing there.
    """
    starts = _restarts(positions, batch, tokens)
    if mask is not None:
        real = mask[:, -tokens:] != 0
        starts[:, 1:] &= real[:, 1:] & real[:, :-1]
    return _cumulative(starts) if bool(starts.any()) else None


def segment_keywords(
    queries: int, keys: int, batch: int, mask: Tensor | None, positions: Tensor | None
) -> dict[str, Any]:
    """A backend's length keywords for T queries, the last of S keys; none for whole rows.

    :param mask: (B, S) bool, which keys are tokens.
    :param positions: (B, T) or (1, T), heeded where T is S.
    :raises ValueError: if a row's tokens do not lie together.
    """
    if positions is not None and queries == keys and positions.shape[-1] == queries:
        starts = _restarts(positions, batch, queries)
    elif mask is None:
        return {}
    else:
        starts = torch.zeros(batch, keys, dtype=torch.bool, device=mask.device)
    if mask is not None:
        change = mask[:, 1:] != mask[:, :-1]
        _check_padding(mask, change)
        # Positions of padding are filled with anything.
        starts[:, 1:] &= mask[:, 1:] & mask[:, :-1]
        starts[:, 1:] |= change
    if not bool(starts.any()):
        return {}
    cu_k = _cumulative(starts)
    if queries == keys:
        return {"cu_doc_lens": cu_k, "max_doc_len": int(cu_k.diff().max())}
    # A segment has those of its keys that are queries.
    row, column = cu_k[:-1] // keys, cu_k[:-1] % keys
    cu_q = torch.cat([row * queries + (column - (keys - queries)).clamp(min=0), cu_k[-1:]])
    cu_q[-1] = batch * queries
    return {
        "cu_doc_lens_q": cu_q,
        "cu_doc_lens_k": cu_k,
        "max_doc_len_q": int(cu_q.diff().max()),
        "max_doc_len_k": int(cu_k.diff().max()),
    }


def _restarts(positions: Tensor, batch: int, tokens: int) -> Tensor:
    """(B, T) bool: where a position does not follow the one before; not at a row's beginning."""
    positions = positions.reshape(-1, tokens).expand(batch, -1)
    starts = torch.zeros(batch, tokens, dtype=torch.bool, device=positions.device)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts


def _cumulative(starts: Tensor) -> Tensor:
    """Cumulative lengths from where documents start; each row starts one."""
    starts = starts.clone()
    starts[:, 0] = True
    end = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)


def _check_padding(mask: Tensor, change: Tensor) -> None:
    begins = mask[:, :1].sum(1) + (change & mask[:, 1:]).sum(1)
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask: the tokens of row {row} do not lie together. Documents in one row "
            "are told by position_ids that restart."
        )
