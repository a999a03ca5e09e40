"""Attention with one matrix for queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.backend import AttentionBackendName
from olmo_core.nn.attention.qk import rotate_packed
from olmo_core.nn.attention.softmax_attention import AttentionShape, SoftmaxAttention
from olmo_core.nn.linear import apply_linear
from olmo_core.nn.rope import RoPEConfig, RoPEType
from olmo_core.nn.sharded import local, local_input
from olmo_core.nn.tensor_parallel import TensorParallelTable

if TYPE_CHECKING:
    from olmo_core.nn.buffer_cache import BufferCache


class FusedAttention(SoftmaxAttention):
    """A "fused" implementation of multi-head self-attention: one projection for Q, K and V.

    Intra-document masking is supported by passing in the ``max_doc_len`` and ``cu_doc_lens``
    parameters to :meth:`forward`. Works with every backend.

    .. warning::
        If using RoPE, this requires that you use the "fused" RoPE implementation
        (:class:`olmo_core.nn.rope.FusedRotaryEmbedding`).

    :param d_model: The model hidden size.
    :param n_heads: The number of attention heads.
    :param bias: Include biases with linear layers.
    :param rope: The config for RoPE, if RoPE should be used.
    :param clip_qkv: Clip QKV to this value, if set.
    :param dropout: Dropout probability of attention weights, in training alone.
    :param dtype: The default data type to use for parameters.
    :param backend: The attention backend to use. If not set, it will be chosen automatically.
    :param init_device: The device to initialize weights on.
    :param cache: Where layers share RoPE tables.
    :param window_size: How many keys a query sees, its own included. All if not given.
    :raises OLMoConfigurationError: If an option is wrong.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        bias: bool = True,
        rope: RoPEConfig | None = None,
        clip_qkv: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        backend: AttentionBackendName | None = None,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
        window_size: int | None = None,
    ):
        if rope is not None and rope.name != RoPEType.fused:
            raise OLMoConfigurationError(
                f"FusedAttention needs the RoPE implementation '{RoPEType.fused}', got "
                f"'{rope.name}'. It computes the same as 'default'."
            )
        super().__init__(
            AttentionShape.of(d_model, n_heads, None, None),
            bias=bias,
            rope=rope,
            clip_qkv=clip_qkv,
            dropout=dropout,
            softmax_scale=None,
            use_flash=None,
            backend=backend,
            window_size=window_size,
            dtype=dtype,
            init_device=init_device,
            cache=cache,
        )
        self.backend.assert_supports_packed_qkv()
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias, init_device, dtype)

    def forward(
        self,
        x: Tensor,
        max_doc_len: int | None = None,
        cu_doc_lens: Tensor | None = None,
        pos_sin: Tensor | None = None,
        pos_cos: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        *,
        cu_doc_lens_q: Tensor | None = None,
        cu_doc_lens_k: Tensor | None = None,
        max_doc_len_q: int | None = None,
        max_doc_len_k: int | None = None,
        local_k_slice: slice | None = None,
        global_cu_doc_lens: Tensor | None = None,
    ) -> Tensor:
        """Apply attention to the input.

        :param x: The input of shape ``(batch_size, seq_len, d_model)``.
        :param max_doc_len: An upper bound of the longest document in ``x``, an int. Only together
            with ``cu_doc_lens``; the whole length if not given.
        :param cu_doc_lens: Cumulative document lengths in the input ``x``, a 1D ``torch.int32``
            tensor that should always have one more element than there are documents (the first
            element in the tensor should always be ``0``).
        :returns: The output of attention with shape ``(batch_size, seq_len, d_model)``.

        The other parameters are those of :meth:`Attention.forward`.
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
        qkv = self._project(x)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        qkv = qkv.view(*x.shape[:2], 3, -1, self.head_dim)
        if self.rope is None:
            att = self._attend(qkv, call)
        else:
            att = self._attend(rotate_packed(qkv, self.rope, **call.rope), call)
        return self._output(att.flatten(2), call)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the heads that this rank has."""
        place = self.tensor_parallel
        if place is None:
            return apply_linear(self.w_qkv, x)
        weight, bias = place.of_packed(local(self.w_qkv.weight)), self.w_qkv.bias
        return F.linear(
            local_input(x), weight, None if bias is None else place.of_packed(local(bias))
        )

    def tensor_parallel_table(self) -> TensorParallelTable:
        # Each rank has rows of all three thirds. Cut so, FSDP's full_tensor() would scramble them.
        return TensorParallelTable(
            columns=(),
            rows=("w_out",),
            replicas=("w_qkv",),
            counts={"n_heads": self.n_heads},
            float8=False,
        )
