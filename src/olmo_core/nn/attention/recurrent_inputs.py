"""What a call of a gated delta net asks for: checked at the door, before anything is computed."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olmo_core.nn.attention.inputs import check_hidden_states
from olmo_core.nn.attention.lengths import check_cu_doc_lens, check_leftpad

if TYPE_CHECKING:
    from olmo_core.nn.attention.recurrent import GatedDeltaNet

__all__ = ["read_inputs"]

_NO_EFFECT = (
    "max_doc_len",
    "max_doc_len_q",
    "max_doc_len_k",
    "pos_sin",
    "pos_cos",
    "freqs_cis",
)
_SHARD = ("cu_doc_lens_q", "cu_doc_lens_k", "local_k_slice", "global_cu_doc_lens")
_KNOWN = ("x", "cu_doc_lens", "cache_leftpad", *_NO_EFFECT, *_SHARD)


def read_inputs(
    layer: GatedDeltaNet, x: Tensor, cu_doc_lens: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Check a call, and that the layer's cache, if it has one, has room for it.

    :returns: Which tokens are left padding (B, T), or None if there is none.
    :raises TypeError: For an unknown keyword, or an argument of the wrong type or dtype.
    :raises ValueError: If something is contradictory or of the wrong shape.
    :raises RuntimeError: If the cache would overflow, or gradients are wanted with it.
    """
    _check_names(kwargs)
    check_hidden_states(x, layer.d_model, layer.w_out.weight)
    batch, tokens, _ = x.shape
    cache, leftpad = layer.kv_cache_manager, kwargs.get("cache_leftpad")
    for name, lengths in (("cu_doc_lens", cu_doc_lens), ("cache_leftpad", leftpad)):
        if isinstance(lengths, Tensor) and lengths.device != x.device:
            raise ValueError(
                f"{name} must be on the input's device, {x.device}, got {lengths.device}."
            )
    if cu_doc_lens is not None:
        if cache is not None:
            raise ValueError(
                "A decoding cache holds one document a row, so it can't be used with cu_doc_lens. "
                "Prefill each document as a row, padded on the left with cache_leftpad."
            )
        if leftpad is not None:
            raise ValueError(
                "cu_doc_lens and cache_leftpad were both given. Make the padding a document of its "
                "own in cu_doc_lens."
            )
        check_cu_doc_lens(cu_doc_lens, batch * tokens, None)

    if cache is None:
        if leftpad is None:
            return None
        check_leftpad(leftpad, batch, tokens)
        return torch.arange(tokens, device=x.device) < leftpad.unsqueeze(-1)

    needs_grad = x.requires_grad or layer.w_out.weight.requires_grad
    return cache.admit(x, leftpad, needs_grad=needs_grad)


def _check_names(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(
                f"GatedDeltaNet.forward() got an unexpected keyword argument {name!r}.{hint} It "
                f"takes {', '.join(_KNOWN)}."
            )
    given = [name for name in _SHARD if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} describe a context-parallel shard, and this layer is not sharded. "
            "Pass the documents as cu_doc_lens."
        )
