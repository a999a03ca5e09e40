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

from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.attention.kernels.decode.slots import store
from olmo_core.nn.attention.segments import Segments
from olmo_core.utils import runs_eagerly

__all__ = ["KVCacheManager"]


class KVCacheManager(DecodingCache):
    """The cache of one attention layer.

    Buffers, none of them in the state dict: ``k_cache`` and ``v_cache`` of shape
    ``(batch_size, slots, num_kv_heads, head_dim)``, ``cache_leftpad`` ``(batch_size,)`` int32, and
    ``cache_seqlens``, int32 without dimensions: the tokens of each row so far, padding included.

    What a query sees is the layer's business: its window counts, and a ring that is too short for
    it is refused.

    :param batch_size: Rows of the batch.
    :param max_seq_len: Most tokens of a row, left padding included.
    :param window: The most keys that a query will see, or -1 for all: a ring holds no more.
    :param max_rollback: Most tokens that :meth:`rollback` must be able to forget. It makes the ring
        of a window longer; without a window any number can be forgotten.
    :raises ValueError: If a size is wrong.
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
        super().__init__(batch_size, max_seq_len, max_rollback)
        if min(num_kv_heads, head_dim) < 1:
            raise ValueError(
                "A KV cache needs a key head and a dimension at least, got "
                f"num_kv_heads={num_kv_heads}, head_dim={head_dim}."
            )
        if window == 0 or window < -1:
            raise ValueError(f"A window is a positive number of keys, or -1, got {window}.")
        self.num_kv_heads, self.head_dim, self.window = num_kv_heads, head_dim, window
        self._make(batch_size, max_seq_len, torch.device(device), dtype)

    def _make(
        self, batch_size: int, max_seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        slots = max_seq_len
        if self.window > 0:
            slots = min(max_seq_len, self.window + self.max_rollback)
        kind = ((batch_size, slots, self.num_kv_heads, self.head_dim), dtype)
        self._allocate(batch_size, max_seq_len, device, {"k_cache": kind, "v_cache": kind})
        self.slots = slots
        self.is_ring = slots < max_seq_len
        """Whether old slots are written again."""
        self.most_restorable = self.max_rollback if self.is_ring else max_seq_len

    @property
    def device(self) -> torch.device:
        """Where the cache lies; it moves with the layer."""
        return self.k_cache.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.k_cache.dtype

    def check_call(self, k: Tensor, window: int, leftpad: Tensor | None = None) -> None:
        """Refuse new keys that this cache can't hold, or a layer's window that it can't serve.

        :param k: ``(batch, n, num_kv_heads, head_dim)``.
        :param window: How many keys a query sees, or -1 for all.
        :param leftpad: The left padding that comes with them.
        :raises ValueError: If they do not fit the cache.
        :raises RuntimeError: If it would overflow.
        """
        if self.is_ring and not 0 < window <= self.window:
            wanted = "all" if window < 0 else str(window)
            raise ValueError(
                f"The layer's queries see {wanted} keys, and this KV cache was built for a window "
                f"of {self.window}: the others are overwritten. Build it anew with "
                "init_kv_cache_manager."
            )
        batch, _, heads, dim = self.k_cache.shape
        if k.shape[0] != batch or k.shape[2:] != (heads, dim) or k.device != self.k_cache.device:
            raise ValueError(
                f"The KV cache was built for a batch of {batch} and keys of {heads} heads x {dim} "
                f"on {self.k_cache.device}, got {tuple(k.shape)} on {k.device}."
            )
        if leftpad is not None:
            self._check_leftpad(leftpad)
        if runs_eagerly(k.device):
            self.check_room(k.shape[1])

    def sees_one_range(self, window: int) -> bool:
        """Whether the slots that the next query sees are one range: not in a longer ring."""
        return not self.is_ring or self.slots == window

    def zero_cache(self) -> None:
        """Forget everything, and keep the memory."""
        super().reset()

    def is_reusable(self, batch_size: int, max_seq_len: int) -> bool:
        """Whether the memory serves that many rows and tokens as it is."""
        return batch_size == self.batch_size and max_seq_len <= self.max_seq_len

    def reallocate(self, batch_size: int, max_seq_len: int) -> None:
        """Start anew with memory for ``batch_size`` rows of ``max_seq_len`` tokens."""
        self._make(batch_size, max_seq_len, self.device, self.dtype)

    def reset(self, batch_size: int | None = None, max_seq_len: int | None = None) -> None:
        """Forget everything, and keep the memory if it is enough for the given sizes."""
        batch_size = self.batch_size if batch_size is None else batch_size
        max_seq_len = self.max_seq_len if max_seq_len is None else max_seq_len
        if self.is_reusable(batch_size, max_seq_len):
            self.zero_cache()
        else:
            self.reallocate(batch_size, max_seq_len)

    def _restore(self, n_tokens: int) -> None:
        """Slots past the position are never read, so there is nothing to put back."""

    def append(self, k: Tensor, v: Tensor, leftpad: Tensor | None = None) -> None:
        """Store ``(batch, n, num_kv_heads, head_dim)`` keys and values at the current position.

        Padding is stored as zeros. They count when :meth:`update_seqlen` says so.

        :param leftpad: The left padding that came with them, where they are the first.
        """
        store(
            self.k_cache, self.v_cache, k, v, self.cache_seqlens, self.padding_of(leftpad),
            is_ring=self.is_ring,
        )  # fmt: skip

    def problem(
        self, k: Tensor, v: Tensor, window: int, leftpad: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Segments]:
        """Any number of new queries over past keys and their own, as a varlen problem.

        It advances nothing and stores nothing, so without a ring, where past keys are not moved,
        :meth:`append` comes before; in a ring, where it overwrites some of them, after. Between the
        keys of two rows lie slots that nobody may see: they are segments without queries.

        :param window: How many keys a query sees, or -1 for all.
        :returns: Keys and values flattened to ``(1, batch * m, num_kv_heads, head_dim)``, and the
            segments, for queries flattened likewise. Queries that are padding see no key.
        """
        n = k.shape[1]
        leftpad = self.padding_of(leftpad)
        leftpad = self.cache_leftpad if leftpad is None else leftpad
        if self.is_ring:
            keys, values, first_position = self._past_window(k, v, window, leftpad)
            m = keys.shape[1]
            first = (leftpad - first_position).clamp(0, m)
            stop = torch.full_like(first, m)
        else:
            m = self.slots
            keys, values = self.k_cache, self.v_cache
            stop = (self.cache_seqlens + n).expand_as(leftpad)
            first = torch.minimum(leftpad, stop)
        rows = torch.arange(self.batch_size, device=self.device, dtype=torch.int32)
        ends_k = torch.stack([rows * m + first, rows * m + stop], dim=1).flatten()
        ends_q = torch.stack([rows * n, rows * n + n], dim=1).flatten()
        cu_k, cu_q = (
            torch.cat([e.new_zeros(1), e, e.new_full((1,), self.batch_size * size)]).int()
            for e, size in ((ends_k, m), (ends_q, n))
        )
        # A gap may hold the end of one row and the start of the next.
        segments = Segments(cu_q, cu_k, n, 2 * m, True, window)
        return keys.flatten(0, 1)[None], values.flatten(0, 1)[None], segments

    def _past_window(
        self, k: Tensor, v: Tensor, window: int, leftpad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The keys that new queries can see, in order of position, and the first one's position."""
        past = window - 1
        first_position = self.cache_seqlens - past
        position = first_position + torch.arange(past, device=self.device, dtype=torch.int32)
        slot = (position - leftpad[:, None]) % self.slots
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        keys = torch.cat([self.k_cache[rows, slot], k.to(self.dtype)], dim=1)
        values = torch.cat([self.v_cache[rows, slot], v.to(self.dtype)], dim=1)
        # Before the first token there is nothing: those keys lie before position 0.
        return keys, values, first_position
