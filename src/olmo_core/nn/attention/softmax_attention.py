"""What the softmax attention layers share: sizes, backend, cache, RoPE and ``w_out``."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.backend import (
    AttentionBackend,
    AttentionBackendName,
    AutoAttentionBackend,
)
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.inputs import Call, read_call
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNorm
from olmo_core.nn.linear import apply_linears
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from olmo_core.nn.attention.parallel.context import ContextParallel
    from olmo_core.nn.buffer_cache import BufferCache

__all__ = ["AttentionShape", "SoftmaxAttention"]


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of an attention layer, checked."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    @classmethod
    def of(
        cls, d_model: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None
    ) -> AttentionShape:
        """:raises OLMoConfigurationError: If the sizes do not fit together."""
        sizes = {
            "d_model": d_model,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            optional = name in ("n_kv_heads", "head_dim")
            if size is None and optional:
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise OLMoConfigurationError(f"{name} must be a positive int, got {size!r}.")
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads % n_kv_heads:
            raise OLMoConfigurationError(
                f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}."
            )
        if head_dim is None:
            if d_model % n_heads:
                raise OLMoConfigurationError(
                    f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}. Give "
                    "head_dim to use another width for the heads."
                )
            head_dim = d_model // n_heads
        return cls(d_model, n_heads, n_kv_heads, head_dim)


class SoftmaxAttention(SequenceMixer):
    """What the three variants share: the backend, the cache, the RoPE module and ``w_out``."""

    def __init__(
        self,
        shape: AttentionShape,
        *,
        bias: bool,
        rope: RoPEConfig | None,
        clip_qkv: float | None,
        dropout: float,
        softmax_scale: float | None,
        use_flash: bool | None,
        backend: AttentionBackendName | None,
        window_size: int | None,
        dtype: torch.dtype,
        init_device: str,
        cache: BufferCache | None,
    ):
        super().__init__()
        self.d_model, self.n_heads = shape.d_model, shape.n_heads
        self.n_kv_heads, self.head_dim = shape.n_kv_heads, shape.head_dim
        if clip_qkv is not None and not clip_qkv > 0:
            raise OLMoConfigurationError(f"clip_qkv must be positive, got {clip_qkv}.")
        if not 0.0 <= dropout < 1.0:
            raise OLMoConfigurationError(f"dropout must be in [0, 1), got {dropout}.")
        window = _checked_window(window_size)
        if softmax_scale is not None:
            _check_scale(softmax_scale)
        if not dtype.is_floating_point:
            raise OLMoConfigurationError(f"dtype must be a floating dtype, got {dtype}.")
        self.clip_qkv = clip_qkv
        if rope is not None and rope.no_global_rope and window_size is None:
            rope = None
        self.rope = None if rope is None else rope.build(shape.head_dim, cache=cache)
        self.backend: AttentionBackend = _backend_class(backend, use_flash)(
            head_dim=shape.head_dim,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            scale=softmax_scale,
            dropout_p=dropout,
            window_size=window,
            cache=cache,
            fallback=True,
        )
        self.kv_cache_manager: KVCacheManager | None = None
        self.w_out = nn.Linear(
            shape.n_heads * shape.head_dim, shape.d_model, bias, init_device, dtype
        )

    @property
    def dropout_p(self) -> float:
        """Dropout probability of attention weights, in training alone: the backend's. May be set.

        :raises OLMoConfigurationError: If it is set to what is no probability below 1.
        """
        return self.backend.dropout_p

    @dropout_p.setter
    def dropout_p(self, dropout_p: float) -> None:
        self.backend.dropout_p = dropout_p

    @property
    def window_size(self) -> int | None:
        """How many keys a query sees, its own included; None for all: the backend's. May be set,
        and a decoding cache that is too short for it is refused.

        :raises OLMoConfigurationError: If it is set to what is no positive int.
        """
        window = self.backend.window
        return None if window < 0 else window

    @window_size.setter
    def window_size(self, window_size: int | None) -> None:
        self.backend.window_size = _checked_window(window_size)

    @property
    def softmax_scale(self) -> float:
        """Factor of the scores: the backend's. May be set.

        :raises OLMoConfigurationError: If it is set to what is not positive.
        """
        return self.backend.scale

    @softmax_scale.setter
    def softmax_scale(self, softmax_scale: float) -> None:
        self.backend.scale = _check_scale(softmax_scale)

    def check_cp(self, context: ContextParallel) -> None:
        super().check_cp(context)
        self.backend.check_cp(context)

    def use_cp(self, context: ContextParallel) -> None:
        super().use_cp(context)
        self.backend.use_cp(context)

    def init_kv_cache_manager(
        self, batch_size: int, max_seq_len: int, *, max_rollback: int = 0
    ) -> None:
        """Initialize the kv cache manager for attention. When the kv cache manager exists, kv
        caching will be used during the forward pass. This should only be called during inference.

        :param batch_size: The batch size for the cache.
        :param max_seq_len: The maximum sequence length for the cache, left padding included.
        :param max_rollback: Most tokens that the cache must be able to forget again.
        :raises RuntimeError: If the backend does not support KV caching, or the layer is sharded.
        """
        self.refuse_cache_under_cp()
        self.backend.assert_supports_kv_cache()
        self.kv_cache_manager = KVCacheManager(
            batch_size,
            max_seq_len,
            self.backend.n_kv_heads,
            self.backend.head_dim,
            self.w_out.weight.device,
            self.w_out.weight.dtype,
            window=self.backend.window,
            max_rollback=max_rollback,
        )
        if self.rope is not None:
            self.rope.warmup_cache(max_seq_len, self.w_out.weight.device)

    def check_tp(self, place: TensorParallel) -> None:
        super().check_tp(place)
        self.backend.check_tp(place.degree)

    def use_tp(self, place: TensorParallel) -> None:
        super().use_tp(place)
        self.backend.use_tp(place.degree, place.rank)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, **lengths: Any) -> Tensor:
        """Attention proper: :meth:`AttentionBackend.forward` of ``(q, k, v)``."""
        return self.backend((q, k, v), **lengths)

    def _attend(self, qkv: Tensor | tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        if self.kv_cache_manager is not None:
            return self.backend(
                qkv, kv_cache_manager=self.kv_cache_manager, cache_leftpad=call.cache_leftpad
            )
        return self.backend(qkv, segments=call.segments)

    def _read(self, x: Tensor, **keywords: Any) -> Call:
        """The call that :meth:`forward`'s keywords describe."""
        return read_call(
            x,
            weight=self.w_out.weight,
            d_model=self.d_model,
            window=self.backend.window,
            has_rope=self.rope is not None,
            cache=self.kv_cache_manager,
            parameters=self.parameters(),
            context=self.context,
            tensor_parallel=self.tensor_parallel,
            **keywords,
        )

    def _output(self, att: Tensor, call: Call) -> Tensor:
        (out,) = apply_linears((self.w_out,), att)
        return out if call.padding is None else out.masked_fill(call.padding[..., None], 0.0)

    def _linears(self) -> list[nn.Linear]:
        """The projections, ``w_out`` last."""
        linears = [m for m in self.children() if isinstance(m, nn.Linear)]
        return sorted(linears, key=lambda linear: linear is self.w_out)

    @torch.no_grad()
    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the weights anew: see :class:`InitMethod`. Norms start as the identity."""
        init_method = InitMethod(init_method)
        for linear in self._linears():
            init_method.init_linear_(
                linear.weight,
                linear.bias,
                d_model=d_model,
                block_idx=block_idx,
                num_blocks=num_blocks,
                std=std,
                output=linear is self.w_out,
                generator=generator,
            )
        self._reset_scales()

    def _reset_scales(self) -> None:
        """Put norms and other learned scales where they start."""
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.reset_parameters()

    def num_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token of forward and backward at length ``seq_len``.

        This accounts for the linear projections (Q, K, V, output, and gating if enabled), 6 per
        weight, and for the attention computation (QK^T and softmax(QK^T) @ V), 12 per head
        dimension and key, of which there are no more than the window. A multiply-add counts as two,
        the backward pass as twice the forward; the causal half is not taken off.
        """
        weights = sum(linear.weight.numel() for linear in self._linears())
        keys = seq_len if self.window_size is None else min(self.window_size, seq_len)
        return 6 * weights + 12 * self.n_heads * self.head_dim * keys


def _checked_window(window_size: int | None) -> tuple[int, int]:
    """The backend's form of a window of keys."""
    if window_size is None:
        return -1, -1
    if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
        raise OLMoConfigurationError(
            f"window_size must be a positive number of keys, got {window_size!r}. Leave it out "
            "for full attention."
        )
    return window_size - 1, 0


def _check_scale(softmax_scale: float) -> float:
    if not 0 < softmax_scale < math.inf:
        raise OLMoConfigurationError(f"softmax_scale must be positive, got {softmax_scale}.")
    return softmax_scale


def _backend_class(
    backend: AttentionBackendName | None, use_flash: bool | None
) -> type[AttentionBackend]:
    if use_flash:
        warnings.warn(
            "use_flash is deprecated, use backend='flash_2' instead.",
            DeprecationWarning,
            stacklevel=4,
        )
        if backend not in (None, AttentionBackendName.flash_2):
            raise OLMoConfigurationError(
                f"use_flash=True means backend='flash_2', but backend='{backend}' was given. Leave "
                "use_flash out."
            )
        backend = AttentionBackendName.flash_2
    if backend is None:
        return AutoAttentionBackend
    try:
        return AttentionBackendName(backend).get_class()
    except ValueError:
        raise OLMoConfigurationError(
            f"There is no attention backend {backend!r}. Choose one of "
            f"{', '.join(AttentionBackendName)}."
        ) from None
