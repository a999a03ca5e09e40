"""The chunked gated delta rule, forward. Shapes as in ``gated_delta_rule_chunks``.

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

from dataclasses import dataclass

import torch
from torch import Tensor

from .gated_delta_rule_chunks import (
    QK_NORM_EPS,
    ChunkGrid,
    Decays,
    Workspace,
    accumulation_dtype,
    invert_unit_lower,
)

__all__ = ["Saved", "chunked_forward", "load_queries_keys", "query_key_factors", "scaled", "scores"]


@dataclass(frozen=True)
class Saved:
    """What the backward pass needs beyond the inputs."""

    states: Tensor
    """(N, R, K, V): the incoming state of each chunk."""
    updates: Tensor
    """(N, R, C, V): U."""
    inverses: Tensor
    """(N, R, C, C): T."""

    @staticmethod
    def shapes(grid: ChunkGrid) -> tuple[tuple[int, ...], ...]:
        """The shape of each field."""
        N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
        return (N, R, K, V), (N, R, C, V), (N, R, C, C)


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_doc_lens: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """The output (B, T, HV, V), the final state (B, HV, K, V), and with ``save`` the rest.

    The arguments are those of :func:`.gated_delta_rule.gated_delta_rule`, already checked; B is 1
    where ``cu_doc_lens`` is given.
    """
    grid = ChunkGrid.of(q, v)
    dtype = accumulation_dtype(q.dtype)
    work = Workspace(grid, dtype, q.device)
    decays = Decays.of(grid, g, cu_doc_lens, dtype)
    betas = grid.gates(beta, dtype)
    factors = query_key_factors(grid, q, k, scale, normalize_qk)
    q, k, v = (grid.pad(x) for x in (q, k, v))

    new = q.new_empty
    N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    out = new(grid.batch, N * C, grid.value_heads, V, dtype=v.dtype)
    saved = None
    if save:
        saved = Saved(*(new(shape, dtype=dtype) for shape in Saved.shapes(grid)))
    state = new(R, K, V, dtype=dtype)
    if initial_state is None:
        state.zero_()
    else:
        state.copy_(initial_state.reshape(R, K, V))

    for block in grid.blocks():
        n = block.stop - block.start
        states = saved.states[block] if saved else work("states", n, R, K, V)
        updates = saved.updates[block] if saved else work("updates", n, R, C, V)

        qk = load_queries_keys(grid, q, k, factors, block, work)
        attention, system = scores(
            grid, qk, decays.pairwise(block, work("gamma", n, R, C, C)), work
        )
        system.mul_(betas[block].unsqueeze(-1))
        inverses = invert_unit_lower(system.flatten(0, 1))
        if saved:
            saved.inverses[block].copy_(inverses.view(n, R, C, C))

        _prepare_updates(grid, qk, v, decays, betas, block, inverses, updates, work)
        state = _scan(grid, qk, decays, block, updates, states, state, work)

        read = scaled(grid, qk, 0, decays.from_start[block], work("queries", n, R, C, K))
        inner = work("out", n, R, C, V)
        torch.bmm(attention.flatten(0, 1), updates.flatten(0, 1), out=inner.flatten(0, 1))
        inner.flatten(0, 1).baddbmm_(read.flatten(0, 1), states.flatten(0, 1))
        grid.view(out, block).copy_(inner.view(n, grid.batch, grid.value_heads, C, V))

    final = state.view(grid.batch, grid.value_heads, K, V)
    return grid.unpad(out), final, saved


def query_key_factors(
    grid: ChunkGrid, q: Tensor, k: Tensor, scale: float, normalize_qk: bool
) -> tuple[Tensor | float, Tensor | float]:
    """What queries and keys are multiplied by: scale and, if asked, the inverse of their length.

    Numbers, or tensors (B, N*C, H, 1).
    """
    if not normalize_qk:
        return scale, 1.0
    dtype = accumulation_dtype(q.dtype)
    lengths = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) for x in (q, k))
    q_factor, k_factor = (grid.pad(x.square_().add_(QK_NORM_EPS).rsqrt_()) for x in lengths)
    return q_factor.mul_(scale), k_factor


def load_queries_keys(
    grid: ChunkGrid,
    q: Tensor,
    k: Tensor,
    factors: tuple[Tensor | float, Tensor | float],
    block: slice,
    work: Workspace,
) -> Tensor:
    """A block's scaled queries and keys as one (n, B, H, 2, C, K), so that a GEMM serves both."""
    n = block.stop - block.start
    qk = work("qk", n, grid.batch, grid.key_heads, 2, grid.chunk, grid.key_dim)
    for i, (x, factor) in enumerate(zip((q, k), factors, strict=True)):
        if isinstance(factor, Tensor):
            factor = grid.view(factor, block)
        torch.mul(grid.view(x, block), factor, out=qk[:, :, :, i])
    return qk


def scores(grid: ChunkGrid, qk: Tensor, gamma: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """``Q K^T * Gamma`` and ``K K^T * Gamma``, each (n, R, C, C); both see the diagonal."""
    n, rows, C = qk.shape[0], grid.key_rows, grid.chunk
    raw = work("raw scores", n, rows, 2 * C, C)
    keys = qk[:, :, :, 1].flatten(0, 2)
    torch.bmm(qk.view(n * rows, 2 * C, -1), keys.transpose(1, 2), out=raw.flatten(0, 1))
    gated = []
    for name, half in (("attention", raw[:, :, :C]), ("system", raw[:, :, C:])):
        target = work(name, n, rows, grid.group, C, C)
        torch.mul(half.unsqueeze(2), gamma.view(target.shape), out=target)
        gated.append(target.view(gamma.shape))
    return gated[0], gated[1]


def _prepare_updates(
    grid: ChunkGrid,
    qk: Tensor,
    v: Tensor,
    decays: Decays,
    betas: Tensor,
    block: slice,
    inverses: Tensor,
    updates: Tensor,
    work: Workspace,
) -> None:
    """Writes ``T (beta V)`` to ``updates`` and ``W`` to the workspace."""
    n, R, C, K, V = qk.shape[0], grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    beta = betas[block]
    values = work("values", n, grid.batch, grid.value_heads, C, V)
    torch.mul(grid.view(v, block), beta.view(*values.shape[:-1], 1), out=values)
    torch.bmm(inverses, values.view(n * R, C, V), out=updates.flatten(0, 1))
    # T (beta e^c K): its factors go to T's columns, which are fewer, and K serves a whole group.
    columns = (beta * decays.from_start[block]).view(n * R, 1, C)
    scaled_inverses = torch.mul(inverses, columns, out=work("inverses", n, R, C, C).flatten(0, 1))
    keys = qk[:, :, :, 1].flatten(0, 2)
    w = work("w", n, R, C, K).view(n * grid.key_rows, grid.group * C, K)
    torch.bmm(scaled_inverses.view(n * grid.key_rows, grid.group * C, C), keys, out=w)


def _scan(
    grid: ChunkGrid,
    qk: Tensor,
    decays: Decays,
    block: slice,
    updates: Tensor,
    states: Tensor,
    state: Tensor,
    work: Workspace,
) -> Tensor:
    """Complete ``updates``, fill ``states`` with each chunk's incoming one, return the last."""
    n, R, C, K = qk.shape[0], grid.rows, grid.chunk, grid.key_dim
    keys = scaled(grid, qk, 1, decays.to_end[block], work("keys", n, R, C, K))
    last = torch.empty_like(state)
    states[0].copy_(state)
    # unbind makes all the views in one call: a step is three kernels and nothing else.
    for u, w, k, decay, before, after in zip(
        updates.unbind(0),
        work("w", n, R, C, K).unbind(0),
        keys.transpose(-1, -2).unbind(0),
        decays.whole[block].unbind(0),
        states.unbind(0),
        (*states[1:].unbind(0), last),
        strict=True,
    ):
        u.baddbmm_(w, before, alpha=-1)
        torch.mul(before, decay, out=after).baddbmm_(k, u)
    return last


def scaled(grid: ChunkGrid, qk: Tensor, which: int, factor: Tensor, out: Tensor) -> Tensor:
    """Queries (0) or keys (1) with each token multiplied by its value head's factor (n, R, C)."""
    n, _, C, K = out.shape
    x = qk[:, :, :, which].unsqueeze(3)
    target = out.view(n, grid.batch, grid.key_heads, grid.group, C, K)
    torch.mul(x, factor.view(*target.shape[:-1], 1), out=target)
    return out
