"""Cosines and sines by position: built once, grown by doubling, shared by layers.

Angles are computed in float64 and their cosines and sines stored in float32 (float64 for float64
inputs): a document then gets the same rotations at any offset, and logits depend on distances
alone, at position 10^6 too. Tables are derived data: they live in a :class:`BufferCache`, never in
a module's buffers, which ``to_empty`` would fill with garbage.
"""

from __future__ import annotations

import hashlib
import re
import struct
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.utils import compile_time_constant

__all__ = ["RoPETable"]

_MIN_ROWS = 2048
"""The smallest table. Tables double, so that growing inputs build few of them."""


class _Compiled:
    """The tables that compiled code reads, each an attribute named by all that it depends on.

    To a compiler they are inputs with a source of their own. A function that is marked as a
    compile-time constant may return tensors too, but AOTAutograd takes one tensor from each such
    function and no more.
    """


class _Lease:
    """Keeps an attribute of ``_COMPILED``: what holds a lease holds the table."""

    def __init__(self, name: str) -> None:
        _LEASES[name] = self
        weakref.finalize(self, _end_lease, name).atexit = False


_COMPILED = _Compiled()
_LEASES: weakref.WeakValueDictionary[str, _Lease] = weakref.WeakValueDictionary()
_LEASES_OF: weakref.WeakKeyDictionary[RoPETable, dict[str, _Lease]] = weakref.WeakKeyDictionary()


def _end_lease(name: str) -> None:
    if name not in _LEASES:
        delattr(_COMPILED, name)


class RoPETable:
    """The rotations of one choice of frequencies, (N, R): cosines, then sines. Immutable.

    :param inv_freqs: (R / 2,), radians per position.
    :param factor: Of all cosines and sines.
    :param cache: Where tables are kept.
    """

    def __init__(self, inv_freqs: Tensor, factor: float, cache: BufferCache | None) -> None:
        self._inv_freqs: tuple[float, ...] = tuple(inv_freqs.tolist())
        self._factor = factor
        self._cache = (BufferCache() if cache is None else cache).with_namespace("rope")
        values = struct.pack(f"={len(self._inv_freqs) + 1}d", *self._inv_freqs, factor)
        # All that a row depends on but its position. As text: compilers guard on it.
        self._key = hashlib.sha256(values).hexdigest()

    def rows(
        self,
        x: Tensor,
        time: int,
        dtype: torch.dtype,
        start_pos: int | None,
        positions: Tensor | None,
        max_position: int | None,
        buffers: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines for ``x``, (T, R / 2) or (B, T, R / 2), or R wide where buffers are.

        :param x: Of batch size B, T long in dimension ``time``.
        :param dtype: Of the result.
        :param buffers: Cosines and sines to read instead of this table.
        :raises ValueError: If the arguments don't fit together.
        :raises TypeError: If one is of the wrong type.
        """
        length = x.shape[time]
        if positions is None:
            if max_position is not None:
                raise ValueError("max_position has a meaning only together with positions")
            first = 0 if start_pos is None else _checked_start(start_pos)
            max_position = first + length
        else:
            if start_pos is not None:
                raise ValueError("give RoPE either start_pos or positions, not both")
            if positions.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"positions must be int32 or int64, got {positions.dtype}")
            if not isinstance(max_position, (int, torch.SymInt)):
                raise TypeError(
                    "positions need max_position, an int greater than all of them, "
                    f"got {max_position!r}"
                )
            if positions.shape != (length,) and positions.shape != (x.shape[0], length):
                raise ValueError(
                    f"positions must be of shape ({length},) or ({x.shape[0]}, {length}), "
                    f"got {tuple(positions.shape)}"
                )
            if positions.device != x.device:
                raise ValueError(f"positions are on {positions.device}, the queries on {x.device}")
        if buffers is None:
            wide = torch.promote_types(dtype, torch.float32)
            tables: Sequence[Tensor] = (self.read(max_position, x.device, wide),)
        else:
            tables = buffers
            if positions is None and buffers[0].shape[0] < max_position:
                raise ValueError(
                    "RoPE buffers must hold a row for each position from 0 to "
                    f"{max_position - 1}, got {buffers[0].shape[0]} rows"
                )
        if positions is None:
            tables = [t.narrow(0, first, length) for t in tables]
        else:
            try:  # unlike indexing, it refuses negative ones
                tables = [torch.embedding(t, positions) for t in tables]
            except IndexError as error:
                raise ValueError(
                    f"positions must lie in [0, max_position={max_position})"
                    if buffers is None
                    else "a document is longer than the RoPE buffers, which hold "
                    f"{buffers[0].shape[0]} positions"
                ) from error
        tables = [t.to(dtype) for t in tables]
        cos, sin = tables[0].chunk(2, dim=-1) if buffers is None else tables
        return cos, sin

    def row(
        self, position: int | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """One position's cosines (R / 2,), and its sines as :func:`.rotate_token` takes them.

        The layers of a model ask for the same row in turn, so the last one is kept with the table
        that it was read from, which is immutable.
        """
        position = 0 if position is None else _checked_start(position)
        table = self.read(position + 1, device, torch.promote_types(dtype, torch.float32))
        kept: tuple[int, torch.dtype, Tensor, Tensor] | None = getattr(table, "_last_row", None)
        if kept is None or kept[:2] != (position, dtype):
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = table[position].to(dtype).chunk(2)
                kept = position, dtype, cos, torch.stack((-sin, sin))
            if type(cos) is Tensor:  # not one that a fake mode made
                table._last_row = kept  # type: ignore[attr-defined]
        return kept[2:]

    def read(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A table of at least ``length`` rows."""
        if torch.compiler.is_dynamo_compiling():
            # ``length`` may be symbolic, and this is its only comparison.
            rows = self._num_rows(self._key, device, dtype)
            while rows < length:
                rows *= 2
            table: Tensor = getattr(_COMPILED, self._publish(self._key, rows, device, dtype))
            return table
        kept = self._cache.get((self._key, device, dtype))
        if kept is not None and kept.shape[0] >= length:
            return kept
        rows = _MIN_ROWS
        while rows < length:
            rows *= 2
        return self._grow(rows, device, dtype)

    @compile_time_constant
    def _num_rows(self, key: str, device: torch.device, dtype: torch.dtype) -> int:
        table = self._cache.get((key, device, dtype))
        return _MIN_ROWS if table is None else table.shape[0]

    @compile_time_constant
    def _publish(self, key: str, rows: int, device: torch.device, dtype: torch.dtype) -> str:
        """Make a table an attribute of ``_COMPILED``, at least as long as this object lives."""
        name = re.sub(r"\W", "_", f"rows_{rows}_{device}_{dtype}_{key}")
        lease = _LEASES.get(name)
        if lease is None:
            table = self._cache.get((key, device, dtype))
            if table is None or table.shape[0] < rows:
                table = self._grow(rows, device, dtype)
            # As torch._dynamo.mark_static and mark_static_address do, without their import: a table
            # of another size is another table, and a CUDA graph need not copy it.
            table._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
            table._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
            setattr(_COMPILED, name, table)
            lease = _Lease(name)
        _LEASES_OF.setdefault(self, {})[name] = lease
        return name

    def _grow(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        table = self._build(rows, device, dtype)
        if type(table) is Tensor:  # not one that a tracer or a fake mode made
            self._cache[self._key, device, dtype] = table
        return table

    def _build(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured and RoPE has no table of {rows} rows yet; "
                "call warmup_cache(max_seq_len, device) before the capture"
            )
        # An inference tensor could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            # On the CPU: it has float64 everywhere, and all devices get the same table.
            positions = torch.arange(rows, dtype=torch.float64, device="cpu")
            angles = torch.outer(
                positions, torch.tensor(self._inv_freqs, dtype=torch.float64, device="cpu")
            )
            table = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(self._factor)
            return table.to(dtype).to(device)


def _checked_start(start_pos: int) -> int:
    if isinstance(start_pos, bool) or not isinstance(start_pos, (int, torch.SymInt)):
        raise TypeError(f"start_pos must be an int, got {start_pos!r}")
    if start_pos < 0:
        raise ValueError(f"start_pos must not be negative, got {start_pos}")
    return start_pos
