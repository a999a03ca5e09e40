"""What every backend does with a call: one kernel applied to whatever attention is asked for.

Documents, windows, caches, packed inputs and shards are folded into :class:`Segments` or a schedule
here, once for all backends; what a backend can't do is in :mod:`.capabilities`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.base import SharesSequences
from olmo_core.nn.attention.capabilities import (
    CAPABILITIES,
    Environment,
    feature_reasons,
    installation_reasons,
)
from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.decoding.step import decode_step, extend
from olmo_core.nn.attention.inputs import check_global, fold
from olmo_core.nn.attention.kernels.softmax import Capabilities, Feature
from olmo_core.nn.attention.parallel.agreement import announce_errors
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.documents import (
    ShardDocuments,
    lengths_of,
    read_shard_documents,
)
from olmo_core.nn.attention.parallel.plan import WHOLE
from olmo_core.nn.attention.parallel.schedule import attend_sharded, refuse_dropout
from olmo_core.nn.attention.parallel.ulysses import check_heads
from olmo_core.nn.attention.segments import Segments
from olmo_core.nn.attention.selection import kernel_for, refusal
from olmo_core.nn.dispatch import autocast_dtype
from olmo_core.utils import compile_time_constant

if TYPE_CHECKING:
    from olmo_core.nn.buffer_cache import BufferCache


class ScaledDotProductAttention(SharesSequences):
    """Causal scaled dot-product attention (SDPA) over the kernel that ``name`` says.

    :param head_dim: The dimension of a head.
    :param n_heads: The query heads.
    :param n_kv_heads: The key and value heads, if different.
    :param scale: Factor of the scores; ``head_dim ** -0.5`` if not given.
    :param dropout_p: Probability of dropping an attention weight, in training alone.
    :param window_size: How many keys before and after its own a query sees, ``(left, right)``, as
        in flash-attention: ``(-1, -1)`` for all before, ``(W - 1, 0)`` for a window of W keys.
    :param cache: Unused; backends keep no buffers.
    :param fallback: On a machine without a GPU, warn and use torch instead of raising.
    :raises RuntimeError: If the backend can't run on this machine.
    """

    name: ClassVar[str | None] = None
    _stream: int = 0
    """Of dropout's random numbers: each rank's own where ranks share the heads."""

    def __init__(
        self,
        *,
        head_dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        cache: BufferCache | None = None,
        fallback: bool = False,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if min(head_dim, n_heads, n_kv_heads) < 1 or n_heads % n_kv_heads:
            raise OLMoConfigurationError(
                "A backend needs positive sizes and a multiple of n_kv_heads as n_heads, got "
                f"head_dim={head_dim}, n_heads={n_heads}, n_kv_heads={n_kv_heads}."
            )
        self.head_dim, self.n_heads, self.n_kv_heads = head_dim, n_heads, n_kv_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout_p = dropout_p
        self.window_size = window_size
        self.fallback = fallback
        if not (fallback and Environment.detect().compute_capability is None):
            self.assert_supported()

    @property
    def dropout_p(self) -> float:
        """Probability of dropping an attention weight, in training alone. May be set."""
        return self._dropout_p

    @dropout_p.setter
    def dropout_p(self, dropout_p: float) -> None:
        if not 0.0 <= dropout_p < 1.0:
            raise OLMoConfigurationError(f"dropout_p must be in [0, 1), got {dropout_p}.")
        self._dropout_p = dropout_p

    @property
    def window_size(self) -> tuple[int, int]:
        """How many keys before and after its own a query sees. May be set."""
        return (-1, -1) if self._window < 0 else (self._window - 1, 0)

    @window_size.setter
    def window_size(self, window_size: tuple[int, int]) -> None:
        left, right = window_size if isinstance(window_size, tuple | list) else (None, None)
        if left is None or not (left >= -1 and (right == 0 or (left, right) == (-1, -1))):
            raise OLMoConfigurationError(
                "Attention is causal, so window_size is (-1, -1) for no window or (W - 1, 0) for a "
                f"window of W keys, got {window_size}."
            )
        self._window = left + 1 if left >= 0 else -1

    @property
    def window(self) -> int:
        """How many keys a query sees, its own included; -1 for all."""
        return self._window

    def extra_repr(self) -> str:
        window = "" if self.window < 0 else f", window={self.window}"
        return f"{self.n_heads}/{self.n_kv_heads} heads x {self.head_dim}{window}"

    @classmethod
    def assert_supported(cls) -> None:
        """Validates that this backend is supported on the current system.

        :raises RuntimeError: With every reason, if it is not.
        """
        if reasons := installation_reasons(cls._capabilities(), Environment.detect()):
            raise RuntimeError(refusal(cls._capabilities().name, reasons))

    @classmethod
    def _assert_feature(cls, feature: Feature) -> None:
        if reasons := feature_reasons(cls._capabilities(), [feature]):
            raise RuntimeError(refusal(cls._capabilities().name, reasons))

    @classmethod
    def _capabilities(cls) -> Capabilities:
        """The table's row. A backend that states no capability has none."""
        if cls.name is None:
            raise RuntimeError(
                f"{cls.__name__} has no name, so no row in the table of capabilities, and supports "
                "nothing. Set name to an AttentionBackendName."
            )
        return CAPABILITIES[cls.name]

    def check_tp(self, degree: int) -> None:
        """:raises ValueError: If Ulysses can't deal the heads that ``degree`` ranks have each."""
        if self.context is not None and self.context.ulysses_group:
            n_heads, n_kv_heads = self.n_heads // degree, self.n_kv_heads // degree
            check_heads(n_heads, n_kv_heads, self.context.ulysses_degree)

    def use_tp(self, degree: int, rank: int) -> None:
        """Have the heads of one of ``degree`` ranks, and a stream of random numbers for them."""
        self.n_heads, self.n_kv_heads = self.n_heads // degree, self.n_kv_heads // degree
        self._stream = 1 + rank

    def check_cp(self, context: ContextParallel) -> None:
        """The errors of :meth:`apply_cp`, before anything is changed."""
        super().check_cp(context)
        if context.layout != WHOLE:
            self._assert_feature(Feature.ring_cp)
            refuse_dropout(self.dropout_p)
        if context.ulysses_group:
            self._assert_feature(Feature.ulysses_cp)
            check_heads(self.n_heads, self.n_kv_heads, context.ulysses_degree)

    def forward(
        self,
        qkv: Tensor | tuple[Tensor, Tensor, Tensor],
        cu_doc_lens: Tensor | None = None,
        cu_doc_lens_q: Tensor | None = None,
        cu_doc_lens_k: Tensor | None = None,
        max_doc_len: int | None = None,
        max_doc_len_q: int | None = None,
        max_doc_len_k: int | None = None,
        local_k_slice: slice | None = None,
        kv_cache_manager: KVCacheManager | None = None,
        *,
        global_cu_doc_lens: Tensor | None = None,
        segments: Segments | ShardDocuments | None = None,
        cache_leftpad: Tensor | None = None,
    ) -> Tensor:
        """Run the attention operation.

        After :meth:`apply_cp` the inputs are this rank's shard, and the lengths what the load
        balancer returned with it.

        :param qkv: Queries ``(batch, seq, n_heads, head_dim)``, keys and values ``(batch, seq_k,
            n_kv_heads, head_dim)``; or all three packed, ``(batch, seq, 3, n_heads, head_dim)``.
        :param cu_doc_lens: Ends of the documents in the flattened batch, int32, first element 0.
        :param cu_doc_lens_q: Where queries and keys differ, the ends of the query segments. Each
            segment is causal from the bottom right.
        :param cu_doc_lens_k: The ends of the key segments.
        :param max_doc_len: An upper bound of the longest document; ``_q`` and ``_k`` likewise.
        :param local_k_slice: The part of the flattened keys that ``cu_doc_lens_k`` describes.
        :param kv_cache_manager: Attend to the cached keys too, and store the new ones.
        :param global_cu_doc_lens: Of the whole sequence, under context parallelism.
        :param segments: All the keywords before, checked and folded into one value; instead of
            them.
        :param cache_leftpad: With the first tokens of a cache, how many of each row are padding,
            ``(batch,)`` int32.
        :returns: ``(batch, seq, n_heads, head_dim)``.
        :raises ValueError: If inputs do not fit together.
        :raises RuntimeError: If the backend can't serve the call; the message has every reason.
        """
        lengths: dict[str, Any] = {
            "cu_doc_lens": cu_doc_lens,
            "cu_doc_lens_q": cu_doc_lens_q,
            "cu_doc_lens_k": cu_doc_lens_k,
            "max_doc_len": max_doc_len,
            "max_doc_len_q": max_doc_len_q,
            "max_doc_len_k": max_doc_len_k,
            "local_k_slice": local_k_slice,
            "global_cu_doc_lens": global_cu_doc_lens,
        }
        given = [name for name, value in lengths.items() if value is not None]
        if self.context is not None:
            if kv_cache_manager is not None:
                raise RuntimeError(
                    "A KV cache holds whole sequences, and apply_cp has sharded this backend. "
                    "Generate from a model that is not sharded."
                )
            return self._attend_on_shard(qkv, self.context, segments, lengths)
        q, k, v = self._unpack(qkv)
        if kv_cache_manager is not None:
            if given or segments is not None:
                raise ValueError(
                    "A KV cache holds one document a row, so it can't be used with "
                    f"{', '.join(given) or 'segments'}. Prefill each document as a row, padded on "
                    "the left."
                )
            return self._cached(q, k, v, kv_cache_manager, cache_leftpad)
        if cache_leftpad is not None:
            raise ValueError(
                "A backend takes cache_leftpad with a KV cache alone. Without one, make the "
                "padding documents of their own in cu_doc_lens."
            )
        packed = isinstance(qkv, Tensor)
        if isinstance(segments, ShardDocuments):
            raise TypeError("segments of a shard were given to a backend without apply_cp.")
        if segments is not None:
            if given:
                raise ValueError(f"Pass either segments or {', '.join(given)}, not both.")
            return self._attend(q, k, v, segments, packed)
        check_global(lengths.pop("global_cu_doc_lens"), cu_doc_lens, q)
        if local_k_slice is not None:
            k, v = (x.flatten(0, 1)[None, local_k_slice] for x in (k, v))
        return self._attend(q, k, v, fold(q, k, self._window, **lengths), packed)

    def _unpack(self, qkv: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(qkv, Tensor):
            if qkv.dim() != 5 or qkv.shape[2] != 3:
                raise ValueError(
                    "Packed qkv must have shape (batch, seq, 3, n_heads, head_dim), got "
                    f"{tuple(qkv.shape)}."
                )
            q, k, v = qkv.unbind(2)
        else:
            q, k, v = qkv
        sizes = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        for name, x, heads in zip("qkv", (q, k, v), sizes):
            if x.dim() != 4 or x.shape[2:] != (heads, self.head_dim):
                raise ValueError(
                    f"{name} must have shape (batch, seq, {heads}, {self.head_dim}), got "
                    f"{tuple(x.shape)}."
                )
            if not x.numel():
                raise ValueError(f"{name} is empty: shape {tuple(x.shape)}.")
        return q, k, v

    def _kernel(self, q: Tensor, wants_gradient: bool, *features: Feature) -> str:
        """The kernel for a call that asks for ``features``."""
        dtype = q.dtype
        if (autocast := autocast_dtype(q)) is not None and dtype != torch.float64:
            dtype = autocast
        if self._window >= 0:
            features = (*features, Feature.window)
        if wants_gradient:
            features = (*features, Feature.backward)
        if torch.are_deterministic_algorithms_enabled():
            features = (*features, Feature.deterministic)
        name = None if self.name is None else str(self.name)
        asked = tuple(f.value for f in features)
        return kernel_for(name, q.device, dtype, self.head_dim, asked, self.fallback)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, packed: bool = False
    ) -> Tensor:
        dropout_p = self._dropout_p if self.training else 0.0
        wants_gradient = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad
        )
        asked = (
            (Feature.documents, segments.cu_q is not None),
            (Feature.left_padding, segments.padded),
            (Feature.packed_qkv, packed),
            (Feature.dropout, dropout_p > 0),
        )
        kernel = self._kernel(q, wants_gradient, *(f for f, wanted in asked if wanted))
        return attend(
            q, k, v, segments, scale=self.scale, dropout_p=dropout_p, kernel=kernel,
            stream=self._stream,
        )  # fmt: skip

    def _attend_on_shard(
        self,
        qkv: Tensor | tuple[Tensor, Tensor, Tensor],
        context: ContextParallel,
        documents: Segments | ShardDocuments | None,
        lengths: dict[str, Any],
    ) -> Tensor:
        device = (qkv if isinstance(qkv, Tensor) else qkv[0]).device
        named = documents.lengths if isinstance(documents, ShardDocuments) else lengths_of(lengths)
        with announce_errors(named, device, context.everyone):
            q, k, v = self._unpack(qkv)
            if documents is None:
                documents = read_shard_documents(context, q.shape[0], q.shape[1], device, **lengths)
            if not isinstance(documents, ShardDocuments):
                raise ValueError("After apply_cp a backend takes a shard's lengths, not segments.")
            dropout_p = self._dropout_p if self.training else 0.0
            wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            in_ring = context.layout != WHOLE
            asked = (
                (Feature.documents, in_ring or documents.lengths is not None),
                (Feature.lse, in_ring and context.rotates(self._window)),
                (Feature.ring_cp, in_ring),
                (Feature.ulysses_cp, context.ulysses_degree > 1),
                (Feature.packed_qkv, isinstance(qkv, Tensor)),
                (Feature.dropout, dropout_p > 0),
            )
            kernel = self._kernel(q, wants_gradient, *(f for f, wanted in asked if wanted))
        return attend_sharded(
            q, k, v, context, documents.lengths, local=documents.local, longest=documents.longest,
            window=self._window, scale=self.scale, dropout_p=dropout_p, kernel=kernel,
            stream=self._stream,
        )  # fmt: skip

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCacheManager, leftpad: Tensor | None
    ) -> Tensor:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError(
                "A KV cache is for inference: cached keys have no gradient. Call the model under "
                "torch.no_grad() or torch.inference_mode(), or set kv_cache_manager = None."
            )
        if self.training and self._dropout_p:
            raise RuntimeError("A KV cache is for inference: call eval(), which ends dropout.")
        if q.shape[:2] != k.shape[:2]:
            raise ValueError(
                "With a KV cache there are as many new keys as queries, got q "
                f"{tuple(q.shape)} and k {tuple(k.shape)}."
            )
        window, scale = self._window, self.scale
        one_range = q.shape[1] == 1 and cache.sees_one_range(window)
        cache.check_call(k, window, leftpad)
        padded = leftpad is not None or cache.has_leftpad
        if one_range:
            _ask_for_a_step(self.name or "torch", padded, window > 0)
            out = decode_step(q, k, v, cache, scale=scale, window=window, leftpad=leftpad)
        else:
            features = (Feature.documents, Feature.kv_cache, Feature.left_padding)
            kernel = self._kernel(q.to(cache.dtype), False, *features[: 2 + padded])
            out = extend(q, k, v, cache, scale=scale, window=window, kernel=kernel, leftpad=leftpad)
        if (autocast := autocast_dtype(q)) is not None and q.dtype != torch.float64:
            return out.to(autocast)
        return out.to(q.dtype)


_SERVED_STEPS: set[tuple[str, bool, bool]] = set()
"""What rows have been asked and had: they do not change in a process."""


@compile_time_constant
def _ask_for_a_step(row: str, padded: bool, windowed: bool) -> None:
    """:raises RuntimeError: If a row of the table lacks what one token over a cache needs."""
    if (row, padded, windowed) in _SERVED_STEPS:
        return
    asked = {Feature.kv_cache: True, Feature.left_padding: padded, Feature.window: windowed}
    if reasons := feature_reasons(CAPABILITIES[row], [f for f, wanted in asked.items() if wanted]):
        raise RuntimeError(refusal(row, reasons))
    _SERVED_STEPS.add((row, padded, windowed))
