"""This library's attention backends as attention implementations of transformers.

Any model of transformers then runs on them, and documents that are packed into its rows stay
apart: transformers itself separates them only where neither an attention mask nor a cache is given.

B: batch, T: queries, S: keys, H: heads, D: head_dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from olmo_core.hf.config import PretrainedError
from olmo_core.hf.documents import segment_keywords
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.attention.backend import AttentionBackend, AutoAttentionBackend

PREFIX = "olmo_core"


def register() -> list[str]:
    """Make every backend known to transformers.

    ``olmo_core`` chooses the fastest that can serve each call; ``olmo_core_torch``,
    ``olmo_core_flash_2`` and so on name one. Use a name as a model's ``attn_implementation``::

        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="olmo_core")

    Documents are where ``position_ids`` restart or where ``cu_seq_lens_q`` says, whatever else is
    given. Padding is left or right of a row's tokens, as a 2-D ``attention_mask`` says; outputs
    there mean nothing.

    :returns: the names.
    :raises PretrainedError: without the package transformers.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise PretrainedError(
            "transformers is not installed: pip install 'olmo-attention[hf]'"
        ) from error
    names = {PREFIX: None, **{f"{PREFIX}_{name}": name for name in AttentionBackendName}}
    for name, backend in names.items():
        AttentionInterface.register(name, _implementation(backend))
        AttentionMaskInterface.register(name, padding_mask)
    return list(names)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """What the implementation is told of masking: which keys are tokens, (B, S) bool.

    None means that all are. Being causal and windows are the attention's own matter.

    :raises ValueError: for what is not causal attention, or keys that end after the queries.
    """
    if (
        use_vmap
        or getattr(config, "attention_chunk_size", None)
        or _looks_ahead(mask_function, batch_size, q_length, q_offset, device)
    ):
        raise ValueError(
            "olmo_core's attention is causal, with a sliding window or without: this model asks "
            "for another mask (chunks, or tokens that see later ones). Use attn_implementation="
            "'sdpa' for it."
        )
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            "olmo_core's attention needs keys that end with the queries, and this cache has "
            "room behind them. Use a DynamicCache (cache_implementation='dynamic')."
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if bool(mask.all()) else mask


def _looks_ahead(
    mask_function: Any, batch: int, length: int, offset: int | Tensor, device: torch.device | str
) -> bool:
    """Whether some query sees the key after it: any two that see each other hold such a pair."""
    if mask_function is None or length < 2:
        return False
    q = torch.arange(length - 1, device=device) + offset
    row = torch.arange(batch, device=device)[:, None]
    return bool(torch.as_tensor(mask_function(row, torch.zeros_like(q), q, q + 1)).any())


@cache
def _backend(
    name: AttentionBackendName | None,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    scale: float,
    dropout: float,
    window: int | None,
) -> AttentionBackend:
    cls = AutoAttentionBackend if name is None else name.get_class()
    return cls(
        head_dim=head_dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        scale=scale,
        dropout_p=dropout,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


def _implementation(name: AttentionBackendName | None) -> Any:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, H, T, D), (B, Hkv, S, D) twice -> (B, T, H, D), and no weights."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        asked = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
        if not causal or asked or kwargs.get("output_attentions"):
            raise ValueError(
                f"olmo_core's attention in {type(module).__name__}: it is causal and returns no "
                f"weights{'' if not asked else ', and has no ' + ', '.join(asked)}. Use "
                "attn_implementation='eager' for this model."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "olmo_core's attention takes a 2-D attention_mask (batch, keys), got shape "
                f"{tuple(attention_mask.shape)}"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, D)
        if value.shape[-1] != query.shape[-1]:
            raise ValueError(
                f"olmo_core's attention has one head_dim, got {query.shape[-1]} of queries and "
                f"{value.shape[-1]} of values"
            )
        backend = _backend(
            name,
            q.shape[2],
            k.shape[2],
            q.shape[3],
            q.shape[3] ** -0.5 if scaling is None else float(scaling),
            float(dropout),
            sliding_window,
        )
        lengths = _lengths(q, k, attention_mask, position_ids, cu_seq_lens_q)
        return backend.train(dropout > 0)((q, k, v), **lengths), None

    return attention


def _lengths(
    q: Tensor, k: Tensor, mask: Tensor | None, positions: Tensor | None, cu: Tensor | None
) -> dict[str, Any]:
    if cu is None:
        return segment_keywords(q.shape[1], k.shape[1], q.shape[0], mask, positions)
    cu = torch.as_tensor(cu, dtype=torch.int32, device=q.device).flatten()
    return {"cu_doc_lens": cu, "max_doc_len": int(cu.diff().max())}
