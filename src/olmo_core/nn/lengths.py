"""Cumulative document lengths: tensors to every op, checked at the door, never remembered.

``cu_doc_lens`` holds the ends of documents packed into one sequence, int32, first element 0. It
indexes the flattened batch, so a document may cross a row. Repeated ends are empty documents: they
pad the tensor to a fixed size, which lets one compiled graph serve any number of documents.

No identity and no version counter says that a tensor's bytes are the same: collectives into a
static buffer, ``.data``, numpy and dlpack aliases and a compiler's reuse of buffers change them
behind both. So what the device needs (positions, padding) is made anew at each use, and so is the
host's reading, which costs nothing on a CPU and is left to the device on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from olmo_core.utils import runs_eagerly

_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""On a GPU, the bounds within which the host has found a tensor's values, for an error that a
person can use. The device asserts them at every use, so an answer that is old does no harm."""

_DIFFERS = (
    " differs between the rows of a torch.vmap, where the host can't check it. Share it "
    "(in_dims=None), or call the layer for each row."
)


def host_lengths(cu: Tensor) -> list[int]:
    """The values of a lengths tensor. On a GPU this waits for the device."""
    return cu.tolist()


def can_be_read(lengths: Tensor) -> bool:
    """Whether the host may look at the values: nothing is being compiled, traced or captured."""
    if not runs_eagerly(lengths.device) or type(lengths) is not Tensor or lengths.is_meta:
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def check_cu_doc_lens(
    cu: Tensor, total: int, max_doc_len: int | None, name: str = "cu_doc_lens"
) -> None:
    """Refuse lengths that do not describe ``total`` tokens.

    On a GPU the host reads a new tensor once; each use is an assertion on the device besides, which
    ends the process. In a graph that is being compiled or captured there is only the assertion.

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

    def check(values: list[int]) -> None:
        _check_values(values, total, max_doc_len, name)

    if _left_to_device(cu, (total, max_doc_len), name, check):
        lengths = cu.diff()
        good = (lengths >= 0).all() & (cu[0] == 0) & (cu[-1] == total)
        if max_doc_len is not None:
            good = good & (lengths <= max_doc_len).all()
        torch._assert_async(
            good,
            f"{name} does not describe the input: it must start at 0, not decrease, end at the "
            "number of tokens of the flattened batch, and have no document longer than max_doc_len",
        )


def _check_values(values: list[int], total: int, max_doc_len: int | None, name: str) -> None:
    steps = [b - a for a, b in pairwise(values)]
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {_short(values)}.")
    if min(steps) < 0:
        raise ValueError(
            f"{name} must not decrease (repeated ends are empty documents), got {_short(values)}."
        )
    if values[-1] != total:
        raise ValueError(
            f"{name} must end at the number of tokens in the flattened batch, {total}, got "
            f"{values[-1]}: {_short(values)}. Tokens past the last document need one too."
        )
    if max_doc_len is not None and max(steps) > max_doc_len:
        raise ValueError(
            f"The longest document of {name} has {max(steps)} tokens, but "
            f"max_doc_len={max_doc_len}. max_doc_len is an upper bound: raise it, or leave it out."
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

    def check(values: list[int]) -> None:
        if not all(0 <= n <= longest for n in values):
            raise ValueError(f"cache_leftpad must be in [0, {longest}], got {_short(values)}.")

    if _left_to_device(leftpad, (longest,), "cache_leftpad", check):
        good = ((leftpad >= 0) & (leftpad <= longest)).all()
        torch._assert_async(good, "cache_leftpad is negative or longer than the row")


def _left_to_device(
    lengths: Tensor,
    bounds: tuple[int | None, ...],
    name: str,
    check: Callable[[list[int]], None],
) -> bool:
    """Check the values on the host where it may read them, on a GPU each tensor once for its
    bounds; whether the device must assert them."""
    readable, waits = can_be_read(lengths), _waits(lengths)
    if readable and not (waits and bounds in _READ.get(lengths, ())):
        if torch._C._functorch.is_batchedtensor(lengths):
            raise ValueError(name + _DIFFERS)
        check(host_lengths(lengths))
        if waits:
            _READ.setdefault(lengths, set()).add(bounds)
    return waits or not readable


def _waits(lengths: Tensor) -> bool:
    """Whether a reading waits for the device."""
    return lengths.is_cuda


def document_positions(cu: Tensor, total: int) -> Tensor:
    """The position of each of ``total`` tokens inside its document: ``(total,)``, int32.

    Runs on ``cu``'s device and reads nothing on the host.
    """
    index = torch.arange(total, device=cu.device, dtype=cu.dtype)
    return index - cu[ends_before(cu[1:], index)]


def ends_before(ends: Tensor, index: Tensor) -> Tensor:
    """How many of ``ends``, which don't decrease, are not greater than each element of ``index``.

    :param ends: ``(documents,)``, integers; likewise ``index``, of any shape.
    :returns: Like ``index``, int64.
    """
    if torch.compiler.is_compiling():
        # On a GPU Inductor (of torch 2.11 for one) searches a view from the beginning of its base.
        # A tensor of another dtype has memory of its own; a copy would be optimized away.
        ends, index = ends.to(torch.int64), index.to(torch.int64)
    return torch.searchsorted(ends.contiguous(), index, right=True)


def leftpad_to_cu_doc_lens(leftpad: Tensor, seq_len: int) -> Tensor:
    """Left padding as documents: each row's padding is one document, its tokens the next.

    :param leftpad: ``(batch,)``, int32: padding tokens at the start of each row.
    :returns: ``(2 * batch + 1,)``, int32: ``[0, pad_0, T, T + pad_1, 2T, ...]``.
    """
    batch = leftpad.shape[0]
    starts = torch.arange(batch, device=leftpad.device, dtype=torch.int32) * seq_len
    ends = torch.stack([starts + leftpad, starts + seq_len], dim=1).flatten()
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def _short(values: list[int]) -> str:
    return (
        str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ... {len(values) - 8} more]"
    )
