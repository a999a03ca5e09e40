"""From what other libraries call packing to ``cu_doc_lens`` and left padding.

``cu_doc_lens`` is the int32 vector of cumulative document lengths over a batch flattened to B * T
tokens: it starts at 0, never decreases and ends at B * T. A repeated end is a document of no
tokens, so that a vector of one fixed size serves any number of documents (compiled graphs then
stay valid).

B: batch, T: sequence length, N: documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


class DocLens(NamedTuple):
    """What ``forward`` of a model or a mixer takes: ``forward(x, **doc_lens._asdict())``."""

    cu_doc_lens: Tensor
    """(N + 1,) int32."""
    max_doc_len: int
    """The longest document, in tokens."""


def doc_lens_from_lengths(
    lengths: Sequence[int] | Tensor,
    *,
    total: int | None = None,
    size: int | None = None,
    device: torch.device | str | None = None,
) -> DocLens:
    """Cumulative lengths of documents that lie one after the other.

    :param lengths: N document lengths in tokens, in order.
    :param total: B * T, if known: the lengths must sum to it.
    :param size: pad ``cu_doc_lens`` to this many elements by repeating its end.
    :param device: of the result; that of ``lengths`` if it is a tensor, else the CPU.
    :raises ValueError: for a negative or non-integer length, no tokens at all, a wrong sum, or more
        documents than ``size`` holds.
    """
    if isinstance(lengths, Tensor):
        _expect_integers("lengths", lengths, 1)
        device = lengths.device if device is None else device
        lengths = lengths.tolist()
    ends = [0]
    longest = 0
    for i, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, int):
            raise ValueError(f"lengths must be integers, but lengths[{i}] is {length!r}")
        if length < 0:
            raise ValueError(f"lengths must not be negative, but lengths[{i}] is {length}")
        ends.append(ends[-1] + length)
        longest = max(longest, length)
    if longest == 0:
        raise ValueError("lengths hold no tokens: give at least one document of at least one token")
    if total is not None and ends[-1] != total:
        raise ValueError(
            f"lengths sum to {ends[-1]}, but there are {total} tokens: "
            "padding needs a document of its own"
        )
    if ends[-1] > INT32_MAX:
        raise ValueError(f"lengths sum to {ends[-1]}, more than int32 holds: use smaller batches")
    if size is not None:
        if len(ends) > size:
            raise ValueError(
                f"size={size} holds {size - 1} documents, but there are {len(ends) - 1}: raise it"
            )
        ends += [ends[-1]] * (size - len(ends))
    return DocLens(torch.tensor(ends, dtype=torch.int32, device=device), longest)


def doc_lens_from_position_ids(position_ids: Tensor) -> DocLens:
    """Documents of packed Hugging Face batches, where positions restart at 0 with each document.

    :param position_ids: (B, T) or (T,) integers. A row may go on with the document of the row
        before.
    :raises ValueError: if positions neither restart at 0 nor count on by one.
    """
    _expect_integers("position_ids", position_ids, 1, 2)
    flat = position_ids.reshape(-1).long()
    starts = flat == 0
    follows = torch.zeros_like(starts)
    follows[1:] = flat[1:] == flat[:-1] + 1
    wrong = (~(starts | follows)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        before = f"after {int(flat[i - 1])}" if i else "at the beginning"
        raise ValueError(
            "position_ids must restart at 0 or count on by one, "
            f"but token {i} has {int(flat[i])} {before}"
        )
    return _from_starts(starts)


def doc_lens_from_cu_seqlens(
    cu_seqlens: Tensor | Sequence[int], *, total: int | None = None
) -> DocLens:
    """Documents of collators that name cumulative lengths (``cu_seq_lens_q``, ``cu_seqlens``).

    :param cu_seqlens: (N + 1,) or (1, N + 1) integers that start at 0 and do not decrease.
    :param total: B * T, if known: the last must be it.
    :raises ValueError: if they are no cumulative lengths, or do not end at ``total``.
    """
    cu = torch.as_tensor(cu_seqlens)
    _expect_integers("cu_seqlens", cu, 1, 2)
    if cu.dim() == 2 and cu.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens must describe the flattened batch in one row, got shape {tuple(cu.shape)}"
        )
    values = cu.flatten().tolist()
    if len(values) < 2 or values[0] != 0 or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"cu_seqlens must start at 0 and not decrease, got {values[:8]}")
    lengths = [b - a for a, b in pairwise(values)]
    return doc_lens_from_lengths(lengths, total=total, device=cu.device)


def doc_lens_from_attention_mask(attention_mask: Tensor) -> DocLens:
    """Documents of a 2-D attention mask; a row's padding becomes a document of its own.

    :param attention_mask: (B, T) integers or bools: 0 for padding, and 1 for tokens or 1, 2, ...
        for the tokens of a row's first, second, ... document.
    :raises ValueError: for negative values, or if one value's tokens do not lie together.
    """
    mask = _expect_mask(attention_mask)
    starts = torch.ones_like(mask, dtype=torch.bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    for row, (values, begins) in enumerate(zip(mask, starts, strict=True)):
        runs = values[begins]
        runs = runs[runs != 0]
        if runs.unique().numel() != runs.numel():
            raise ValueError(
                "attention_mask: the tokens of a document must lie together, "
                f"but row {row} has holes "
                f"(values in order: {values[begins].tolist()})"
            )
    return _from_starts(starts.reshape(-1))


def leftpad_from_attention_mask(attention_mask: Tensor) -> Tensor:
    """Left padding of each row, as ``cache_leftpad`` takes it.

    :param attention_mask: (B, T) integers or bools, 0 for padding, 1 for tokens.
    :returns: (B,) int32, the number of padding tokens before each row's first token.
    :raises ValueError: if a row has padding after its first token, or no token.
    """
    mask = _expect_mask(attention_mask)
    if int(mask.max()) > 1:
        raise ValueError(
            f"attention_mask must hold 0 and 1, got {int(mask.max())}: "
            "packed rows cannot be left-padded"
        )
    leftpad = mask.shape[1] - mask.sum(1)
    padding = torch.arange(mask.shape[1], device=mask.device) < leftpad[:, None]
    for row in range(mask.shape[0]):
        if int(leftpad[row]) == mask.shape[1]:
            raise ValueError(f"attention_mask: row {row} has no tokens")
        if bool((padding[row] == mask[row].bool()).any()):
            raise ValueError(
                f"attention_mask: row {row} has padding that is not on the left; "
                "pad with padding_side='left'"
            )
    return leftpad.to(torch.int32)


def _from_starts(starts: Tensor) -> DocLens:
    end = torch.tensor([starts.numel()], device=starts.device)
    cu = torch.cat([starts.nonzero().squeeze(1), end])
    return DocLens(cu.to(torch.int32), int(cu.diff().max()))


def _expect_integers(name: str, x: Tensor, *dims: int) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    if x.dim() not in dims:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{name} must be {expected}, got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(x.shape)})")


def _expect_mask(mask: Tensor) -> Tensor:
    mask = mask.long() if mask.dtype == torch.bool else mask
    _expect_integers("attention_mask", mask, 2)
    if int(mask.min()) < 0:
        raise ValueError(f"attention_mask must not be negative, got {int(mask.min())}")
    return mask.long()
