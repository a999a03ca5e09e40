"""All kernels that a layer's first call will launch, both ways, compiled side by side from its
beginning on, while the projections run: the call takes as long as the slowest of them.

Each op does the same for itself where it stands alone. What is missing here its launch compiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from olmo_core.nn.attention.gated_delta_net.sizes import GatedDeltaNetSizes
from olmo_core.nn.attention.kernels.convolution import Stream, convolution_ahead
from olmo_core.nn.attention.kernels.gated_delta_rule import RuleInputs, rule_ahead
from olmo_core.nn.attention.kernels.gates import decay_gates_ahead, gated_norm_ahead
from olmo_core.nn.attention.kernels.launch import shaped_like
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal
from olmo_core.nn.convolution import CausalConv1d
from olmo_core.nn.dispatch import autocast_dtype, is_heard, is_observed
from olmo_core.nn.layer_norm import RMSNorm
from olmo_core.nn.sharded import local

_KINDS: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()
"""The kinds of calls that a layer had in this process, which a copy or a pickle of it had not."""


def first_of_its_kind(
    layer: nn.Module, x: Tensor, cu_doc_lens: Tensor | None, padding: Tensor | None
) -> bool:
    """Whether a call of a layer, which is neither compiled nor watched, is the first that may need
    these kernels."""
    if torch.compiler.is_compiling():
        return False
    backward = torch.is_grad_enabled()
    kind = (
        x.device, _dtype(x), backward, backward and x.requires_grad, cu_doc_lens is None,
        padding is None,
    )  # fmt: skip
    kinds = _KINDS.get(layer)
    if kinds is None:
        kinds = _KINDS[layer] = set()
    if kind in kinds or is_observed((x,)) or not x.numel():
        return False
    kinds.add(kind)
    return True


def _dtype(x: Tensor) -> torch.dtype:
    """What the projections of ``x`` have."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def compile_layer_ahead(
    x: Tensor, cu_doc_lens: Tensor | None, padding: Tensor | None, *, sizes: GatedDeltaNetSizes,
    convolutions: Sequence[CausalConv1d], gates: tuple[Tensor, Tensor], norm: RMSNorm,
    double: bool, save: bool,
) -> None:  # fmt: skip
    """Start to compile what a layer without a cache launches for ``x``, where no call did before,
    and backward's kernels for ``save``.

    :param sizes: With the heads that this rank has.
    :param gates: ``A_log`` and ``dt_bias``.
    """
    if triton_refusal(x) is not None:
        return
    device, (batch, tokens) = x.device, x.shape[:2]
    empty = partial(torch.empty, dtype=_dtype(x), device="meta")
    wide = partial(torch.empty, dtype=torch.float32, device="meta")
    # Documents lie one after another, in one row.
    rows = (batch, tokens) if cu_doc_lens is None else (1, batch * tokens)
    key_heads, value_heads = sizes.n_heads, sizes.n_v_heads
    q, k = (empty(*rows, key_heads, sizes.head_k_dim) for _ in range(2))
    v = empty(*rows, value_heads, sizes.head_v_dim)
    g, beta = (wide(*rows, value_heads) for _ in range(2))
    (lengths,) = shaped_like(cu_doc_lens)
    scale = sizes.head_k_dim**-0.5
    rule_ahead(device, RuleInputs(q, k, v, g, beta, lengths, scale, True), save)
    if not any(is_heard(conv) for conv in convolutions):
        streams = [
            Stream(y.flatten(2), *shaped_like(local(conv.weight), local(conv.bias)))
            for y, conv in zip((q, k, v), convolutions, strict=True)
        ]
        seen = None if cu_doc_lens is None else empty(rows[1], dtype=torch.int32)
        convolution_ahead(device, streams, seen, convolutions[0].activation == "silu", save)
    a, b = (empty(batch, tokens, value_heads) for _ in range(2))
    parameters = shaped_like(*(local(p) for p in gates), padding)
    decay_gates_ahead(device, (a, b, *parameters), double, save)
    if type(norm) is RMSNorm and norm.weight is not None and not is_heard(norm):
        out, gate = (empty(batch, tokens, *v.shape[2:]) for _ in range(2))
        weight = shaped_like(local(norm.weight))
        gated_norm_ahead(device, (out, gate, *weight), norm.eps, save)
