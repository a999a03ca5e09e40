"""
What the chunked gated delta rule's forward and backward share: the chunk grid, the decays on it,
and the inverse of a unit lower triangular matrix.

Legend of shapes, used by all files beside it:

    B batch            T tokens            K key dim           V value dim
    H key heads        G value heads per key head              R = B * H * G rows (recurrences)
    C tokens a chunk   N chunks            n chunks of one block, handled together
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.nn.lengths import ends_before

QK_NORM_EPS = 1e-6
"""Added to the sum of squares when queries and keys are normalised (fla and Hugging Face agree)."""

# Substitution takes C small steps, products of blocks are GEMMs: this is where they meet.
_SUBSTITUTION_BLOCK = 32
_SMALLEST_CHUNK = 16

_CPU_BLOCK_BYTES = 6 << 20  # a block's scratch stays in the cache
_CUDA_BLOCK_BYTES = 2 << 30  # a block is all there is, unless memory forbids

_KEPT = threading.local()  # each thread's scratch by dtype and name


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RuleInputs(NamedTuple):
    """What every pass of the rule reads: arguments of :func:`.op.gated_delta_rule`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    cu_doc_lens: Tensor | None
    """Documents then lie one after another, in one row: B is 1."""
    scale: float
    normalize_qk: bool

    @classmethod
    def of(
        cls, tensors: Iterable[Tensor], cu_doc_lens: Tensor | None, scale: float, normalize_qk: bool
    ) -> RuleInputs:
        """
        :param tensors: q, k, v, g and beta.
        """
        q, k, v, g, beta = tensors
        return cls(q, k, v, g, beta, cu_doc_lens, scale, normalize_qk)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those that have gradients."""
        return self[:5]


@dataclass(frozen=True)
class ChunkGrid:
    """A (B, T) problem cut into chunks of C tokens, handled n at a time.

    T is padded with zeros on the left. On the right, the last token's own write would be followed
    by decays of exactly 1, whose gradients cancel in exact arithmetic only.
    """

    batch: int
    tokens: int
    key_heads: int
    group: int
    key_dim: int
    value_dim: int
    chunk: int
    block: int

    @staticmethod
    def of(q: Tensor, v: Tensor) -> ChunkGrid:
        """The grid for q (B, T, H, K) and v (B, T, HV, V), with sizes that suit q's device."""
        batch, tokens, key_heads, key_dim = q.shape
        value_heads, value_dim = v.shape[2:]
        on_cpu = q.device.type == "cpu"
        chunk = 32 if on_cpu else 64
        while chunk > _SMALLEST_CHUNK and chunk >= 2 * tokens:
            chunk //= 2
        grid = ChunkGrid(
            batch=batch,
            tokens=tokens,
            key_heads=key_heads,
            group=value_heads // key_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            chunk=chunk,
            block=1,
        )
        block = (_CPU_BLOCK_BYTES if on_cpu else _CUDA_BLOCK_BYTES) // grid.chunk_bytes
        return replace(grid, block=max(1, min(block, grid.chunks)))

    @property
    def chunk_bytes(self) -> int:
        """About the scratch that one chunk of all rows needs, in float32."""
        C, K, V = self.chunk, self.key_dim, self.value_dim
        return 4 * self.rows * (C * (4 * K + 3 * V + 4 * C) + K * V)

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    @property
    def value_heads(self) -> int:
        return self.key_heads * self.group

    @property
    def key_rows(self) -> int:
        return self.batch * self.key_heads

    @property
    def rows(self) -> int:
        return self.batch * self.value_heads

    @property
    def padding(self) -> int:
        return self.chunks * self.chunk - self.tokens

    def blocks(self, first: int = 0, stop: int | None = None) -> Iterator[slice]:
        """The chunks of each block, first to last, of those from ``first`` to before ``stop``."""
        stop = self.chunks if stop is None else stop
        for start in range(first, stop, self.block):
            yield slice(start, min(start + self.block, stop))

    def chunk_of(self, token: int) -> int:
        """The chunk that holds a token."""
        return (self.padding + token) // self.chunk

    def pad(self, x: Tensor) -> Tensor:
        """x (B, T, ...) as (B, N*C, ...); x itself where nothing is missing."""
        if not self.padding:
            return x
        return F.pad(x, (0, 0) * (x.dim() - 2) + (self.padding, 0))

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pad`, for a contiguous x."""
        return x[:, self.padding :].clone() if self.padding else x

    def chunked(self, x: Tensor) -> Tensor:
        """A padded x (B, N*C, heads, D) as a view (N, B, heads, C, D)."""
        return x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)

    def gates(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (B, T, HV) as a contiguous (N, R, C)."""
        chunked = self.pad(x).to(dtype).unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2)
        return chunked.reshape(self.chunks, self.rows, self.chunk).contiguous()

    def ungate(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gates`: (N, R, C) as a contiguous (B, T, HV)."""
        heads = x.view(self.chunks, self.batch, self.value_heads, self.chunk)
        # Flattening a single chunk leaves a view of it.
        return self.unpad(heads.permute(1, 0, 3, 2).flatten(1, 2)).contiguous()

    def state(self, x: Tensor) -> Tensor:
        """x (R, K, ...) as (B, HV, K, ...)."""
        return x.view(self.batch, self.value_heads, *x.shape[1:])

    def document_ids(self, cu_doc_lens: Tensor) -> Tensor:
        """The document of each position (N, C), for cu_doc_lens over the flattened tokens.

        Padding belongs to the first document, for which it changes nothing.
        """
        positions = torch.arange(
            -self.padding, self.tokens, device=cu_doc_lens.device, dtype=cu_doc_lens.dtype
        )
        return ends_before(cu_doc_lens[1:-1], positions).view(self.chunks, self.chunk)


@dataclass(frozen=True)
class Decays:
    """
    Every decay factor of the problem. All are exponentials of sums of g <= 0 and so at most 1;
    factors that would reach over a document start are 0.
    """

    log: Tensor
    """(N, R, C): sum of g from the chunk's start. float64 where there is one: differences of long
    sums are exponentiated, and float32 would leave 1e-4 of them at g = -80."""
    mask: Tensor
    """(C, C) or (N, 1, C, C): 1 where a position sees another, 0 where it does not."""
    from_start: Tensor
    """(N, R, C): of the incoming state at each position."""
    to_end: Tensor
    """(N, R, C): of each position's write in the outgoing state."""
    whole: Tensor
    """(N, R, 1, 1): of the incoming state in the outgoing one."""

    @staticmethod
    def of(grid: ChunkGrid, g: Tensor, cu_doc_lens: Tensor | None, dtype: torch.dtype) -> Decays:
        """The decays of g (B, T, HV), as ``dtype``."""
        exact = torch.float32 if g.device.type == "mps" else torch.float64
        log = grid.gates(g, exact).cumsum(-1)
        from_start = log.exp().to(dtype)
        to_end = (log[..., -1:] - log).exp_().to(dtype)
        whole = from_start[..., -1:].clone()
        hidden = torch.ones(grid.chunk, grid.chunk, dtype=torch.bool, device=g.device).triu_(1)
        if cu_doc_lens is not None:
            ids = grid.document_ids(cu_doc_lens)
            before = torch.cat((ids.new_zeros(1), ids[:-1, -1])).unsqueeze(-1)
            from_start = from_start * (ids == before).unsqueeze(1)
            to_end = to_end * (ids == ids[:, -1:]).unsqueeze(1)
            whole = whole * (ids[:, -1:] == before).unsqueeze(1)
            hidden = (hidden | (ids.unsqueeze(-1) != ids.unsqueeze(-2))).unsqueeze(1)
        mask = hidden.logical_not().to(dtype)
        return Decays(log, mask, from_start, to_end, whole.unsqueeze(-1))

    def pairwise(self, block: slice, out: Tensor) -> Tensor:
        """
        Gamma (n, R, C, C) of a block, written to ``out``: the decay from position j to position i
        at [i, j]; exactly 0 above the diagonal.
        """
        log = self.log[block]
        torch.sub(log.unsqueeze(-1), log.unsqueeze(-2), out=out)
        # Above the diagonal the exponential would overflow. On a CPU exp(-inf) costs twice exp(0).
        out.clamp_(max=0).exp_()
        return out.mul_(self.mask[block] if self.mask.dim() == 4 else self.mask)


class Workspace:
    """Named scratch of a block's size, cut for a shorter block.

    A name can serve several shapes in turn: little scratch stays in the cache. On a CPU each thread
    keeps the scratch of its calls, about 10 MB: every new page costs the system 2 microseconds, and
    where the allocator gives freed memory back that was a sixth of forward and backward at T 1024.
    """

    def __init__(self, grid: ChunkGrid, dtype: torch.dtype, device: torch.device) -> None:
        self._block = grid.block
        self._dtype, self._device = dtype, device
        self._memory: dict[str, Tensor] = {}
        # A single chunk of very many rows can be larger than a block should be.
        if device.type == "cpu" and grid.block * grid.chunk_bytes <= _CPU_BLOCK_BYTES:
            self._memory = _KEPT.__dict__.setdefault(str(dtype), self._memory)

    def __call__(self, name: str, n: int, *shape: int) -> Tensor:
        """An uninitialised contiguous (n, *shape); the same memory for each call of this name."""
        each = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < n * each:
            size = max(n, self._block) * each
            # An inference tensor could not be written to outside inference mode.
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=self._dtype, device=self._device)
            self._memory[name] = memory
        return memory[: n * each].view(n, *shape)


def invert_unit_lower(a: Tensor) -> Tensor:
    """(I + stril(a))^-1 for each (C, C) matrix of a (m, C, C), C a power of two.

    Blocks of 32 by substitution, larger ones by two GEMMs from
    [[P, 0], [L, Q]]^-1 = [[P', 0], [-Q' L P', Q']]. A Neumann product would be GEMMs alone, and
    wrong by 7e19 on correlated keys.
    """
    size = min(_SUBSTITUTION_BLOCK, a.shape[-1])
    blocks = a if size == a.shape[-1] else _diagonal_blocks(a, size)
    eye = torch.eye(size, dtype=a.dtype, device=a.device).expand(blocks.shape)
    # X (I + A) = I, not (I + A) X = I: row-major matrices then reach the solver as they are.
    solved = torch.linalg.solve_triangular(blocks, eye, upper=False, left=False, unitriangular=True)
    if blocks is a:
        return solved
    out = torch.zeros_like(a)
    _diagonal_blocks(out, size).copy_(solved)
    while size < a.shape[-1]:
        lower = _diagonal_blocks(a, 2 * size)[..., size:, :size]
        inverse = _diagonal_blocks(out, 2 * size)
        upper_left, lower_right = inverse[..., :size, :size], inverse[..., size:, size:]
        inverse[..., size:, :size] = (lower_right @ lower @ upper_left).neg_()
        size *= 2
    return out


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of x (m, C, C), as a view (m, C / size, size, size)."""
    blocks = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
