"""The chunked gated delta rule, forward. Shapes as in ``chunks``.

Per chunk, with c the running sum of g, Gamma[i, j] = exp(c_i - c_j) for i >= j and S the incoming
state (WY form of https://arxiv.org/abs/2406.06484, gated as in https://arxiv.org/abs/2412.06464)::

    T = (I + stril(beta K K^T * Gamma))^-1
    W = T (beta e^c K)          what the incoming state makes each token overwrite
    U = T (beta V) - W S        what each token writes
    O = e^c Q S + tril(Q K^T * Gamma) U
    S' = e^(c_C) S + (e^(c_C - c) K)^T U

Everything but ``U -= W S`` and ``S'`` is independent of the other chunks, and so is done for a
block of chunks at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import (
    QK_NORM_EPS,
    ChunkGrid,
    Decays,
    RuleInputs,
    Workspace,
    accumulation_dtype,
    invert_unit_lower,
)

Room = Callable[..., Tensor]
"""Memory for a tensor: called as a :class:`.chunks.Workspace` is, with a name and a shape."""


@dataclass(frozen=True)
class Saved:
    """What the backward pass needs beyond the inputs."""

    states: Tensor
    """(N, R, K, V): the incoming state of each chunk."""
    updates: Tensor
    """(N, R, C, V): U."""
    inverses: Tensor
    """(N, R, C, C): T."""
    scores: Tensor | None = None
    """(N, R, C, C): tril(Q K^T * Gamma) without the queries' scale and length. Triton's alone."""
    erasers: Tensor | None = None
    """(N, R, C, K): W. Triton's alone."""

    @staticmethod
    def shapes(grid: ChunkGrid) -> tuple[tuple[int, ...], ...]:
        """The shape of each field."""
        N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
        return (N, R, K, V), (N, R, C, V), (N, R, C, C)


def chunked_forward(
    x: RuleInputs, initial_state: Tensor | None, *, save: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """The output (B, T, HV, V), the final state (B, HV, K, V), and with ``save`` the rest.

    :param initial_state: (B, HV, K, V); None for zero.
    """
    forward = Forward.of(x, save)
    state = forward.state(initial_state)
    for block in forward.grid.blocks():
        state = forward.advance(block, forward.prepare(block), state)
    return forward.results(state)


class Prepared(NamedTuple):
    """All that is known of chunks before their incoming states are."""

    readers: Tensor
    """(n, R, C, K): e^c Q."""
    writers: Tensor
    """(n, R, C, K): e^(c_C - c) K."""
    w: Tensor
    """(n, R, C, K): W."""
    updates: Tensor
    """(n, R, C, V): T (beta V), of which :meth:`Forward.advance` makes U in place."""
    attention: Tensor
    """(n, R, C, C): tril(Q K^T * Gamma)."""


@dataclass(frozen=True)
class Forward:
    """A forward pass: each block is prepared, in any order, and advanced, first to last."""

    grid: ChunkGrid
    q: Tensor
    k: Tensor
    v: Tensor
    betas: Tensor
    decays: Decays
    factors: tuple[Tensor | float, Tensor | float]
    out: Tensor
    saved: Saved | None
    work: Workspace

    @staticmethod
    def of(x: RuleInputs, save: bool) -> Forward:
        q, k, v, g, beta = x.tensors
        grid = ChunkGrid.of(q, v)
        dtype = accumulation_dtype(q.dtype)
        shapes = Saved.shapes(grid)
        return Forward(
            grid=grid,
            q=grid.chunked(grid.pad(q)),
            k=grid.chunked(grid.pad(k)),
            v=grid.chunked(grid.pad(v)),
            betas=grid.gates(beta, dtype),
            decays=Decays.of(grid, g, x.cu_doc_lens, dtype),
            factors=query_key_factors(grid, q, k, x.scale, x.normalize_qk),
            out=v.new_empty(grid.batch, grid.chunks * grid.chunk, grid.value_heads, grid.value_dim),
            saved=Saved(*(q.new_empty(s, dtype=dtype) for s in shapes)) if save else None,
            work=Workspace(grid, dtype, q.device),
        )

    def state(self, initial: Tensor | None) -> Tensor:
        """The first incoming state (R, K, V), of one (B, HV, K, V); None for zero."""
        state = self.betas.new_zeros(self.grid.rows, self.grid.key_dim, self.grid.value_dim)
        return state if initial is None else state.copy_(initial.reshape(state.shape))

    def prepare(self, block: slice, room: Room | None = None) -> Prepared:
        """
        :param room: For the result; without it, that is scratch until the next call.
        """
        grid, work, saved = self.grid, self.work, self.saved
        room = room or work
        rows = (block.stop - block.start, grid.rows, grid.chunk)
        updates = saved.updates[block] if saved else room("updates", *rows, grid.value_dim)
        qk = load_queries_keys(grid, self.q, self.k, self.factors, block, work)
        gamma = self.decays.pairwise(block, work("gamma", *rows, grid.chunk))
        attention, system = scores(grid, qk, gamma, work, room).unbind(2)
        beta = self.betas[block].unsqueeze(-1)
        inverses = invert_unit_lower(torch.mul(system, beta, out=gamma).flatten(0, 1))
        if saved:
            saved.inverses[block].copy_(inverses.view_as(gamma))
        readers, writers, erasers = readers_writers(
            grid, qk, self.decays, self.betas, block, work, room
        )

        values = self._values(rows[0])
        torch.mul(self.v[block], beta.view(*values.shape[:-1], 1), out=values)
        torch.bmm(inverses, values.flatten(0, 2), out=updates.flatten(0, 1))
        w = room("w", *rows, grid.key_dim)
        torch.bmm(inverses, erasers.flatten(0, 1), out=w.flatten(0, 1))
        return Prepared(readers, writers, w, updates, attention)

    def advance(self, block: slice, prepared: Prepared, state: Tensor) -> Tensor:
        """Write the block's outputs, complete its updates, return its outgoing state."""
        readers, writers, w, updates, attention = prepared
        n, R, K, V = updates.shape[0], *state.shape
        states = self.saved.states[block] if self.saved else self.work("states", n, R, K, V)
        state = _scan(w, writers, self.decays.whole[block], updates, states, state)
        values = self._values(n)
        inner = values.flatten(0, 2)
        torch.bmm(attention.flatten(0, 1), updates.flatten(0, 1), out=inner)
        inner.baddbmm_(readers.flatten(0, 1), states.flatten(0, 1))
        self.grid.chunked(self.out)[block].copy_(values)
        return state

    def results(self, state: Tensor) -> tuple[Tensor, Tensor, Saved | None]:
        """What :func:`chunked_forward` returns, from the last outgoing state."""
        grid = self.grid
        return grid.unpad(self.out), grid.state(state), self.saved

    def _values(self, n: int) -> Tensor:
        grid = self.grid
        return self.work("values", n, grid.batch, grid.value_heads, grid.chunk, grid.value_dim)


def query_key_factors(
    grid: ChunkGrid, q: Tensor, k: Tensor, scale: float, normalize_qk: bool
) -> tuple[Tensor | float, Tensor | float]:
    """What queries and keys are multiplied by: scale and, if asked, the inverse of their length.

    Numbers, or tensors (N, B, H, C, 1).
    """
    if not normalize_qk:
        return scale, 1.0
    dtype = accumulation_dtype(q.dtype)
    lengths = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) for x in (q, k))
    q_factor, k_factor = (
        grid.chunked(grid.pad(x.square_().add_(QK_NORM_EPS).rsqrt_())) for x in lengths
    )
    return q_factor.mul_(scale), k_factor


def load_queries_keys(
    grid: ChunkGrid,
    q: Tensor,
    k: Tensor,
    factors: tuple[Tensor | float, Tensor | float],
    block: slice,
    work: Workspace,
) -> Tensor:
    """
    A block's scaled queries and keys as one (n, B, H, 2, C, K), so that a GEMM serves both, from
    :meth:`ChunkGrid.chunked` ones.
    """
    n = block.stop - block.start
    qk = work("qk", n, grid.batch, grid.key_heads, 2, grid.chunk, grid.key_dim)
    for x, factor, out in zip((q, k), factors, qk.unbind(3), strict=True):
        torch.mul(x[block], factor[block] if isinstance(factor, Tensor) else factor, out=out)
    return qk


def scores(
    grid: ChunkGrid, qk: Tensor, gamma: Tensor, work: Workspace, room: Room | None = None
) -> Tensor:
    """``Q K^T * Gamma`` and ``K K^T * Gamma`` as (n, R, 2, C, C); both see the diagonal."""
    n, rows, G, C = qk.shape[0], grid.key_rows, grid.group, grid.chunk
    raw = work("raw scores", n, rows, 1, 2, C, C)
    keys = qk[:, :, :, 1].flatten(0, 2)
    torch.bmm(qk.view(n * rows, 2 * C, -1), keys.transpose(1, 2), out=raw.view(-1, 2 * C, C))
    gated = (room or work)("scores", n, rows, G, 2, C, C)
    torch.mul(raw, gamma.view(n, rows, G, 1, C, C), out=gated)
    return gated.view(n, grid.rows, 2, C, C)


def readers_writers(
    grid: ChunkGrid,
    qk: Tensor,
    decays: Decays,
    betas: Tensor,
    block: slice,
    work: Workspace,
    room: Room | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What meets a state, each (n, R, C, K): ``e^c Q`` reads the incoming one, ``e^(c_C - c) K``
    writes to the outgoing one, and ``beta e^c K`` is what T makes W of. ``room`` is for the first
    two."""
    n, G, C, K = qk.shape[0], grid.group, grid.chunk, grid.key_dim
    q, k = qk.view(n, grid.key_rows, 1, 2, C, K).unbind(3)
    from_start = decays.from_start[block]
    factors = from_start, decays.to_end[block], betas[block] * from_start
    out = []
    for name, x, factor in zip(("readers", "writers", "erasers"), (q, k, k), factors, strict=True):
        target = (work if name == "erasers" else room or work)(name, n, grid.key_rows, G, C, K)
        torch.mul(x, factor.view(*target.shape[:-1], 1), out=target)
        out.append(target.view(n, grid.rows, C, K))
    return out[0], out[1], out[2]


def _scan(
    w: Tensor, writers: Tensor, whole: Tensor, updates: Tensor, states: Tensor, state: Tensor
) -> Tensor:
    """Complete ``updates``, fill ``states`` with each chunk's incoming one, return the last."""
    last = torch.empty_like(state)
    states[0].copy_(state)
    befores = states.unbind(0)
    # unbind makes all the views in one call: a step is three kernels and nothing else.
    for w_chunk, k, decay, u, before, after in zip(
        w.unbind(0),
        writers.transpose(-1, -2).unbind(0),
        whole.unbind(0),
        updates.unbind(0),
        befores,
        (*befores[1:], last),
        strict=True,
    ):
        u.baddbmm_(w_chunk, before, alpha=-1)
        torch.mul(before, decay, out=after).baddbmm_(k, u)
    return last
