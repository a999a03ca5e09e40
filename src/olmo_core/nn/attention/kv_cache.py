"""Keys and values of past tokens, for decoding.

Rows advance together; shorter ones are padded on the left, and their padding is never attended to.
A layer without a window keeps the token of position ``p`` in slot ``p``. A layer with a window
keeps only what later tokens can see, in a ring: the token of position ``p`` goes to slot
``(p - leftpad) % size``. So in both, the keys of a row are one contiguous range of slots, which is
all that a kernel has to know. Positions live on the device: a step reads nothing on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_core.nn.attention.base import DecodingCache
from olmo_core.nn.attention.segments import Segments
from olmo_core.utils import runs_eagerly

__all__ = ["KVCacheManager"]


class KVCacheManager(DecodingCache):
    """The cache of one attention layer.

    Buffers, none of them in the state dict: ``k_cache`` and ``v_cache`` of shape
    ``(batch_size, slots, num_kv_heads, head_dim)``, ``cache_leftpad`` ``(batch_size,)`` int32, and
    ``cache_seqlens``, int32 without dimensions: the tokens of each row so far, padding included.

    :param batch_size: Rows of the batch.
    :param max_seq_len: Most tokens of a row, left padding included.
    :param window: How many keys a query sees, or -1 for all.
    :param max_rollback: Most tokens that :meth:`rollback` must be able to forget. It makes the ring
        of a window longer; without a window any number can be forgotten.
    """

    k_cache: Tensor
    v_cache: Tensor

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        *,
        window: int = -1,
        max_rollback: int = 0,
    ):
        super().__init__()
        if max_rollback < 0:
            raise ValueError(f"max_rollback must not be negative, got {max_rollback}.")
        if min(num_kv_heads, head_dim) < 1:
            raise ValueError(
                "A KV cache needs a key head and a dimension at least, got "
                f"num_kv_heads={num_kv_heads}, head_dim={head_dim}."
            )
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.window, self.max_rollback = window, max_rollback
        self._allocate(batch_size, max_seq_len, torch.device(device), dtype)

    def _allocate(
        self, batch_size: int, max_seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if batch_size < 1 or max_seq_len < 1:
            raise ValueError(
                "A KV cache needs room for a row and a token at least, got "
                f"batch_size={batch_size}, max_seq_len={max_seq_len}."
            )
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        slots = max_seq_len if self.window < 0 else self.window + self.max_rollback
        self.slots = min(max_seq_len, slots)
        shape = (batch_size, self.slots, self.num_kv_heads, self.head_dim)
        # Buffers made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            for name in ("k_cache", "v_cache"):
                buffer = torch.zeros(shape, device=device, dtype=dtype)
                self.register_buffer(name, buffer, persistent=False)
            for name, size in (("cache_leftpad", (batch_size,)), ("cache_seqlens", ())):
                counter = torch.zeros(size, device=device, dtype=torch.int32)
                self.register_buffer(name, counter, persistent=False)
        self.host_seqlen = 0
        self.has_leftpad = False

    @property
    def device(self) -> torch.device:
        """Where the cache lies; it moves with the layer."""
        return self.k_cache.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.k_cache.dtype

    @property
    def is_ring(self) -> bool:
        """Whether old slots are written again."""
        return self.slots < self.max_seq_len

    @property
    def one_range(self) -> bool:
        """Whether the slots that the next query sees are one range: not in a longer ring."""
        return not (self.is_ring and self.max_rollback)

    def update_seqlen(self, n_tokens: int) -> None:
        """Advance all rows by ``n_tokens`` on the device."""
        self.cache_seqlens.add_(n_tokens)

    def rollback(self, n_tokens: int) -> None:
        """See :meth:`DecodingCache.rollback`."""
        if not 0 <= n_tokens <= self.host_seqlen:
            raise ValueError(f"Can't forget {n_tokens} of {self.host_seqlen} tokens.")
        if self.is_ring and n_tokens > self.max_rollback:
            raise ValueError(
                f"A window of {self.window} keys was built to forget at most "
                f"{self.max_rollback} tokens, not {n_tokens}. Raise max_rollback."
            )
        self.host_seqlen -= n_tokens
        self.cache_seqlens.sub_(n_tokens)

    def zero_cache(self) -> None:
        """Forget everything, and keep the memory."""
        for buffer in (self.k_cache, self.v_cache, self.cache_leftpad, self.cache_seqlens):
            buffer.zero_()
        self.host_seqlen, self.has_leftpad = 0, False

    def is_reusable(self, batch_size: int, max_seq_len: int) -> bool:
        """Whether the memory serves that many rows and tokens as it is."""
        return batch_size == self.batch_size and max_seq_len <= self.max_seq_len

    def reallocate(self, batch_size: int, max_seq_len: int) -> None:
        """Start anew with memory for ``batch_size`` rows of ``max_seq_len`` tokens."""
        self._allocate(batch_size, max_seq_len, self.device, self.dtype)

    def reset(self, batch_size: int | None = None, max_seq_len: int | None = None) -> None:
        """Forget everything, and keep the memory if it is enough for the given sizes."""
        batch_size = self.batch_size if batch_size is None else batch_size
        max_seq_len = self.max_seq_len if max_seq_len is None else max_seq_len
        if self.is_reusable(batch_size, max_seq_len):
            self.zero_cache()
        else:
            self.reallocate(batch_size, max_seq_len)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store ``(batch, n, num_kv_heads, head_dim)`` keys and values at the current position.

        Padding is stored as zeros. :meth:`update_seqlen` comes after.
        """
        skipped = max(0, k.shape[1] - self.slots)
        k, v = k[:, skipped:], v[:, skipped:]
        index = torch.arange(skipped, skipped + k.shape[1], device=self.device, dtype=torch.int32)
        position = self.cache_seqlens + index
        if self.has_leftpad:
            position = position - self.cache_leftpad[:, None]  # (batch, n) from here on
            padding = (position < 0)[..., None, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
            slot = position % self.slots if self.is_ring else position + self.cache_leftpad[:, None]
            rows = torch.arange(self.batch_size, device=self.device)[:, None]
            self.k_cache[rows, slot] = k.to(self.dtype)
            self.v_cache[rows, slot] = v.to(self.dtype)
        else:
            slot = position % self.slots if self.is_ring else position
            self.k_cache.index_copy_(1, slot.long(), k.to(self.dtype))
            self.v_cache.index_copy_(1, slot.long(), v.to(self.dtype))

    def visible_slots(self) -> tuple[Tensor, Tensor, int]:
        """The slots that one query sees after :meth:`append` and :meth:`update_seqlen`.

        :returns: The first of each row and the one after the last, ``(batch,)`` int32; and an upper
            bound of the latter.
        """
        assert self.one_range
        first, stop = self.cache_leftpad, self.cache_seqlens.expand_as(self.cache_leftpad)
        if self.is_ring:
            first, stop = torch.zeros_like(first), (stop - first).clamp(0, self.slots)
        elif self.window > 0:
            first = torch.maximum(first, stop - self.window)
        return torch.minimum(first, stop), stop, self._slots_in_use()

    def _slots_in_use(self) -> int:
        """An upper bound. Reading the position costs nothing on a CPU, and a wait on a GPU."""
        if self.device.type == "cpu" and runs_eagerly(self.device):
            return min(self.slots, int(self.cache_seqlens))
        return self.slots

    def problem(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Segments]:
        """Any number of new queries over past keys and their own, as a varlen problem.

        Stores ``k`` and ``v`` and advances. Between the keys of two rows lie slots that nobody may
        see: they are segments without queries.

        :returns: Keys and values flattened to ``(1, batch * m, num_kv_heads, head_dim)``, and the
            segments, for queries flattened likewise. Queries that are padding see no key.
        """
        n = k.shape[1]
        end = self.cache_seqlens + n
        if self.is_ring:
            keys, values, first_position = self._past_window(k, v)
            self.append(k, v)
            m = keys.shape[1]
            first = (self.cache_leftpad - first_position).clamp(0, m)
            stop = torch.full_like(first, m)
        else:
            self.append(k, v)
            m = self.slots
            keys, values = self.k_cache, self.v_cache
            stop = end.expand_as(self.cache_leftpad)
            first = torch.minimum(self.cache_leftpad, stop)
        self.update_seqlen(n)
        rows = torch.arange(self.batch_size, device=self.device, dtype=torch.int32)
        ends_k = torch.stack([rows * m + first, rows * m + stop], dim=1).flatten()
        ends_q = torch.stack([rows * n, rows * n + n], dim=1).flatten()
        cu_k, cu_q = (
            torch.cat([e.new_zeros(1), e, e.new_full((1,), self.batch_size * size)]).int()
            for e, size in ((ends_k, m), (ends_q, n))
        )
        # A gap may hold the end of one row and the start of the next.
        segments = Segments(cu_q, cu_k, n, 2 * m, True, self.window)
        return keys.flatten(0, 1)[None], values.flatten(0, 1)[None], segments

    def _past_window(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The keys that new queries can see, in order of position, and the first one's position."""
        past = self.window - 1
        first_position = self.cache_seqlens - past
        position = first_position + torch.arange(past, device=self.device, dtype=torch.int32)
        slot = (position - self.cache_leftpad[:, None]) % self.slots
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        keys = torch.cat([self.k_cache[rows, slot], k.to(self.dtype)], dim=1)
        values = torch.cat([self.v_cache[rows, slot], v.to(self.dtype)], dim=1)
        # Before the first token there is nothing: those keys lie before position 0.
        return keys, values, first_position
