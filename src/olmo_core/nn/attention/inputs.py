"""What a call of an attention layer asks for: checked at the door, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from olmo_core.nn.attention.lengths import (
    check_cu_doc_lens,
    check_leftpad,
    document_positions,
    host_lengths,
    leftpad_to_cu_doc_lens,
)
from olmo_core.utils import runs_eagerly

if TYPE_CHECKING:
    from olmo_core.nn.attention.softmax import SoftmaxAttention

__all__ = ["Inputs", "check_hidden_states", "read_inputs"]


class Inputs(NamedTuple):
    """A call, in the terms of the parts that serve it."""

    lengths: dict[str, Any]
    """The backend's length keywords."""
    rope: dict[str, Any]
    """The RoPE module's keywords: positions, or the rows of its tables."""
    padding: Tensor | None
    """``(batch, seq)`` bool, True where a token is left padding."""


def check_hidden_states(x: Tensor, d_model: int, weight: Tensor) -> None:
    """:raises ValueError: If ``x`` can't be an input of a layer with ``weight``.
    :raises TypeError: If it is not a floating tensor of the layer's dtype.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"Expected a floating tensor (batch, seq, {d_model}), got {got}.")
    if x.dim() != 3 or x.shape[-1] != d_model:
        raise ValueError(
            f"Expected an input of shape (batch, seq, {d_model}), got {tuple(x.shape)}."
        )
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"The input has no tokens: shape {tuple(x.shape)}.")
    if x.device != weight.device:
        raise ValueError(f"The input is on {x.device} and the layer on {weight.device}.")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"The input is {x.dtype} and the layer {weight.dtype}. Cast one of them, or use "
            "torch.autocast."
        )


def read_inputs(
    layer: SoftmaxAttention,
    x: Tensor,
    *,
    cu_doc_lens: Tensor | None,
    max_doc_len: int | None,
    cache_leftpad: Tensor | None,
    rope_buffers: dict[str, Tensor | None],
    global_cu_doc_lens: Tensor | None,
    shard: dict[str, Any],
) -> Inputs:
    """Check a call and split it into what each part of the layer needs.

    :param shard: The keywords that only a context-parallel shard has.
    :raises ValueError: If something is missing, contradictory or of the wrong shape.
    :raises TypeError: If something has the wrong type or dtype.
    :raises RuntimeError: If the KV cache would overflow, or gradients are wanted with it.
    """
    check_hidden_states(x, layer.d_model, layer.w_out.weight)
    batch, seq_len, _ = x.shape
    given = [name for name, value in shard.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} describe a context-parallel shard, and this layer is not sharded. "
            "Pass cu_doc_lens and max_doc_len, or call apply_cp first."
        )
    if cu_doc_lens is None and max_doc_len is not None:
        raise ValueError(
            f"max_doc_len={max_doc_len} was given without cu_doc_lens, so no document would be "
            "masked. Pass cu_doc_lens too."
        )
    if cu_doc_lens is not None:
        if layer.kv_cache_manager is not None:
            raise ValueError(
                "A KV cache holds one document a row, so it can't be used with cu_doc_lens. "
                "Prefill each document as a row, padded on the left with cache_leftpad."
            )
        if cache_leftpad is not None:
            raise ValueError(
                "cu_doc_lens and cache_leftpad were both given. Make the padding a document of its "
                "own in cu_doc_lens."
            )
        _check_device(cu_doc_lens, x, "cu_doc_lens")
        check_cu_doc_lens(cu_doc_lens, batch * seq_len, max_doc_len)
    _check_global(global_cu_doc_lens, cu_doc_lens)
    rope_buffers = {name: b for name, b in rope_buffers.items() if b is not None}
    if rope_buffers and layer.rope is None:
        raise ValueError(f"{', '.join(rope_buffers)} given to a layer without RoPE.")

    cache = layer.kv_cache_manager
    if cache is not None:
        if rope_buffers:
            raise ValueError(
                f"{', '.join(rope_buffers)} given with a KV cache, which knows its positions."
            )
        if cache_leftpad is not None:
            _check_device(cache_leftpad, x, "cache_leftpad")
        needs_grad = x.requires_grad or layer.w_out.weight.requires_grad
        padding = cache.admit(x, cache_leftpad, needs_grad=needs_grad)
        index = torch.arange(seq_len, device=x.device) + cache.current_position()
        return Inputs({}, {"positions": index, "max_position": cache.max_seq_len}, padding)

    lengths: dict[str, Any] = {"cu_doc_lens": cu_doc_lens, "max_doc_len": max_doc_len}
    rope: dict[str, Any] = dict(rope_buffers)
    padding = None
    if cache_leftpad is not None:
        _check_device(cache_leftpad, x, "cache_leftpad")
        check_leftpad(cache_leftpad, batch, seq_len)
        cu = leftpad_to_cu_doc_lens(cache_leftpad, seq_len)
        lengths = {"cu_doc_lens": cu, "max_doc_len": seq_len}
        padding = torch.arange(seq_len, device=x.device) < cache_leftpad[:, None]
    elif cu_doc_lens is not None and not rope_buffers and layer.rope is not None:
        # Restarting in each document gives the bits that the document gives alone.
        positions = document_positions(cu_doc_lens, batch * seq_len).view(batch, seq_len)
        rope = {"positions": positions, "max_position": max_doc_len or batch * seq_len}
    return Inputs(lengths, rope, padding)


def _check_global(global_cu: Tensor | None, cu: Tensor | None) -> None:
    """Without context parallelism the whole sequence is the input: its documents are the same."""
    if global_cu is None:
        return
    message = (
        "global_cu_doc_lens describes the whole sequence of a context-parallel shard, and this "
        "layer is not sharded: pass its documents as cu_doc_lens too."
    )
    if cu is None or cu.shape != global_cu.shape:
        raise ValueError(message)
    if not runs_eagerly(cu.device):
        torch._assert_async((cu == global_cu).all(), message)
    elif host_lengths(global_cu) != host_lengths(cu):
        raise ValueError(message)


def _check_device(lengths: Tensor, x: Tensor, name: str) -> None:
    if isinstance(lengths, Tensor) and lengths.device != x.device:
        raise ValueError(f"{name} must be on the input's device, {x.device}, got {lengths.device}.")
