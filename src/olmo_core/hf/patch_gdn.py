"""The gated delta net of transformers' models, computed by this library.

Their own has no packed documents on a CPU (it raises), leaks one document's state into the next
elsewhere, and its backward pass takes time quadratic in the length. Weights stay where they are.

B: batch, T: tokens, H: key heads, HV: value heads, K, V: their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.hf.config import PretrainedError
from olmo_core.hf.documents import packed_doc_lens
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule
from olmo_core.nn.convolution import causal_conv1d
from olmo_core.nn.functional import compute_dtype

_MARK = "_olmo_core_patched"
Projections = tuple[Tensor, Tensor, Tensor, Tensor]
"""q|k|v (B, T, 2 * H * K + HV * V), the output's gate (B, T, HV * V), b and a (B, T, HV)."""


def patch_gdn(model: nn.Module) -> int:
    """Let every gated delta net layer of a model of transformers run here.

    OlmoHybrid, Qwen3-Next and Qwen3.5. Documents are where ``position_ids`` restart or where
    ``cu_seq_lens_q`` says; for its attention layers see :func:`register`. Caches of transformers
    go on working. Patching twice changes nothing.

    :returns: how many layers there are.
    :raises PretrainedError: if there is none, or one of a kind that is not known here.
    """
    found = 0
    for layer in model.modules():
        mixer = getattr(layer, "linear_attn", None)
        if not isinstance(mixer, nn.Module):
            continue
        kind = type(mixer).__name__
        if kind not in _PROJECT:
            raise PretrainedError(
                f"{kind} is not known here: patch_gdn knows {', '.join(_PROJECT)}"
            )
        if mixer.activation not in ("silu", "swish"):
            raise PretrainedError(f"{kind} with activation {mixer.activation!r}: silu is computed")
        found += 1
        if not hasattr(mixer, _MARK):
            setattr(mixer, _MARK, True)
            mixer.forward = MethodType(_forward, mixer)
            layer.register_forward_pre_hook(_tell_documents, with_kwargs=True)
    if not found:
        raise PretrainedError(f"{type(model).__name__} has no gated delta net layer")
    return found


def _tell_documents(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Their layers do not hand ``position_ids`` to the delta net."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    x = args[0] if args else kwargs["hidden_states"]
    if kwargs.get("cu_seq_lens_q") is None and positions is not None:
        cu = packed_doc_lens(positions, mask, *x.shape[:2])
        if cu is not None:
            kwargs["cu_seq_lens_q"] = cu
    return args, kwargs


def _forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> Tensor:
    x, cu = hidden_states, cu_seq_lens_q
    batch, tokens = x.shape[:2]
    padding = None if attention_mask is None else attention_mask[:, -tokens:] == 0
    if padding is not None:
        x = x.masked_fill(padding.unsqueeze(-1), 0)
    if cu is not None:
        cu = torch.as_tensor(cu, dtype=torch.int32, device=x.device).flatten()
    mixed, gate, b, a = _PROJECT[type(self).__name__](self, x)

    state = None
    if cache_params is not None:
        state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        if state is not None and cu is not None:
            raise ValueError(
                "packed documents cannot continue a cache: it holds one document a row. Give each "
                "document a row of its own."
            )
        # All that the convolution needs: what the cache holds, then the new inputs.
        past_and_new = cache_params.update_conv_state(
            mixed.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
        ).transpose(1, 2)
        if state is not None:
            mixed = past_and_new
    weight, bias = self.conv1d.weight, self.conv1d.bias
    mixed = causal_conv1d(mixed, weight.to(mixed.dtype), bias, cu_doc_lens=cu)[:, -tokens:]
    q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], -1)
    q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
    v = v.unflatten(-1, (-1, self.head_v_dim))

    dtype = compute_dtype(x.dtype)
    beta = b.to(dtype).sigmoid() * (2 if getattr(self, "allow_neg_eigval", False) else 1)
    g = -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
    if padding is not None:  # it neither writes nor forgets
        beta, g = (y.masked_fill(padding.unsqueeze(-1), 0) for y in (beta, g))
    out, last = _mix(q, k, v, g, beta, state, cu, by_row=cache_params is not None)
    if cache_params is not None:
        cache_params.update_recurrent_state(last, self.layer_idx)
    norm = self.o_norm if hasattr(self, "o_norm") else self.norm
    gate = gate.reshape(-1, self.head_v_dim)
    y = norm(out.reshape(-1, self.head_v_dim), gate).reshape(batch, tokens, -1)
    return (self.o_proj if hasattr(self, "o_proj") else self.out_proj)(y)


def _mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu: Tensor | None,
    *,
    by_row: bool,
) -> tuple[Tensor, Tensor]:
    """The rule, and the state after each row's last token if ``by_row``."""
    inputs = (q, k, v, g, beta)
    if cu is None or not by_row or q.shape[0] == 1:
        return gated_delta_rule(*inputs, initial_state=state, cu_doc_lens=cu, normalize_qk=True)
    rows, tokens = [], q.shape[1]
    for i in range(q.shape[0]):
        ends = (cu - i * tokens).clamp(0, tokens)
        row = [y[i : i + 1] for y in inputs]
        rows.append(gated_delta_rule(*row, cu_doc_lens=ends, normalize_qk=True))
    out, last = zip(*rows, strict=True)
    return torch.cat(out), torch.cat(last)


def _olmo_hybrid(self: Any, x: Tensor) -> Projections:
    mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
    return mixed, self.g_proj(x), self.b_proj(x), self.a_proj(x)


def _qwen3_5(self: Any, x: Tensor) -> Projections:
    return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)


def _qwen3_next(self: Any, x: Tensor) -> Projections:
    """Rows lie key head by key head: its q, its k, and v and gate of its value heads."""
    group = self.num_v_heads // self.num_k_heads
    sizes = [self.head_k_dim, self.head_k_dim, *[group * self.head_v_dim] * 2]
    parts = self.in_proj_qkvz(x).unflatten(-1, (self.num_k_heads, -1)).split(sizes, -1)
    q, k, v, gate = (part.flatten(-2) for part in parts)
    b, a = self.in_proj_ba(x).unflatten(-1, (self.num_k_heads, -1)).split(group, -1)
    return torch.cat([q, k, v], -1), gate, b.flatten(-2), a.flatten(-2)


_PROJECT: dict[str, Callable[[Any, Tensor], Projections]] = {
    "OlmoHybridGatedDeltaNet": _olmo_hybrid,
    "Qwen3_5GatedDeltaNet": _qwen3_5,
    "Qwen3NextGatedDeltaNet": _qwen3_next,
}
