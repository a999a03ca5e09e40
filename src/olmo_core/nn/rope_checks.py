"""Buffers and documents given to RoPE, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.lengths import check_cu_doc_lens, document_positions

__all__ = ["check_buffers", "document_rows"]


def check_buffers(
    interleaved: bool,
    rotary_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    pos_sin: Tensor | None,
    pos_cos: Tensor | None,
    freqs_cis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The given buffers as cosines and sines, (N, R), or (N, R / 2) if they are complex.

    :param interleaved: Whether they are for :class:`ComplexRotaryEmbedding`.
    :param rotary_dim: R.
    :param device: Of the queries.
    :param dtype: To rotate in.
    """
    width = rotary_dim
    if interleaved:
        if freqs_cis is None or pos_sin is not None or pos_cos is not None:
            raise ValueError("complex RoPE takes freqs_cis, neither pos_sin nor pos_cos")
        if not freqs_cis.is_complex():
            raise TypeError(f"freqs_cis must be complex, got {freqs_cis.dtype}")
        buffers, width = (freqs_cis.real, freqs_cis.imag), width // 2
    else:
        if pos_sin is None or pos_cos is None or freqs_cis is not None:
            raise ValueError("RoPE takes pos_sin and pos_cos together, not freqs_cis")
        buffers = (pos_cos, pos_sin)
    for buffer in buffers:
        if buffer.dim() != 2 or buffer.shape[1] != width or buffer.shape != buffers[0].shape:
            raise ValueError(
                f"RoPE buffers must be of shape (positions, {width}) and alike, got "
                f"{tuple(buffer.shape)}"
            )
        if buffer.device != device:
            raise ValueError(f"RoPE buffers are on {buffer.device}, the queries on {device}")
        if torch.promote_types(buffer.dtype, dtype) != buffer.dtype:
            raise OLMoConfigurationError(
                f"RoPE is to be computed in {dtype}, but got a table in {buffer.dtype}, whose "
                "angles are too coarse. If FSDP cast it, set cast_forward_inputs=False; "
                "for float64 call get_buffers(..., dtype=torch.float64); "
                "otherwise set full_precision=False"
            )
    return buffers


def document_rows(cu_doc_lens: Tensor, x: Tensor, time: int) -> tuple[Tensor, int]:
    """Positions that restart in each document, (B, T), and a number above all of them.

    :param x: Of batch size B, T long in dimension ``time``.
    """
    if isinstance(cu_doc_lens, Tensor) and cu_doc_lens.device != x.device:
        raise ValueError(f"cu_doc_lens is on {cu_doc_lens.device}, the queries on {x.device}")
    batch, length = x.shape[0], x.shape[time]
    check_cu_doc_lens(cu_doc_lens, batch * length, None)
    return document_positions(cu_doc_lens, batch * length).view(batch, length), batch * length
