"""Decoding on a GPU: a few query tokens over a long cache, split along the keys.

A decoding step reads each cached key and value once and does next to nothing with them, so its time
is the cache's bytes over the memory bandwidth, if enough reads are in flight. One program therefore
takes *all* query heads of a kv head (each key is read once) and a *share* of the slots (so that a
small batch fills the GPU too); a second, tiny kernel merges the shares by their log-sum-exp, as in
"Flash-Decoding" (Dao et al., 2023).

How many shares is decided from shapes alone, and the lengths are read on the device: no
synchronisation, and one CUDA graph serves all lengths.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.triton_driver import multiprocessors, triton_refusal
from olmo_core.nn.registration import register_inference

__all__ = ["MAX_QUERIES", "decode", "unsupported"]

MAX_QUERIES = 8
_MAX_ROWS = 128  # query tokens x query heads of a kv head
_MAX_HEAD_DIM = 256
_MAX_SPLITS = 64
_MIN_SHARE = 256  # slots: below that, merging costs more than it wins
_PROGRAMS_PER_SM = 2  # resident at once: limited by the shared memory of the pipelined loads
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIB = torch.library.Library("olmo_core", "FRAGMENT")


def unsupported(q: Tensor, k_cache: Tensor) -> str | None:
    """Why the kernel can't serve these tensors, or None if it can.

    :param q: ``(B, Tq, H, D)``.
    :param k_cache: ``(B, S, Hkv, D)``.
    """
    if (reason := triton_refusal(q)) is not None:
        return reason
    if q.dtype not in _DTYPES or k_cache.dtype != q.dtype:
        return f"q and the cache must share a dtype of {_DTYPES}, got {q.dtype}, {k_cache.dtype}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"head_dim is at most {_MAX_HEAD_DIM}, not {q.shape[3]}"
    rows = q.shape[1] * (q.shape[2] // k_cache.shape[2])
    if q.shape[1] > MAX_QUERIES or rows > _MAX_ROWS:
        return (
            f"at most {MAX_QUERIES} query tokens and {_MAX_ROWS} queries a kv head fit, got "
            f"{q.shape[1]} and {rows}"
        )
    return None


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    scale: float,
    window: int = -1,
) -> Tensor:
    """Attention of the newest ``Tq`` tokens over a cache that holds them. Not differentiable.

    Row ``b`` sees the slots ``[starts[b], ends[b])``. Causal from the bottom right: query ``i`` of
    ``Tq`` sees no slot from ``ends[b] - (Tq - 1 - i)`` on. Slots outside are not read, so they may
    hold anything. A query without slots gives 0.

    :param q: ``(B, Tq, H, D)``, ``Tq`` at most :data:`MAX_QUERIES`; last dimension contiguous.
    :param k_cache: ``(B, S, Hkv, D)``, last dimension contiguous.
    :param v_cache: Like ``k_cache``.
    :param starts: ``(B,)`` integers on the same device.
    :param ends: ``(B,)`` integers on the same device, at most ``S``.
    :param scale: Factor of the scores.
    :param window: How many slots a query sees at most, its own included; -1 for all.
    :returns: ``(B, Tq, H, D)``, contiguous.
    """
    out: Tensor = _decode_op(q, k_cache, v_cache, starts, ends, scale, window)
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
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    ends: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    from olmo_core.nn.attention.kernels.decode_triton_kernels import launch

    q, k_cache, v_cache = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache)
    )
    sms = multiprocessors(q.device)
    n_slots = k_cache.shape[1] if window < 0 else min(k_cache.shape[1], window + q.shape[1] - 1)
    splits = n_splits(k_cache.shape[0] * k_cache.shape[2], n_slots, sms)
    return launch(
        q, k_cache, v_cache, starts.contiguous(), ends.contiguous(), scale, window, splits
    )


def _decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    ends: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    return q.new_empty(q.shape)


_LIB.define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor ends, float scale, "
    "SymInt window) -> Tensor"
)
# On the CPU only under Triton's interpreter.
_decode_op = register_inference(_LIB, "decode", _decode, _decode_fake, keys=("CPU", "CUDA"))
