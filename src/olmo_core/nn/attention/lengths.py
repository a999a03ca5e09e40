"""Cumulative document lengths: tensors to every op, read on the host once each.

``cu_doc_lens`` holds the ends of documents packed into one sequence, int32, first element 0. It
indexes the flattened batch, so a document may cross a row. Repeated ends are empty documents: they
pad the tensor to a fixed size, which lets one compiled graph serve any number of documents.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from olmo_core.utils import runs_eagerly

__all__ = [
    "check_cu_doc_lens",
    "check_leftpad",
    "document_positions",
    "host_lengths",
    "leftpad_to_cu_doc_lens",
]

T = TypeVar("T")

_DERIVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _remember(lengths: Tensor, key: tuple[str, int], compute: Callable[[], T]) -> T:
    """``compute()``, once while ``lengths`` does not change: all layers of a step share it.

    The memory is weak in the tensor and checked by its version counter, which inference tensors do
    not have. What a graph computes belongs to the graph.
    """
    if not runs_eagerly(lengths.device) or lengths.is_inference():
        return compute()
    known = _DERIVED.get(lengths)
    if known is None or known[0] != lengths._version:
        known = (lengths._version, {})
        _DERIVED[lengths] = known
    if key not in known[1]:
        with torch.inference_mode(False):
            known[1][key] = compute()
    return known[1][key]


def host_lengths(cu: Tensor) -> list[int]:
    """The values of a lengths tensor, read from its device once while they do not change."""
    return _remember(cu, ("host", 0), cu.tolist)


def check_cu_doc_lens(
    cu: Tensor, total: int, max_doc_len: int | None, name: str = "cu_doc_lens"
) -> None:
    """Refuse lengths that do not describe ``total`` tokens.

    Eager code reads the values once for each tensor. In a graph that is being compiled or captured
    the check becomes an assertion on the device.

    :param cu: ``(documents + 1,)``, int32: starts at 0, does not decrease, ends at ``total``.
    :param total: Tokens in the flattened batch.
    :param max_doc_len: An upper bound of the longest document, or None.
    :raises TypeError: If ``cu`` is not an int32 tensor.
    :raises ValueError: If its shape or its values are wrong.
    """
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        got = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
        raise TypeError(
            f"{name} must be a torch.int32 tensor, got {got}. Use {name}.to(torch.int32)."
        )
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ValueError(
            f"{name} must be 1-D with one element more than there are documents, got shape "
            f"{tuple(cu.shape)}. For a single document pass [0, {total}]."
        )
    if isinstance(max_doc_len, bool) or not isinstance(max_doc_len, int | torch.SymInt | None):
        raise TypeError(
            f"The longest document must be an int, got {type(max_doc_len).__name__}. "
            "A tensor here would make every step wait for the device: use int(...)."
        )
    if not runs_eagerly(cu.device):
        lengths = cu[1:] - cu[:-1]
        good = (cu[0] == 0) & (cu[-1] == total) & (lengths >= 0).all()
        if max_doc_len is not None:
            good = good & (lengths <= max_doc_len).all()
        torch._assert_async(
            good, f"{name} does not describe the input, or a document exceeds max_doc_len"
        )
        return

    first, last, shortest, longest = _remember(cu, ("extent", 0), lambda: _extent(host_lengths(cu)))
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {_short(host_lengths(cu))}.")
    if shortest < 0:
        raise ValueError(
            f"{name} must not decrease (repeated ends are empty documents), got "
            f"{_short(host_lengths(cu))}."
        )
    if last != total:
        raise ValueError(
            f"{name} must end at the number of tokens in the flattened batch, {total}, got "
            f"{last}: {_short(host_lengths(cu))}. Tokens past the last document need one too."
        )
    if max_doc_len is not None and longest > max_doc_len:
        raise ValueError(
            f"The longest document of {name} has {longest} tokens, but max_doc_len={max_doc_len}. "
            "max_doc_len is an upper bound: raise it, or leave it out."
        )


def check_leftpad(leftpad: Tensor, batch: int, longest: int) -> None:
    """Refuse left padding that ``batch`` rows of at most ``longest`` tokens can't have.

    :param leftpad: ``(batch,)``, int32: padding tokens at the start of each row.
    :raises TypeError: If it is not an int32 tensor.
    :raises ValueError: If its shape or its values are wrong.
    """
    if not isinstance(leftpad, Tensor) or leftpad.dtype != torch.int32:
        got = leftpad.dtype if isinstance(leftpad, Tensor) else type(leftpad).__name__
        raise TypeError(f"cache_leftpad must be a torch.int32 tensor, got {got}.")
    if leftpad.shape != (batch,):
        raise ValueError(f"cache_leftpad must have shape ({batch},), got {tuple(leftpad.shape)}.")
    if not runs_eagerly(leftpad.device):
        good = ((leftpad >= 0) & (leftpad <= longest)).all()
        torch._assert_async(good, "cache_leftpad is negative or longer than the row")
        return
    values = host_lengths(leftpad)
    if not all(0 <= n <= longest for n in values):
        raise ValueError(f"cache_leftpad must be in [0, {longest}], got {_short(values)}.")


def document_positions(cu: Tensor, total: int) -> Tensor:
    """The position of each of ``total`` tokens inside its document: ``(total,)``, int64.

    Runs on ``cu``'s device and reads nothing on the host.
    """

    def compute() -> Tensor:
        index = torch.arange(total, device=cu.device, dtype=cu.dtype)
        document = torch.searchsorted(cu, index, right=True) - 1
        return (index - cu[document]).long()

    return _remember(cu, ("positions", total), compute)


def leftpad_to_cu_doc_lens(leftpad: Tensor, seq_len: int) -> Tensor:
    """Left padding as documents: each row's padding is one document, its tokens the next.

    :param leftpad: ``(batch,)``, int32: padding tokens at the start of each row.
    :returns: ``(2 * batch + 1,)``, int32: ``[0, pad_0, T, T + pad_1, 2T, ...]``.
    """

    def compute() -> Tensor:
        batch = leftpad.shape[0]
        starts = torch.arange(batch, device=leftpad.device, dtype=torch.int32) * seq_len
        ends = torch.stack([starts + leftpad, starts + seq_len], dim=1).flatten()
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)

    return _remember(leftpad, ("documents", seq_len), compute)


def _extent(values: list[int]) -> tuple[int, int, int, int]:
    """The first and last value, and the shortest and longest step between neighbours."""
    steps = [b - a for a, b in pairwise(values)]
    return values[0], values[-1], min(steps), max(steps)


def _short(values: list[int]) -> str:
    return (
        str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ... {len(values) - 8} more]"
    )
