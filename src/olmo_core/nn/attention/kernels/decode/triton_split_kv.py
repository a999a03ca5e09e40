"""Decoding on a GPU: one query token a row over a long cache, split along the keys.

A decoding step reads each cached key and value once and does next to nothing with them, so its time
is the cache's bytes over the memory bandwidth, if enough reads are in flight. One program therefore
takes *all* query heads of a kv head (each key is read once) and a *share* of the slots (so that a
small batch fills the GPU too); a second, tiny kernel merges the shares by their log-sum-exp, as in
"Flash-Decoding" (Dao et al., 2023). The first share also stores the new token, whose key it has at
hand: two launches for both. A compiled step stores it by torch's own ops, which compilers know.

How many shares is decided from shapes alone, and the position is read on the device: no
synchronisation, and one CUDA graph serves all lengths.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.decode.slots import store as store_token
from olmo_core.nn.attention.kernels.rows import rows
from olmo_core.nn.attention.kernels.triton_driver import multiprocessors, triton_refusal
from olmo_core.nn.dispatch import is_observed, on_its_device, register_inference

_MAX_GROUP = 128  # query heads of a kv head
_MAX_HEAD_DIM = 256
_MAX_SPLITS = 64
_MIN_SHARE = 256  # slots: below that, merging costs more than it wins
_PROGRAMS_PER_SM = 2  # resident at once: limited by the shared memory of the pipelined loads
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIB = torch.library.Library("olmo_core", "FRAGMENT")


def unsupported(q: Tensor, k_cache: Tensor) -> str | None:
    """Why the kernel can't serve these tensors, or None if it can.

    :param q: ``(B, 1, H, D)``.
    :param k_cache: ``(B, S, Hkv, D)``.
    """
    if (reason := triton_refusal(q)) is not None:
        return reason
    if q.dtype not in _DTYPES or k_cache.dtype != q.dtype:
        return f"q and the cache must share a dtype of {_DTYPES}, got {q.dtype}, {k_cache.dtype}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"head_dim is at most {_MAX_HEAD_DIM}, not {q.shape[3]}"
    group = q.shape[2] // k_cache.shape[2]
    if group > _MAX_GROUP:
        return f"at most {_MAX_GROUP} query heads a kv head fit, not {group}"
    return None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlen: Tensor,
    leftpad: Tensor,
    *,
    padded: bool,
    scale: float,
    window: int = -1,
    is_ring: bool = False,
) -> Tensor:
    """See :class:`.DecodeKernel`. Where somebody must see it, torch's own ops store the token."""
    seen = is_observed((q, k, v))
    out = split_kv(
        q, k, v, k_cache, v_cache, seqlen, leftpad,
        scale=scale, window=window, is_ring=is_ring, store=not seen,
    )  # fmt: skip
    if seen:
        store_token(k_cache, v_cache, k, v, seqlen, leftpad if padded else None, is_ring=is_ring)
    return out


def split_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlen: Tensor,
    leftpad: Tensor,
    *,
    scale: float,
    window: int = -1,
    is_ring: bool = False,
    store: bool = False,
) -> Tensor:
    """Attention of the next token of each row to itself and to a cache. Not differentiable.

    The token of position ``seqlen`` belongs into slot ``seqlen``; in a ring of S slots, which holds
    what a window of S sees, into slot ``(seqlen - leftpad[b]) % S``. Slots that are not seen are
    not read, so they may hold anything. A row whose token is still padding gives 0. A token for
    which no slot is left gives NaN, and is not stored.

    :param q: ``(B, 1, H, D)``.
    :param k: ``(B, 1, Hkv, D)``, in q's dtype.
    :param v: Like ``k``.
    :param k_cache: ``(B, S, Hkv, D)``, last dimension contiguous.
    :param v_cache: Like ``k_cache``.
    :param seqlen: Tokens before, padding included: int32 without dimensions, on the device.
    :param leftpad: ``(B,)``, int32, on the device.
    :param scale: Factor of the scores.
    :param window: How many keys a token sees at most where there is no ring; -1 for all.
    :param store: Also store the token, or zeros where it is padding; not under a compiler.
    :returns: ``(B, 1, H, D)``, contiguous.
    """
    run = _decode_and_store if store else _decode_op
    out: Tensor = run(q, k, v, k_cache, v_cache, seqlen, leftpad, scale, window, is_ring)
    return out


@lru_cache(maxsize=256)
def n_splits(programs: int, n_slots: int, multiprocessors: int) -> int:
    """Shares of the slots: the fewest that come within 5% of the best use of the GPU.

    ``programs`` are those of one share. Use is how full the last wave of programs is.
    """
    at_once = multiprocessors * _PROGRAMS_PER_SM
    most = max(1, min(_MAX_SPLITS, n_slots // _MIN_SHARE))
    use = {}
    for splits in range(1, most + 1):
        waves = programs * splits / at_once
        use[splits] = waves / math.ceil(waves)
    best = max(use.values())
    return next(splits for splits, u in use.items() if u >= 0.95 * best)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlen: Tensor,
    leftpad: Tensor,
    scale: float,
    window: int,
    is_ring: bool,
    store: bool = False,
) -> Tensor:
    from olmo_core.nn.attention.kernels.decode.triton_split_kv_kernels import launch

    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    q, k, v = rows(q, k, v)
    batch, slots, kv_heads, _ = k_cache.shape
    n_slots = slots if window < 0 else min(slots, window)
    splits = n_splits(batch * kv_heads, n_slots, multiprocessors(q.device))
    return launch(q, k, v, k_cache, v_cache, seqlen, leftpad, scale, window, is_ring, store, splits)


def _decode_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_LIB.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor seqlen, "
    "Tensor leftpad, float scale, SymInt window, bool is_ring) -> Tensor"
)
# On the CPU only under Triton's interpreter.
_decode_op = register_inference(_LIB, "decode", _decode, _decode_fake, keys=("CPU", "CUDA"))
# No op: Inductor of torch 2.11 miscompiles ops that write to views.
_decode_and_store = on_its_device(partial(_decode, store=True))
