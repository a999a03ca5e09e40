"""Cutting one rank's rows out of a batch: the checks and the arithmetic behind the load balancers.

Documents are given as their ends twice, as they are (``real``) and padded (``padded``), both lists
starting at 0 and of the same size; each document is padded at its own end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.lengths import check_cu_doc_lens, host_lengths

_INTEGERS = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


def take(
    rows: Tensor,
    inputs: Sequence[Tensor],
    seq_dims: Sequence[int],
    pad_values: Sequence[Any] | None,
    real: list[int],
    padded: list[int],
) -> list[Tensor]:
    """The tokens ``rows``, in padded coordinates, of each input."""
    if padded[-1] != real[-1] and pad_values is None:
        raise ValueError(
            f"A length of {real[-1]} needs {padded[-1] - real[-1]} positions of padding here, but "
            "pad_values is None. Pass one value for each input."
        )
    starts, padded_starts = torch.tensor(real), torch.tensor(padded)
    document = torch.searchsorted(padded_starts, rows, right=True) - 1
    source = starts[document] + rows - padded_starts[document]
    is_padding = source >= starts[document + 1]
    source = source.masked_fill(is_padding, 0)
    padding = is_padding.nonzero().flatten()

    shards = []
    for i, (x, dim) in enumerate(zip(inputs, seq_dims, strict=True)):
        shard = x.index_select(dim, source.to(x.device))
        if pad_values is not None and len(padding) > 0:
            shard = shard.index_fill(dim, padding.to(x.device), pad_values[i])
        shards.append(shard)
    return shards


def checked_multiple(length_multiple: int | None) -> int | None:
    if length_multiple is not None and length_multiple < 1:
        raise ValueError(f"length_multiple must be at least 1, got {length_multiple}.")
    return length_multiple


def checked_length(
    inputs: Sequence[Tensor], seq_dims: Sequence[int], pad_values: Sequence[Any] | None
) -> int:
    """The one sequence length of all inputs."""
    if len(inputs) == 0:
        raise ValueError("inputs is empty: pass at least one tensor to shard.")
    if len(seq_dims) != len(inputs):
        raise ValueError(
            f"seq_dims must have one dimension for each input, got {len(seq_dims)} for "
            f"{len(inputs)} inputs."
        )
    if pad_values is not None and len(pad_values) != len(inputs):
        raise ValueError(
            f"pad_values must have one value for each input, got {len(pad_values)} for "
            f"{len(inputs)} inputs."
        )
    for i, (x, dim) in enumerate(zip(inputs, seq_dims, strict=True)):
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"seq_dims[{i}] is {dim}, but inputs[{i}] has shape {tuple(x.shape)}.")
    lengths = [x.shape[dim] for x, dim in zip(inputs, seq_dims, strict=True)]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            f"All inputs must have the same length, at least 1, in their sequence dimension, got "
            f"{lengths} for seq_dims={list(seq_dims)}."
        )
    return lengths[0]


def checked_documents(
    inputs: Sequence[Tensor],
    seq_dims: Sequence[int],
    cu_doc_lens: Tensor,
    pad_values: Sequence[Any] | None,
) -> list[int]:
    """The documents' ends, on the host."""
    total = checked_length(inputs, seq_dims, pad_values)
    for i, (x, dim) in enumerate(zip(inputs, seq_dims, strict=True)):
        if dim % x.dim() != 0 and x.shape[0] != 1:
            raise ValueError(
                f"Sharding by document needs a batch of one, got inputs[{i}] of shape "
                f"{tuple(x.shape)} with sequence dimension {dim}. Flatten the batch into one "
                "sequence and add each row's start to its document lengths."
            )
    cu_doc_lens = _as_int32(cu_doc_lens)
    check_cu_doc_lens(cu_doc_lens, total, None)
    return list(host_lengths(cu_doc_lens))


def _as_int32(lengths: Tensor) -> Tensor:
    """Integers of any type; what int32 can't hold is as wrong in it as before."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"cu_doc_lens must be a tensor of integers, got {got}.")
    if lengths.dtype == torch.int32:
        return lengths
    return lengths.to(torch.int64).clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)


def with_padding_document(
    real: list[int], padded: list[int], total: int
) -> tuple[list[int], list[int]]:
    """Both lists of ends with a last document of nothing but padding, up to ``total``."""
    if padded[-1] == total:
        return real, padded
    return [*real, real[-1]], [*padded, total]


def lengths(ends: list[int], like: Tensor) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=like.device)


def longest(ends: list[int]) -> int:
    return max(stop - start for start, stop in pairwise(ends))


def ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
