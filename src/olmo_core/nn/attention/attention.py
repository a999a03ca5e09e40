"""The softmax attention layers.

A tensor's way: ``x`` -> projections -> clip -> qk-norm and RoPE -> backend -> gate -> ``w_out``.

Shapes in comments: B batch, T tokens, H query heads, G key and value heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.backend import AttentionBackendName
from olmo_core.nn.attention.gate import GateConfig, apply_gate
from olmo_core.nn.attention.inputs import Call
from olmo_core.nn.attention.qk import normalize_and_rotate
from olmo_core.nn.attention.softmax_attention import AttentionShape, SoftmaxAttention
from olmo_core.nn.functional import l2_normalize
from olmo_core.nn.layer_norm import LayerNorm, LayerNormConfig
from olmo_core.nn.linear import apply_linear, apply_linears
from olmo_core.nn.rope import RoPEConfig, RoPEType
from olmo_core.nn.sharded import local
from olmo_core.nn.tensor_parallel import TensorParallelTable

if TYPE_CHECKING:
    from olmo_core.nn.buffer_cache import BufferCache

__all__ = ["Attention", "NormalizedAttention"]


class Attention(SoftmaxAttention):
    """An implementation of multi-head self-attention with support for multi-query (MQA) and
    grouped-query (GQA) attention.

    Intra-document masking is also supported by passing in the ``max_doc_len`` and ``cu_doc_lens``
    parameters to :meth:`forward`.

    .. seealso:: :class:`FusedAttention` if you're not using MQA or GQA.

    :param d_model: The model hidden size.
    :param n_heads: The number of attention heads.
    :param n_kv_heads: The number of key and value heads, if different.
    :param head_dim: The dimension of a head, if not ``d_model // n_heads``.
    :param bias: Include biases with linear layers.
    :param gate: Configuration for attention gating. If ``None``, no gating is applied.
    :param rope: The config for RoPE, if RoPE should be used.
    :param clip_qkv: Clip QKV to this value, if set.
    :param qk_norm: Configuration of a layer norm for queries and keys.
    :param dropout: Dropout probability of attention weights, in training alone.
    :param softmax_scale: Factor of the scores; ``head_dim ** -0.5`` if not given.
    :param use_flash: Deprecated, use ``backend="flash_2"`` instead.
    :param backend: The attention backend to use. If not set, it will be chosen automatically.
    :param window_size: How many keys a query sees, its own included. All if not given.
    :param dtype: The default data type to use for parameters.
    :param init_device: The device to initialize weights on.
    :param cache: Where layers share RoPE tables.
    :param use_head_qk_norm: Normalize each head by itself instead of the full width.
    :raises OLMoConfigurationError: If an option is wrong.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        gate: GateConfig | None = None,
        rope: RoPEConfig | None = None,
        clip_qkv: float | None = None,
        qk_norm: LayerNormConfig | None = None,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        use_flash: bool | None = None,
        backend: AttentionBackendName | None = None,
        window_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
        use_head_qk_norm: bool = False,
    ):
        if rope is not None and rope.name == RoPEType.fused:
            rope = rope.replace(name=RoPEType.default)  # for projections that are apart
        super().__init__(
            AttentionShape.of(d_model, n_heads, n_kv_heads, head_dim),
            bias=bias,
            rope=rope,
            clip_qkv=clip_qkv,
            dropout=dropout,
            softmax_scale=softmax_scale,
            use_flash=use_flash,
            backend=backend,
            window_size=window_size,
            dtype=dtype,
            init_device=init_device,
            cache=cache,
        )
        if use_head_qk_norm and qk_norm is None:
            raise OLMoConfigurationError("use_head_qk_norm=True needs a qk_norm to apply to heads.")
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.w_q = nn.Linear(d_model, q_size, bias, init_device, dtype)
        self.w_k = nn.Linear(d_model, kv_size, bias, init_device, dtype)
        self.w_v = nn.Linear(d_model, kv_size, bias, init_device, dtype)
        self.gate = gate
        self.w_g: nn.Linear | None = None
        if gate is not None:
            n_values = gate.num_values(self.n_heads, self.head_dim)
            self.w_g = nn.Linear(d_model, n_values, bias, init_device, dtype)
        self.use_head_qk_norm = use_head_qk_norm
        self.q_norm: LayerNorm | None = None
        self.k_norm: LayerNorm | None = None
        if qk_norm is not None:
            sizes = (self.head_dim, self.head_dim) if use_head_qk_norm else (q_size, kv_size)
            self.q_norm, self.k_norm = (qk_norm.build(n, init_device=init_device) for n in sizes)

    def forward(
        self,
        x: Tensor,
        cu_doc_lens: Tensor | None = None,
        cu_doc_lens_q: Tensor | None = None,
        cu_doc_lens_k: Tensor | None = None,
        max_doc_len: int | None = None,
        max_doc_len_q: int | None = None,
        max_doc_len_k: int | None = None,
        local_k_slice: slice | None = None,
        pos_sin: Tensor | None = None,
        pos_cos: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        *,
        global_cu_doc_lens: Tensor | None = None,
    ) -> Tensor:
        """Apply attention to the input.

        :param x: The input of shape ``(batch_size, seq_len, d_model)``.
        :param cu_doc_lens: Cumulative document lengths in the input ``x``, a 1D ``torch.int32``
            tensor that should always have one more element than there are documents (the first
            element in the tensor should always be ``0``).
        :param cu_doc_lens_q: Of the queries, where a context-parallel shard has others than its
            keys.
        :param cu_doc_lens_k: Of the keys, likewise.
        :param max_doc_len: An upper bound of the longest document in ``x``, an int. Only together
            with ``cu_doc_lens``; the whole length if not given.
        :param max_doc_len_q: The same for ``cu_doc_lens_q``.
        :param max_doc_len_k: The same for ``cu_doc_lens_k``.
        :param local_k_slice: The part of all ranks' keys that ``cu_doc_lens_k`` describes.
        :param pos_sin: The rows of the RoPE tables for the rows of ``x``, where ``x`` is a shard:
            ``(seq_len, rotary_dim)``. With ``pos_cos``. Documents then end with rows of the batch.
        :param pos_cos: See ``pos_sin``.
        :param freqs_cis: The same for complex RoPE: ``(seq_len, rotary_dim / 2)``.
        :param cache_leftpad: How many leading tokens of each row are padding, ``(batch_size,)``,
            int32. They are masked and their output is zero. With a KV cache it is given once, with
            the first tokens.
        :param global_cu_doc_lens: Of the whole sequence, under context parallelism.
        :returns: The output of attention with shape ``(batch_size, seq_len, d_model)``.
        :raises ValueError: If inputs do not fit the layer or each other.
        :raises RuntimeError: If the backend can't serve the call; the message has every reason.
        """
        call = self._read(
            x,
            cu_doc_lens=cu_doc_lens,
            max_doc_len=max_doc_len,
            cache_leftpad=cache_leftpad,
            rope_buffers={"pos_sin": pos_sin, "pos_cos": pos_cos, "freqs_cis": freqs_cis},
            global_cu_doc_lens=global_cu_doc_lens,
            cu_doc_lens_q=cu_doc_lens_q,
            cu_doc_lens_k=cu_doc_lens_k,
            max_doc_len_q=max_doc_len_q,
            max_doc_len_k=max_doc_len_k,
            local_k_slice=local_k_slice,
        )
        q, k, v = apply_linears((self.w_q, self.w_k, self.w_v), x)
        if self.clip_qkv is not None:
            q, k, v = (y.clamp(-self.clip_qkv, self.clip_qkv) for y in (q, k, v))
        q, k, v = (y.view(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        q, k = self._normalize_and_rotate(q, k, call)
        att = self._attend((q, k, v), call)  # (B, T, H, D)
        return self._output(self._gated(att, x).flatten(2), call)

    def _normalize_and_rotate(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return normalize_and_rotate(
            q,
            k,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            per_head=self.use_head_qk_norm,
            rope=self.rope,
            share=None if self.tensor_parallel is None else self.tensor_parallel.sum,
            **call.rope,
        )

    def tensor_parallel_table(self) -> TensorParallelTable:
        norms = ("q_norm", "k_norm")
        return TensorParallelTable(
            columns=("w_q", "w_k", "w_v", "w_g"),
            rows=("w_out",),
            shards=() if self.use_head_qk_norm else norms,
            replicas=norms if self.use_head_qk_norm else (),
            counts={"n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads},
        )

    def _gated(self, att: Tensor, x: Tensor) -> Tensor:
        if self.gate is None or self.w_g is None:
            return att
        return apply_gate(att, apply_linear(self.w_g, x), self.gate)


class NormalizedAttention(Attention):
    """An nGPT attention implementation.

    Loshchilov et al., "nGPT: Normalized Transformer with Representation Learning on the
    Hypersphere" (2024): queries and keys are scaled by learned factors ``sq`` and ``sk``, scores
    by ``head_dim ** 0.5``, and all matrices keep rows or columns of norm 1.

    .. warning::
        This is a beta feature! The API is subject to change even with minor and patch releases.
        If you choose to use this feature please read the CHANGELOG before upgrading your version
        of this library.

    See :class:`Attention` for the parameters.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        rope: RoPEConfig | None = None,
        qk_norm: LayerNormConfig | None = None,
        use_flash: bool | None = None,
        backend: AttentionBackendName | None = None,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
        window_size: int | None = None,
    ):
        shape = AttentionShape.of(d_model, n_heads, n_kv_heads, None)
        super().__init__(
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            bias=False,
            rope=rope,
            qk_norm=qk_norm,
            softmax_scale=math.sqrt(shape.head_dim),
            use_flash=use_flash,
            backend=backend,
            window_size=window_size,
            dtype=dtype,
            init_device=init_device,
            cache=cache,
        )
        self.sq_init_value = self.sk_init_value = 1.0
        self.sq_init_scaling = self.sk_init_scaling = d_model**-0.5
        factory: dict[str, Any] = {"dtype": dtype, "device": init_device}
        self.sq = nn.Parameter(torch.empty(self.n_heads * self.head_dim, **factory))
        self.sk = nn.Parameter(torch.empty(self.n_kv_heads * self.head_dim, **factory))
        self._reset_scales()

    @torch.no_grad()
    def _reset_scales(self) -> None:
        super()._reset_scales()
        self.sq.fill_(self.sq_init_scaling)
        self.sk.fill_(self.sk_init_scaling)

    def _normalize_and_rotate(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        sq = local(self.sq) * (self.sq_init_value / self.sq_init_scaling)
        sk = local(self.sk) * (self.sk_init_value / self.sk_init_scaling)
        return normalize_and_rotate(
            q,
            k,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            scales=(sq, sk),
            rope=self.rope,
            share=None if self.tensor_parallel is None else self.tensor_parallel.sum,
            **call.rope,
        )

    def tensor_parallel_table(self) -> TensorParallelTable:
        table = super().tensor_parallel_table()
        return replace(table, shards=(*table.shards, "sq", "sk"))

    @torch.no_grad()
    def normalize_matrices(self) -> None:
        """Normalize the weights in all matrices. This should be called after each optimizer step.

        A row of zeros stays one.
        """
        for linear, dim in ((self.w_q, -1), (self.w_k, -1), (self.w_v, -1), (self.w_out, 0)):
            linear.weight.copy_(l2_normalize(linear.weight, dim=dim))
