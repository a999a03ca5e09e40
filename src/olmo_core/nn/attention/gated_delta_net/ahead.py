"""All kernels that a layer's first call will launch, both ways, compiled side by side from its
beginning on, while the projections run: the call takes as long as the slowest of them.

Each op does the same for itself where it stands alone. What is missing here its launch compiles.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.convolution import Stream, convolution_ahead
from olmo_core.nn.attention.kernels.gated_delta_rule import rule_ahead
from olmo_core.nn.attention.kernels.gates import decay_gates_ahead, gated_norm_ahead
from olmo_core.nn.attention.kernels.launch import compile_ahead, shaped_like
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.dispatch import is_heard, is_observed
from olmo_core.nn.sharded import local

if TYPE_CHECKING:
    from olmo_core.nn.attention.gated_delta_net.layer import GatedDeltaNet

__all__ = ["compile_layer_ahead"]


def compile_layer_ahead(
    layer: GatedDeltaNet, x: Tensor, cu_doc_lens: Tensor | None, padding: Tensor | None
) -> None:
    """Start to compile for a call of ``layer`` without a cache, once for each kind of call."""
    if is_observed((x,)) or not x.numel():
        return
    dtype, weight, place = x.dtype, layer.w_v.weight, layer.tensor_parallel
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    save = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    key = (
        "gated_delta_net", layer._sizes, layer.conv_size, 1 if place is None else place.degree,
        layer.allow_neg_eigval, layer.o_norm.eps, layer.q_conv1d.bias is None, dtype,
        layer.q_conv1d.weight.dtype, layer.A_log.dtype, save, cu_doc_lens is None, padding is None,
    )  # fmt: skip
    compile_ahead(
        key, x.device, partial(_start, layer, x, cu_doc_lens, padding, dtype=dtype, save=save)
    )


def _start(
    layer: GatedDeltaNet, x: Tensor, cu_doc_lens: Tensor | None, padding: Tensor | None, *,
    dtype: torch.dtype, save: bool,
) -> None:  # fmt: skip
    if triton_refusal(x) is not None:
        return
    device, (batch, tokens) = x.device, x.shape[:2]
    sizes = layer._own_sizes(layer.tensor_parallel)
    empty = partial(torch.empty, dtype=dtype, device="meta")
    wide = partial(torch.empty, dtype=torch.float32, device="meta")
    # Documents lie one after another, in one row.
    rows = (batch, tokens) if cu_doc_lens is None else (1, batch * tokens)

    key_heads, value_heads = sizes.n_heads, sizes.n_v_heads
    q, k = (empty(*rows, key_heads, sizes.head_k_dim) for _ in range(2))
    v = empty(*rows, value_heads, sizes.head_v_dim)
    g, beta = (wide(*rows, value_heads) for _ in range(2))
    (lengths,) = shaped_like(cu_doc_lens)
    scale = sizes.head_k_dim**-0.5
    rule_ahead(device, (q, k, v, g, beta), lengths, scale, normalize_qk=True, save=save)

    convolutions = layer._convolutions
    if not any(is_heard(conv) for conv in convolutions):
        streams = [
            Stream(y.flatten(2), *shaped_like(local(conv.weight), local(conv.bias)))
            for y, conv in zip((q, k, v), convolutions, strict=True)
        ]
        seen = None if lengths is None else empty(rows[1], dtype=torch.int32)
        convolution_ahead(device, streams, seen, convolutions[0].activation == "silu", save)

    a, b = (empty(batch, tokens, value_heads) for _ in range(2))
    parameters = shaped_like(local(layer.A_log), local(layer.dt_bias), padding)
    decay_gates_ahead(device, (a, b, *parameters), layer.allow_neg_eigval, save)

    norm = layer.o_norm
    if norm.weight is not None and not is_heard(norm):
        out, gate = (empty(batch, tokens, *v.shape[2:]) for _ in range(2))
        gated_norm_ahead(device, (out, gate, *shaped_like(local(norm.weight))), norm.eps, save)
