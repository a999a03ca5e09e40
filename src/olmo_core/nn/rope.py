"""Rotary position embeddings (arXiv:2104.09864).

Shapes: B batch, T sequence, H query heads, Hkv key heads, D head size, R rotated dimensions of
a head, N rows of a table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from olmo_core.config import Config, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope_checks import check_buffers, document_rows
from olmo_core.nn.rope_rotations import rotate_halves, rotate_pairs, rotate_token
from olmo_core.nn.rope_scaling import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEScalingConfig,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
    inverse_frequencies,
)
from olmo_core.nn.rope_table import RoPETable

__all__ = [
    "ABFRoPEScalingConfig",
    "ComplexRotaryEmbedding",
    "FusedRotaryEmbedding",
    "PIRoPEScalingConfig",
    "RoPEBuffers",
    "RoPEConfig",
    "RoPEScalingConfig",
    "RoPEType",
    "RotaryEmbedding",
    "RotaryEmbeddingBase",
    "StepwiseRoPEScalingConfig",
    "YaRNRoPEScalingConfig",
]


class RoPEType(StrEnum):
    """The implementations by name."""

    default = "default"
    """:class:`RotaryEmbedding`"""
    complex = "complex"
    """:class:`ComplexRotaryEmbedding`"""
    fused = "fused"
    """:class:`FusedRotaryEmbedding`, which takes queries, keys and values packed. Layers that
    project them apart use :class:`RotaryEmbedding` instead, which computes the same."""


@dataclass
class RoPEConfig(Config):
    """Builds any rotary embedding."""

    name: RoPEType = RoPEType.default
    """Which implementation."""
    theta: float = 500_000
    """The base of the frequencies theta^(-2i / R)."""
    full_precision: bool = True
    """Rotate in float32 at least; otherwise in the dtype of the queries."""
    no_global_rope: bool = False
    """Leave out RoPE in layers without a sliding window; attention layers read it."""
    scaling: RoPEScalingConfig | None = None
    """How to stretch the frequencies to a longer context."""
    partial_rotary_factor: float = 1.0
    """The part of each head, from its first dimension on, that is rotated."""

    def build(self, head_size: int, cache: BufferCache | None = None) -> RotaryEmbeddingBase:
        """Build the module.

        :param head_size: The dimension of a head.
        :param cache: Where tables are kept; layers that share it share tables.
        :raises OLMoConfigurationError: For an option out of range, or if the number of rotated
            dimensions is not even.
        """
        return _CLASSES[self.name](
            head_size=head_size,
            theta=self.theta,
            full_precision=self.full_precision,
            cache=cache,
            scaling=self.scaling,
            partial_rotary_factor=self.partial_rotary_factor,
        )


class RoPEBuffers(NamedTuple):
    """Rotations for consecutive positions, to be sharded like the sequence and given to forward."""

    pos_sin: Tensor | None = None
    """(N, R); both halves are equal."""
    pos_cos: Tensor | None = None
    """(N, R); both halves are equal."""
    freqs_cis: Tensor | None = None
    """(N, R / 2), complex."""


class RotaryEmbeddingBase(nn.Module):
    """What all rotary embeddings share; use a subclass. What it was built from does not change.

    :param head_size: D.
    :param theta: The base of the frequencies.
    :param full_precision: Rotate in float32 at least; otherwise in the dtype of the queries.
    :param cache: Where tables are kept; layers that share it share tables.
    :param scaling: How to stretch the frequencies.
    :param partial_rotary_factor: R / D, in (0, 1].
    :raises OLMoConfigurationError: For an option out of range, or an odd R.
    """

    interleaved: ClassVar[bool] = False

    def __init__(
        self,
        *,
        head_size: int,
        theta: float = 500_000,
        full_precision: bool = True,
        cache: BufferCache | None = None,
        scaling: RoPEScalingConfig | None = None,
        partial_rotary_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not theta > 1:
            raise OLMoConfigurationError(f"RoPE's theta must be greater than 1, got {theta}")
        if not 0 < partial_rotary_factor <= 1:
            raise OLMoConfigurationError(
                f"partial_rotary_factor must lie in (0, 1], got {partial_rotary_factor}"
            )
        rotary_dim = int(head_size * partial_rotary_factor)
        if rotary_dim < 2 or rotary_dim % 2:
            raise OLMoConfigurationError(
                "RoPE rotates pairs of dimensions: head_size * partial_rotary_factor must be even "
                f"and at least 2, got {head_size} * {partial_rotary_factor} = {rotary_dim}"
            )
        self._head_size, self._rotary_dim, self._theta = head_size, rotary_dim, float(theta)
        self._scaling = copy.deepcopy(scaling)
        self.full_precision = full_precision
        with _disable_current_modes():  # a fake mode's tensors have no numbers to read
            inv_freqs, factor = inverse_frequencies(self._theta, rotary_dim), 1.0
            if scaling is not None:
                inv_freqs = scaling.compute_inv_freqs(self._theta, rotary_dim)
                factor = scaling.rescale_factor
            self._table = RoPETable(inv_freqs, factor, cache)

    @property
    def head_size(self) -> int:
        """D."""
        return self._head_size

    @property
    def rotary_dim(self) -> int:
        """R."""
        return self._rotary_dim

    @property
    def theta(self) -> float:
        """The base of the frequencies before scaling."""
        return self._theta

    @property
    def scaling(self) -> RoPEScalingConfig | None:
        """A copy of the scaling."""
        return copy.deepcopy(self._scaling)

    def extra_repr(self) -> str:
        return (
            f"head_size={self._head_size}, theta={self._theta!r}, rotary_dim={self._rotary_dim}, "
            f"scaling={self._scaling!r}, full_precision={self.full_precision}"
        )

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        head_first: bool = True,
        start_pos: int | None = None,
        pos_sin: Tensor | None = None,
        pos_cos: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        cu_doc_lens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        max_position: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys to their positions.

        Row t of k is at position t unless ``start_pos``, ``cu_doc_lens`` or ``positions``, one of
        them, says otherwise. Queries that are fewer than the keys are the last ones.

        :param q: (B, H, T, D), or (B, T, H, D) without ``head_first``.
        :param k: (B, Hkv, T, D), or (B, T, Hkv, D).
        :param head_first: Whether heads come before rows.
        :param start_pos: The position of k's first row.
        :param pos_sin: (N, R), with ``pos_cos``, from :meth:`get_buffers`: a row for each position
            from 0 on, to be read instead of the module's own table.
        :param pos_cos: (N, R).
        :param freqs_cis: (N, R / 2), complex, for :class:`ComplexRotaryEmbedding`.
        :param cu_doc_lens: Cumulative document lengths of the flattened batch, (documents + 1,),
            int32: positions restart in each document.
        :param positions: (T,) or (B, T), int32 or int64, not negative; not with buffers.
        :param max_position: Greater than every position; needed with ``positions``, whose values
            are not read on the host.
        :returns: Rotated copies of q and k, in their dtypes.
        :raises ValueError: For shapes that do not fit, or options that exclude each other.
        :raises TypeError: For positions that are not integers, or q and k that are not
            floating-point.
        :raises OLMoConfigurationError: For buffers in lower precision than asked for.
        """
        dtype = self._check_inputs(q, k, head_first)
        time, heads = (2, -3) if head_first else (1, -2)
        buffers = None
        if pos_sin is not None or pos_cos is not None or freqs_cis is not None:
            buffers = check_buffers(
                self.interleaved, self._rotary_dim, k.device, dtype, pos_sin, pos_cos, freqs_cis
            )
            if positions is not None or max_position is not None:
                raise ValueError(
                    "RoPE buffers are applied row by row: give either them, already sharded like "
                    "the sequence, or positions with max_position, not both"
                )
        elif self._is_token(q, k, time) and positions is max_position is cu_doc_lens is None:
            cos, sin = self._table.row(start_pos, k.device, dtype)
            return rotate_token(q, k, cos, sin, heads)
        if cu_doc_lens is not None:
            if positions is not None or max_position is not None or start_pos is not None:
                raise ValueError(
                    "cu_doc_lens restarts positions in each document: leave out start_pos, "
                    "positions and max_position"
                )
            positions, max_position = document_rows(cu_doc_lens, k, time)
        cos, sin = self._table.rows(k, time, dtype, start_pos, positions, max_position, buffers)
        turn, dim = rotate_pairs if self.interleaved else rotate_halves, self._rotary_dim
        k_out = turn(k, cos.unsqueeze(heads), sin.unsqueeze(heads), dim)
        if (fewer := k.shape[time] - q.shape[time]) > 0:
            cos, sin = (x.narrow(-2, fewer, q.shape[time]) for x in (cos, sin))
        return turn(q, cos.unsqueeze(heads), sin.unsqueeze(heads), dim), k_out

    def _is_token(self, q: Tensor, k: Tensor, time: int) -> bool:
        """Whether this is a step of decoding, where launching counts."""
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not self.interleaved
            and q.shape[time] == k.shape[time] == 1
            and q.dtype == k.dtype
        )

    def get_buffers(
        self, max_seq_len: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> RoPEBuffers:
        """The rotations of positions 0 to ``max_seq_len - 1``, to be sharded like the sequence.

        :param max_seq_len: N.
        :param device: Where they shall lie.
        :param dtype: float32, or float64 for float64 queries.
        """
        sin, cos = self.get_table(max_seq_len, device, dtype)
        sin, cos = sin.narrow(0, 0, max_seq_len), cos.narrow(0, 0, max_seq_len)
        if self.interleaved:
            return RoPEBuffers(freqs_cis=torch.complex(cos, sin))
        return RoPEBuffers(pos_sin=torch.cat((sin, sin), -1), pos_cos=torch.cat((cos, cos), -1))

    def get_table(
        self, max_seq_len: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The cached table that ``forward`` reads, for kernels that rotate by themselves.

        :param max_seq_len: How many rows are needed.
        :param device: Of the queries.
        :param dtype: float32, or float64 for float64 queries.
        :returns: Sines and cosines, each (N, R / 2), N >= ``max_seq_len``, views with row stride R.
        """
        device = torch.device(device)
        if device.index is None and device.type not in ("cpu", "meta"):
            device = torch.empty(0, device=device).device  # as the queries will name it
        cos, sin = self._table.read(max_seq_len, device, dtype).chunk(2, dim=-1)
        return sin, cos

    def warmup_cache(
        self, max_seq_len: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        """Build what ``forward`` needs for up to ``max_seq_len`` positions.

        :param max_seq_len: The longest sequence, or the greatest position plus one.
        :param device: Of the queries.
        :param dtype: float64 for float64 queries; float32 serves every other dtype.
        """
        self.get_table(max_seq_len, device, dtype)

    def _check_inputs(self, q: Tensor, k: Tensor, head_first: bool) -> torch.dtype:
        """The dtype to rotate in."""
        size, time = self._head_size, 2 if head_first else 1
        if q.dim() != 4 or k.dim() != 4 or q.shape[3] != size or k.shape[3] != size:
            order = "B, {}, T" if head_first else "B, T, {}"
            raise ValueError(
                f"RoPE expected q ({order.format('H')}, {size}) and k ({order.format('Hkv')}, "
                f"{size}), got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if q.shape[0] != k.shape[0] or q.shape[time] > k.shape[time] or q.device != k.device:
            raise ValueError(
                "RoPE expected q and k of the same batch size and device, and q no longer than k "
                f"(with head_first={head_first} a length is shape[{time}]), got {tuple(q.shape)} "
                f"on {q.device} and {tuple(k.shape)} on {k.device}"
            )
        if not q.is_floating_point() or not k.is_floating_point():
            raise TypeError(f"RoPE expected floating-point q and k, got {q.dtype} and {k.dtype}")
        dtype = torch.promote_types(q.dtype, k.dtype)
        return torch.promote_types(dtype, torch.float32) if self.full_precision else dtype


class RotaryEmbedding(RotaryEmbeddingBase):
    """Rotates dimension i with dimension i + R/2, as GPT-NeoX, Llama and Hugging Face do."""

    forward = RotaryEmbeddingBase.rotate


class ComplexRotaryEmbedding(RotaryEmbeddingBase):
    """Rotates dimension 2i with dimension 2i + 1, as the original Llama code does.

    A pair is a complex number, multiplied by ``freqs_cis``. It is written in real arithmetic, which
    has bfloat16 and compiles.
    """

    interleaved = True
    forward = RotaryEmbeddingBase.rotate


class FusedRotaryEmbedding(RotaryEmbeddingBase):
    """The mathematics of :class:`RotaryEmbedding` for packed queries, keys and values."""

    def forward(
        self,
        qkv: Tensor,
        start_pos: int | None = None,
        pos_sin: Tensor | None = None,
        pos_cos: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        max_position: int | None = None,
    ) -> Tensor:
        """Rotate the queries and keys of ``qkv`` as :meth:`rotate` does.

        :param qkv: (B, T, 3, H, D).
        :returns: A copy in which queries and keys are rotated and values are as they were.
        :raises ValueError: As :meth:`rotate`.
        :raises TypeError: As :meth:`rotate`.
        :raises OLMoConfigurationError: As :meth:`rotate`.
        """
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(
                f"fused RoPE expected packed qkv (B, T, 3, H, {self.head_size}), got "
                f"{tuple(qkv.shape)}"
            )
        q, k, v = qkv.unbind(2)
        q, k = self.rotate(
            q, k, False, start_pos, pos_sin, pos_cos, freqs_cis,
            positions=positions, max_position=max_position,
        )  # fmt: skip
        return torch.stack((q, k, v), dim=2)


_CLASSES: dict[RoPEType, type[RotaryEmbeddingBase]] = {
    RoPEType.default: RotaryEmbedding,
    RoPEType.complex: ComplexRotaryEmbedding,
    RoPEType.fused: FusedRotaryEmbedding,
}
