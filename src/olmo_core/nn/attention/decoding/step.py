"""Attention over a cache: one token a row, or any number of them.

The cache changes last: what fails before leaves it as it was, and the call can be made again.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.kernels.decode import decode_kernel
from olmo_core.nn.dispatch import without_autocast


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCacheManager,
    *,
    scale: float,
    window: int,
    leftpad: Tensor | None = None,
) -> Tensor:
    """Store the next token of each row and attend to all that it sees.

    It computes in the cache's dtype, also under autocast: a cast would copy the cache.

    :param q: ``(batch, 1, n_heads, head_dim)``.
    :param k: ``(batch, 1, n_kv_heads, head_dim)``.
    :param v: Like ``k``.
    :param cache: Is one token longer afterwards. It must :meth:`~KVCacheManager.sees_one_range`.
    :param window: How many keys a query sees, or -1 for all.
    :param leftpad: The left padding that comes with a first token, ``(batch,)`` int32.
    :returns: Like ``q``, in the cache's dtype. A row that is still padding gives 0.
    """
    k_cache, v_cache = cache.k_cache, cache.v_cache
    dtype = k_cache.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    padded = leftpad is not None or cache.has_leftpad
    is_ring = cache.is_ring
    step = partial(
        decode_kernel(q, k_cache).decode, q, k, v, k_cache, v_cache, cache.cache_seqlens,
        cache.cache_leftpad if leftpad is None else leftpad, padded=padded,
        scale=scale, window=-1 if is_ring else window, is_ring=is_ring,
    )  # fmt: skip
    with without_autocast(q):
        out = step()
    cache.update_seqlen(1, leftpad)
    return out


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCacheManager,
    *,
    scale: float,
    window: int,
    kernel: str,
    leftpad: Tensor | None = None,
) -> Tensor:
    """:func:`decode_step` for any number of tokens a row, by a kernel of :func:`attend`.

    Under autocast it computes in its dtype, as without a cache, and gives that.

    :param kernel: One that serves the cache's dtype, under autocast autocast's.
    """
    n = q.shape[1]
    if not cache.is_ring:
        cache.append(k, v, leftpad)
    keys, values, segments = cache.problem(k, v, window, leftpad)
    out = attend(q.to(cache.dtype), keys, values, segments, scale=scale, kernel=kernel)
    if cache.is_ring:
        cache.append(k, v, leftpad)
    cache.update_seqlen(n, leftpad)
    return out
