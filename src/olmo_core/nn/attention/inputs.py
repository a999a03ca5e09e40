"""The door of every mixer and backend: its keywords become one value, checked once, before anything
is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.attention.parallel.agreement import announce_errors
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.documents import (
    ShardDocuments,
    lengths_of,
    read_shard_documents,
)
from olmo_core.nn.attention.parallel.positions import shard_positions
from olmo_core.nn.attention.segments import Segments
from olmo_core.nn.dispatch import autocast_dtype
from olmo_core.nn.lengths import (
    can_be_read,
    check_cu_doc_lens,
    check_leftpad,
    document_positions,
    leftpad_to_cu_doc_lens,
)
from olmo_core.nn.sharded import local_input
from olmo_core.nn.tensor_parallel import TensorParallel

_LENGTHS_OF_Q_AND_K = (
    "cu_doc_lens_q",
    "cu_doc_lens_k",
    "max_doc_len_q",
    "max_doc_len_k",
    "local_k_slice",
)
_BOUND_OF = {
    "max_doc_len": "cu_doc_lens",
    "max_doc_len_q": "cu_doc_lens_q",
    "max_doc_len_k": "cu_doc_lens_k",
    "local_k_slice": "cu_doc_lens_k",
}
_A_DOCUMENT_A_ROW = (
    "A decoding cache holds one document a row, so it can't be used with {}. Prefill each document "
    "as a row, padded on the left with cache_leftpad."
)


class Call(NamedTuple):
    """A call of a mixer, in the terms of the parts that serve it."""

    segments: Segments | ShardDocuments | None
    """What may attend to what; on a shard, the documents of the whole sequence. None with a
    decoding cache, which knows."""
    positions: Tensor | None
    """Each token's position, ``(seq,)`` or ``(batch, seq)`` integers; None for consecutive ones
    from ``first_position`` on."""
    max_position: int
    """An upper bound of the positions, exclusive."""
    padding: Tensor | None
    """``(batch, seq)`` bool, True where a token is left padding."""
    rope_buffers: dict[str, Tensor]
    """The rows of the RoPE tables, where the caller brings them."""
    cache_leftpad: Tensor | None = None
    """How much left padding comes with the first tokens of a decoding cache, ``(batch,)`` int32."""
    first_position: int = 0
    """Of each row's first token, where the host knows it."""

    @property
    def rope(self) -> dict[str, Any]:
        """The keywords of a RoPE module."""
        if self.positions is None:
            return {"start_pos": self.first_position} if self.first_position else self.rope_buffers
        return {"positions": self.positions, "max_position": self.max_position}


def read_call(
    x: Tensor,
    *,
    weight: Tensor,
    d_model: int,
    cache: DecodingCache | None,
    parameters: Iterable[Tensor],
    context: ContextParallel | None = None,
    tensor_parallel: TensorParallel | None = None,
    window: int = -1,
    has_rope: bool = False,
    cu_doc_lens: Tensor | None = None,
    max_doc_len: int | None = None,
    cache_leftpad: Tensor | None = None,
    global_cu_doc_lens: Tensor | None = None,
    rope_buffers: dict[str, Tensor | None] | None = None,
    **shard: Any,
) -> Call:
    """Check a call of a mixer, and that its decoding cache, if it has one, has room for it.

    :param weight: A parameter of the mixer, for its device and dtype.
    :param parameters: The mixer's, none of which may want a gradient with a cache.
    :param context: This rank's place among those that share the sequence.
    :param tensor_parallel: Its place among those that share the mixer's heads.
    :param window: The backend's, in keys, or -1.
    :param has_rope: Whether the mixer rotates queries and keys.
    :param shard: The keywords that only a context-parallel shard has.
    :raises ValueError: If something is missing, contradictory or of the wrong shape.
    :raises TypeError: If something has the wrong type or dtype.
    :raises RuntimeError: If the cache would overflow, or gradients are wanted with it.
    """
    if tensor_parallel is not None:
        x = local_input(x)
        if cache_leftpad is not None and not tensor_parallel.whole_output:
            raise ValueError(
                "cache_leftpad zeroes the output's padding, which a sharded or DTensor output does "
                "not allow. Call apply_tp without output_layout and use_local_output, or make the "
                "padding a document of its own in cu_doc_lens."
            )
    if context is not None:
        keywords = {
            "cu_doc_lens": cu_doc_lens,
            "max_doc_len": max_doc_len,
            "global_cu_doc_lens": global_cu_doc_lens,
            **shard,
        }
        with announce_errors(lengths_of(keywords), x.device, context.everyone):
            check_hidden_states(x, d_model, weight)
            return _read_shard(x, context, cache, cache_leftpad, has_rope, rope_buffers, keywords)
    check_hidden_states(x, d_model, weight)
    batch, tokens, _ = x.shape
    if given := [name for name, value in shard.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)} describe a context-parallel shard, and this layer is not sharded. "
            "Pass cu_doc_lens and max_doc_len, or call apply_cp first."
        )
    buffers = _given(rope_buffers)
    if buffers and (cache is not None or not has_rope):
        why = "with a cache, which knows its positions" if has_rope else "to a layer without RoPE"
        raise ValueError(f"{', '.join(buffers)} given {why}.")
    if cu_doc_lens is not None and (cache is not None or cache_leftpad is not None):
        raise ValueError(
            _A_DOCUMENT_A_ROW.format("cu_doc_lens")
            if cache is not None
            else "cu_doc_lens and cache_leftpad were both given. Make the padding a document of "
            "its own in cu_doc_lens."
        )
    if cache_leftpad is not None:
        _check_device(cache_leftpad, x, "cache_leftpad")
    if cache is not None:
        padding = cache.admit(x, cache_leftpad, parameters=parameters)
        index, first = None, cache.host_position() if has_rope else 0
        if first is None:
            index = torch.arange(tokens, device=x.device) + cache.cache_seqlens
        return Call(None, index, cache.max_seq_len, padding, {}, cache_leftpad, first or 0)

    positions, padding = None, None
    if cache_leftpad is not None:
        check_leftpad(cache_leftpad, batch, tokens)
        cu = leftpad_to_cu_doc_lens(cache_leftpad, tokens)
        segments = Segments.documents(cu, tokens, window=window, padded=True)
        padding = torch.arange(tokens, device=x.device) < cache_leftpad[:, None]
    else:
        segments = fold(x, x, window, cu_doc_lens=cu_doc_lens, max_doc_len=max_doc_len)
        check_global(global_cu_doc_lens, cu_doc_lens, x)
        if segments.cu_q is not None and buffers:
            _check_rows(segments.cu_q, batch, tokens)
        elif segments.cu_q is not None and has_rope:
            # Restarting in each document gives the bits that the document gives alone.
            positions = document_positions(segments.cu_q, batch * tokens).view(batch, tokens)
    return Call(segments, positions, segments.max_q, padding, buffers)


def _read_shard(
    x: Tensor,
    context: ContextParallel,
    cache: DecodingCache | None,
    cache_leftpad: Tensor | None,
    has_rope: bool,
    rope_buffers: dict[str, Tensor | None] | None,
    keywords: dict[str, Any],
) -> Call:
    if cache is not None:
        raise RuntimeError(
            "A decoding cache holds whole sequences, and apply_cp has sharded this mixer. Generate "
            "from a model that is not sharded."
        )
    if cache_leftpad is not None:
        raise ValueError(
            "cache_leftpad pads rows on the left, and a shard is not a row's start. Make the "
            "padding a document of its own before the load balancer shards the batch."
        )
    buffers = _given(rope_buffers)
    if buffers and not has_rope:
        raise ValueError(f"{', '.join(buffers)} given to a layer without RoPE.")
    batch, tokens, _ = x.shape
    documents = read_shard_documents(context, batch, tokens, x.device, **keywords)
    positions = None
    if has_rope and not buffers:
        positions = shard_positions(
            x, documents.lengths, context.layout, documents.local, context.ring_degree,
            context.ring_rank, context.ulysses_degree, context.ulysses_rank,
        )  # fmt: skip
    return Call(documents, positions, tokens * context.degree, None, buffers)


def _given(rope_buffers: dict[str, Tensor | None] | None) -> dict[str, Tensor]:
    return {name: b for name, b in (rope_buffers or {}).items() if b is not None}


def check_names(mixer: str, keywords: dict[str, Any], *known: tuple[str, ...]) -> None:
    """:raises TypeError: If a keyword of ``mixer.forward`` is none of those known."""
    names = ("x", "cu_doc_lens", *chain.from_iterable(known))
    for name in keywords:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(
                f"{mixer}.forward() got an unexpected keyword argument {name!r}.{hint} It takes "
                f"{', '.join(names)}."
            )


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
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise TypeError(
            f"The input is {x.dtype} and the layer {weight.dtype}. Cast one of them, or use "
            "torch.autocast."
        )


def fold(q: Tensor, k: Tensor, window: int, **lengths: Any) -> Segments:
    """The interface's seven length keywords, checked, as one value.

    :param q: ``(batch, t_q, ...)``.
    :param k: ``(batch, t_k, ...)``; where ``local_k_slice`` cuts the keys, what it leaves.
    :param window: In keys, or -1.
    :param lengths: The keywords, see :meth:`AttentionBackend.forward`.
    :raises ValueError: If keywords are missing, contradict each other or do not fit the tensors.
    :raises TypeError: If one is of the wrong type.
    """
    given = {name: value for name, value in lengths.items() if value is not None}
    if not given:
        return Segments.dense(q.shape[1], k.shape[1], window=window)
    differ = [name for name in _LENGTHS_OF_Q_AND_K if name in given]
    if "cu_doc_lens" in given and differ:
        raise ValueError(
            "Pass either cu_doc_lens (queries and keys alike) or cu_doc_lens_q with cu_doc_lens_k, "
            "not both."
        )
    if ("cu_doc_lens_q" in given) != ("cu_doc_lens_k" in given):
        raise ValueError("cu_doc_lens_q and cu_doc_lens_k are required together.")
    for bound, name in _BOUND_OF.items():
        if bound in given and name not in given:
            raise ValueError(
                f"{bound} was given without {name}, the lengths that it is about, and no document "
                f"would be masked. Pass {name} too."
            )
    total_q, total_k = (x.shape[0] * x.shape[1] for x in (q, k))
    if "cu_doc_lens" in given:
        cu = _checked(given["cu_doc_lens"], q, total_q, given.get("max_doc_len"), "cu_doc_lens")
        if total_k != total_q:
            raise ValueError(
                f"cu_doc_lens needs as many keys as queries, got {total_k} and {total_q}. Pass "
                "cu_doc_lens_q and cu_doc_lens_k instead."
            )
        return Segments.documents(
            cu, min(given.get("max_doc_len", total_q), total_q), window=window
        )

    cu_q, cu_k = given["cu_doc_lens_q"], given["cu_doc_lens_k"]
    max_q, max_k = given.get("max_doc_len_q"), given.get("max_doc_len_k")
    if getattr(cu_q, "shape", None) != getattr(cu_k, "shape", None):
        raise ValueError(
            "cu_doc_lens_q and cu_doc_lens_k must have one entry for each segment, got shapes "
            f"{getattr(cu_q, 'shape', None)} and {getattr(cu_k, 'shape', None)}."
        )
    cu_q = _checked(cu_q, q, total_q, max_q, "cu_doc_lens_q")
    cu_k = _checked(cu_k, q, total_k, max_k, "cu_doc_lens_k")
    max_q, max_k = total_q if max_q is None else max_q, total_k if max_k is None else max_k
    return Segments(cu_q, cu_k, max_q, max_k, True, window)


def _checked(cu: Tensor, like: Tensor, total: int, longest: int | None, name: str) -> Tensor:
    """Lengths as kernels take them: on the input's device, describing it, contiguous."""
    _check_device(cu, like, name)
    check_cu_doc_lens(cu, total, longest, name)
    return cu.contiguous()


def check_global(global_cu: Tensor | None, cu: Tensor | None, x: Tensor) -> None:
    """Without context parallelism the whole sequence is the input: its documents are the same."""
    if global_cu is None:
        return
    message = (
        "global_cu_doc_lens describes the whole sequence of a context-parallel shard, and this "
        "layer is not sharded: pass its documents as cu_doc_lens too."
    )
    if not isinstance(global_cu, Tensor) or cu is None or cu.shape != global_cu.shape:
        raise ValueError(message)
    _check_device(global_cu, x, "global_cu_doc_lens")
    same = (cu == global_cu).all()
    if cu.is_cuda or not can_be_read(cu):
        torch._assert_async(same, message)
    elif not same.item():
        raise ValueError(message)


def _check_rows(cu: Tensor, batch: int, tokens: int) -> None:
    """RoPE buffers give each row of the batch the same positions: no document may go on in the
    next row."""
    if batch == 1:
        return
    message = (
        "A document crosses from one row of the batch to the next, where RoPE buffers start anew. "
        "End documents with their rows, or leave out the buffers."
    )
    good = torch.isin(torch.arange(1, batch, device=cu.device) * tokens, cu).all()
    if cu.is_cuda or not can_be_read(cu):
        torch._assert_async(good, message)
    elif not good.item():
        raise ValueError(message)


def _check_device(lengths: Any, x: Tensor, name: str) -> None:
    if isinstance(lengths, Tensor) and lengths.device != x.device:
        raise ValueError(f"{name} must be on the input's device, {x.device}, got {lengths.device}.")
