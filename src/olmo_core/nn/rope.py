"""Rotary position embeddings (arXiv:2104.09864).

Shapes: B batch, T sequence, H query heads, Hkv key heads, D head_dim, R rotated dimensions of a
head, N rows of a table.

Angles are computed in float64 and their cosines and sines stored in float32 (float64 for float64
inputs): a document then gets the same rotations at any offset, and logits depend on distances
alone, at position 10^6 too. Tables are derived data: they live in a :class:`BufferCache`, never in
a module's buffers, which ``to_empty`` would fill with garbage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from olmo_core.config import Config, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.functional import compute_dtype
from olmo_core.nn.rope_scaling import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEScalingConfig,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
    inverse_frequencies,
)
from olmo_core.utils import compile_time_constant

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
    "rotate_halves",
    "rotate_pairs",
]

_MIN_ROWS = 2048
"""The smallest table. Tables double, so that growing inputs build few of them."""


class RoPEType(StrEnum):
    """The implementations by name."""

    default = "default"
    """:class:`RotaryEmbedding`"""
    complex = "complex"
    """:class:`ComplexRotaryEmbedding`"""
    fused = "fused"
    """:class:`FusedRotaryEmbedding`"""


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

    def build(self, head_dim: int, cache: BufferCache | None = None) -> RotaryEmbeddingBase:
        """Build the module.

        :param head_dim: The dimension of a head.
        :param cache: Where tables are kept; layers that share it share tables.
        :raises OLMoConfigurationError: For an option out of range, or if the number of rotated
            dimensions is not even.
        """
        return _CLASSES[self.name](
            head_dim=head_dim,
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
    """What all rotary embeddings share; use a subclass.

    :param head_dim: D.
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
        head_dim: int,
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
        rotary_dim = int(head_dim * partial_rotary_factor)
        if rotary_dim < 2 or rotary_dim % 2:
            raise OLMoConfigurationError(
                "RoPE rotates pairs of dimensions: head_dim * partial_rotary_factor must be even "
                f"and at least 2, got {head_dim} * {partial_rotary_factor} = {rotary_dim}"
            )
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.theta = float(theta)
        self.full_precision = full_precision
        self.scaling = scaling
        self._cache = (BufferCache() if cache is None else cache).with_namespace("rope")
        self._inv_freqs()  # raises for a bad scaling now rather than at the first forward
        # Everything that a table depends on, as text: torch.compile guards on it, so that layers
        # that share compiled code do not share the table of the first.
        self._table_key = f"theta={self.theta!r} rotary_dim={rotary_dim} scaling={scaling!r}"

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, {self._table_key}, full_precision={self.full_precision}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        positions: Tensor | None = None,
        pos_sin: Tensor | None = None,
        pos_cos: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        max_position: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys.

        Without ``positions`` and buffers, row t is rotated to position t.

        :param q: (B, T, H, D).
        :param k: (B, T, Hkv, D).
        :param positions: (T,) or (B, T), int32 or int64, not negative.
        :param pos_sin: (T, R), applied row by row, from :meth:`get_buffers`; with ``pos_cos``.
        :param pos_cos: (T, R).
        :param freqs_cis: (T, R / 2), complex, for :class:`ComplexRotaryEmbedding`.
        :param max_position: Greater than every position; needed with ``positions``, whose values
            are not read on the host.
        :returns: Rotated copies of q and k, in their dtypes.
        :raises ValueError: For shapes that do not fit, or options that exclude each other.
        :raises TypeError: For positions that are not integers, or q and k that are not
            floating-point.
        :raises OLMoConfigurationError: For buffers in lower precision than asked for.
        """
        self._check_inputs(q, k)
        dtype = torch.promote_types(q.dtype, k.dtype)
        if self.full_precision:
            dtype = compute_dtype(dtype)
        if pos_sin is not None or pos_cos is not None or freqs_cis is not None:
            if positions is not None or max_position is not None:
                raise ValueError(
                    "RoPE buffers are applied row by row: give either them, already sharded like "
                    "the sequence, or positions with max_position, not both"
                )
            cos, sin = self._check_buffers(q, dtype, pos_sin, pos_cos, freqs_cis)
        else:
            cos, sin = self._look_up(q, dtype, positions, max_position)
        cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

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

        Under ``torch.compile`` it is a constant of the graph.

        :param max_seq_len: How many rows are needed.
        :param device: Of the queries.
        :param dtype: float32, or float64 for float64 queries.
        :returns: Sines and cosines, each (N, R / 2), N >= ``max_seq_len``, views with row stride R.
        """
        cos, sin = self._table(max_seq_len, torch.device(device), dtype).chunk(2, dim=-1)
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

    def _check_inputs(self, q: Tensor, k: Tensor) -> None:
        if q.dim() != 4 or k.dim() != 4 or q.shape[-1] != self.head_dim:
            raise ValueError(
                f"RoPE expected q (B, T, H, {self.head_dim}) and k (B, T, Hkv, {self.head_dim}), "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if k.shape[-1] != self.head_dim or q.shape[:2] != k.shape[:2]:
            raise ValueError(
                "RoPE expected q and k of the same batch size, length and head_dim "
                f"{self.head_dim}, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if not q.is_floating_point() or not k.is_floating_point():
            raise TypeError(f"RoPE expected floating-point q and k, got {q.dtype} and {k.dtype}")

    def _check_buffers(
        self,
        q: Tensor,
        dtype: torch.dtype,
        pos_sin: Tensor | None,
        pos_cos: Tensor | None,
        freqs_cis: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The given buffers as cosines and sines that broadcast over (T, R) or (T, R / 2)."""
        width = self.rotary_dim
        if self.interleaved:
            if freqs_cis is None or pos_sin is not None or pos_cos is not None:
                raise ValueError("complex RoPE takes freqs_cis, neither pos_sin nor pos_cos")
            if not freqs_cis.is_complex():
                raise TypeError(f"freqs_cis must be complex, got {freqs_cis.dtype}")
            buffers, width = (freqs_cis.real, freqs_cis.imag), width // 2
        else:
            if pos_sin is None or pos_cos is None or freqs_cis is not None:
                raise ValueError(
                    f"{type(self).__name__} takes pos_sin and pos_cos together, not freqs_cis"
                )
            buffers = (pos_cos, pos_sin)
        for buffer in buffers:
            if buffer.shape != (q.shape[1], width):
                raise ValueError(
                    f"RoPE buffers must hold a row for each of the input's {q.shape[1]} positions, "
                    f"shape ({q.shape[1]}, {width}), got {tuple(buffer.shape)}"
                )
            if buffer.device != q.device:
                raise ValueError(f"RoPE buffers are on {buffer.device}, the queries on {q.device}")
            if torch.promote_types(buffer.dtype, dtype) != buffer.dtype:
                raise OLMoConfigurationError(
                    f"RoPE is to be computed in {dtype}, but got a table in {buffer.dtype}, whose "
                    "angles are too coarse. If FSDP cast it, set cast_forward_inputs=False; "
                    "for float64 call get_buffers(..., dtype=torch.float64); "
                    "otherwise set full_precision=False"
                )
        return buffers

    def _look_up(
        self, q: Tensor, dtype: torch.dtype, positions: Tensor | None, max_position: int | None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (T, R / 2) or (B, T, R / 2), from the table."""
        batch, length = q.shape[:2]
        dtype = compute_dtype(dtype)
        if positions is None:
            if max_position is not None:
                raise ValueError("max_position has a meaning only together with positions")
            rows = self._table(length, q.device, dtype).narrow(0, 0, length)
        else:
            if positions.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"positions must be int32 or int64, got {positions.dtype}")
            if not isinstance(max_position, (int, torch.SymInt)):
                raise TypeError(
                    "positions need max_position, an int greater than all of them, "
                    f"got {max_position!r}"
                )
            if positions.shape != (length,) and positions.shape != (batch, length):
                raise ValueError(
                    f"positions must be of shape ({length},) or ({batch}, {length}), "
                    f"got {tuple(positions.shape)}"
                )
            if positions.device != q.device:
                raise ValueError(f"positions are on {positions.device}, the queries on {q.device}")
            table = self._table(max_position, q.device, dtype)
            try:
                rows = torch.embedding(
                    table, positions
                )  # unlike indexing, it refuses negative ones
            except IndexError as error:
                raise ValueError(
                    f"positions must lie in [0, max_position={max_position})"
                ) from error
        cos, sin = rows.chunk(2, dim=-1)
        return cos, sin

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotate = rotate_pairs if self.interleaved else rotate_halves
        if self.rotary_dim == self.head_dim:
            return rotate(x.to(cos.dtype), cos, sin).to(x.dtype)
        head, rest = x.split((self.rotary_dim, self.head_dim - self.rotary_dim), dim=-1)
        return torch.cat((rotate(head.to(cos.dtype), cos, sin).to(x.dtype), rest), dim=-1)

    def _inv_freqs(self) -> tuple[Tensor, float]:
        if self.scaling is None:
            return inverse_frequencies(self.theta, self.rotary_dim), 1.0
        scaling = self.scaling
        return scaling.compute_inv_freqs(self.theta, self.rotary_dim), scaling.rescale_factor

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A table of at least ``length`` rows, (N, R): cosines, then sines."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        # Under torch.compile ``length`` may be symbolic, and this is its only comparison.
        rows = self._num_rows(self._table_key, device, dtype)
        while rows < length:
            rows *= 2
        return self._constant_table(self._table_key, rows, device, dtype)

    @compile_time_constant
    def _num_rows(self, key: str, device: torch.device, dtype: torch.dtype) -> int:
        table = self._cache.get((key, str(device), dtype))
        return _MIN_ROWS if table is None else table.shape[0]

    @compile_time_constant
    def _constant_table(
        self, key: str, rows: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        cache_key = (key, str(device), dtype)
        table = self._cache.get(cache_key)
        if table is None or table.shape[0] < rows:
            table = self._build_table(rows, device, dtype)
            if type(table) is Tensor:  # not one that a tracer or a fake mode made
                self._cache[cache_key] = table
        return table

    def _build_table(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured and RoPE has no table of {rows} rows yet; "
                "call warmup_cache(max_seq_len, device) before the capture"
            )
        # An inference tensor could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            inv_freqs, factor = self._inv_freqs()
            # On the CPU: it has float64 everywhere, and all devices get the same table.
            angles = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * inv_freqs
            table = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(factor)
            table = table.to(dtype).to(device)
        # As torch._dynamo.mark_static does: a table of another size is another constant.
        table._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
        return table


class RotaryEmbedding(RotaryEmbeddingBase):
    """Rotates dimension i with dimension i + R/2, as GPT-NeoX, Llama and Hugging Face do."""


class FusedRotaryEmbedding(RotaryEmbedding):
    """The same mathematics as :class:`RotaryEmbedding`, for layers that fuse it into a kernel."""


class ComplexRotaryEmbedding(RotaryEmbeddingBase):
    """Rotates dimension 2i with dimension 2i + 1, as the original Llama code does.

    A pair is a complex number, multiplied by ``freqs_cis``. It is written in real arithmetic, which
    has bfloat16 and compiles.
    """

    interleaved = True


_CLASSES: dict[RoPEType, type[RotaryEmbeddingBase]] = {
    RoPEType.default: RotaryEmbedding,
    RoPEType.complex: ComplexRotaryEmbedding,
    RoPEType.fused: FusedRotaryEmbedding,
}


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x_i, x_{i + R/2}) by the i-th angle.

    :param x: (..., R).
    :param cos: (..., R / 2), or (..., R) with an angle for each half; broadcasts against ``x``.
    :param sin: As ``cos``.
    """
    first, second = x.chunk(2, dim=-1)
    if cos.shape[-1] == x.shape[-1]:
        return x * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x_{2i}, x_{2i + 1}) by the i-th angle.

    :param x: (..., R).
    :param cos: (..., R / 2); broadcasts against ``x``'s pairs.
    :param sin: As ``cos``.
    """
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2)
