"""The chunked gated delta rule, backward. Shapes as in ``gated_delta_rule_chunks``.

With the forward's Q (scaled), K, Gamma, T, U, S of a chunk, P = tril(Q K^T * Gamma), dO the
output's gradient and dS' that of the outgoing state, and X = beta (V - e^c K S), of which U = T X::

    dU = P^T dO + (e^(c_C - c) K) dS'
    dX = T^T dU
    dS = (e^c Q)^T dO + e^(c_C) dS' - (beta e^c K)^T dX       the next step's dS'
    dP = tril(dO U^T) * Gamma          dA = -stril(dX U^T) * Gamma, of A = stril(beta K K^T * Gamma)
    dQ = e^c (dO S^T) + dP K
    dK = beta (dA K - e^c (dX S^T)) + (beta dA)^T K + dP^T Q + e^(c_C - c) (U dS'^T)
    dV = beta dX
    dbeta = rows of <dX, V> + <dA K - e^c (dX S^T), K>

An exponent c_i enters wherever q_i or k_i does with the same sign, and k_j with the other, so its
gradient is q dq - k dk taken over the terms above. Terms whose exponent is identically 0 (P's
diagonal, the last token's own write) cancel there in exact arithmetic only: at g = -80 they leave
an error of 2e28 times the gradient. They are kept out, and added to dQ and dK at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gated_delta_rule_chunks import ChunkGrid, Decays, Workspace, accumulation_dtype
from .gated_delta_rule_forward import (
    Saved,
    load_queries_keys,
    query_key_factors,
    scaled,
    scores,
)

__all__ = ["chunked_backward"]


def chunked_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    saved: Saved,
    cu_doc_lens: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the initial state, each in its input's dtype.

    :param dout: (B, T, HV, V), the gradient of the output.
    :param dfinal: (B, HV, K, V), the gradient of the final state; None for zero.
    """
    problem = _Problem.of(q, k, v, g, beta, saved, cu_doc_lens, scale, normalize_qk)
    grid, dtype = problem.grid, problem.dtype
    dout = grid.pad(dout)
    N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
    padded = (grid.batch, N * C)
    dq, dk = (q.new_empty(*padded, grid.key_heads, K) for _ in range(2))
    dv = v.new_empty(*padded, grid.value_heads, V)
    dlog, dbeta = (q.new_empty(N, R, C, dtype=dtype) for _ in range(2))
    dstate = q.new_zeros(R, K, V, dtype=dtype)
    if dfinal is not None:
        dstate.copy_(dfinal.reshape(R, K, V))

    for block in reversed(list(grid.blocks())):
        step = _Block(problem, block)
        dstate = step.scan(dout, dstate)
        grid.view(dv, block).copy_(step.values_gradient())
        dqs, dks = step.queries_keys_gradients(dlog[block], dbeta[block])
        grid.view(dq, block).copy_(dqs)
        grid.view(dk, block).copy_(dks)

    # log is a running sum of g inside each chunk.
    dg = grid.ungate(dlog.flip(-1).cumsum(-1).flip(-1)).to(g.dtype)
    dq, dk, dv = (grid.unpad(x) for x in (dq, dk, dv))
    dinitial = dstate.view(grid.batch, grid.value_heads, K, V)
    return dq, dk, dv, dg, grid.ungate(dbeta).to(beta.dtype), dinitial


@dataclass(frozen=True)
class _Problem:
    """What all blocks share: padded inputs, factors, decays, what forward saved, scratch."""

    grid: ChunkGrid
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    betas: Tensor
    decays: Decays
    factors: tuple[Tensor | float, Tensor | float]
    saved: Saved
    scale: float
    normalize_qk: bool
    work: Workspace

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        saved: Saved,
        cu_doc_lens: Tensor | None,
        scale: float,
        normalize_qk: bool,
    ) -> _Problem:
        grid = ChunkGrid.of(q, v)
        dtype = accumulation_dtype(q.dtype)
        return _Problem(
            grid=grid,
            dtype=dtype,
            q=grid.pad(q),
            k=grid.pad(k),
            v=grid.pad(v),
            betas=grid.gates(beta, dtype),
            decays=Decays.of(grid, g, cu_doc_lens, dtype),
            factors=query_key_factors(grid, q, k, scale, normalize_qk),
            saved=saved,
            scale=scale,
            normalize_qk=normalize_qk,
            work=Workspace(grid, dtype, q.device),
        )


class _Block:
    """One block's gradients: :meth:`scan` first, from its last chunk to its first."""

    def __init__(self, problem: _Problem, block: slice) -> None:
        p, grid = problem, problem.grid
        n, R, C, K, V = (
            block.stop - block.start,
            grid.rows,
            grid.chunk,
            grid.key_dim,
            grid.value_dim,
        )
        self.p, self.grid, self.block, self.work = problem, grid, block, p.work
        self.n, self.rows = n, (n, R, C)
        self.beta = p.betas[block].unsqueeze(-1)
        self.from_start = p.decays.from_start[block].unsqueeze(-1)
        self.to_end = p.decays.to_end[block].unsqueeze(-1)
        self.whole = p.decays.whole[block]
        self.states, self.updates = p.saved.states[block], p.saved.updates[block]
        self.qk = load_queries_keys(grid, p.q, p.k, p.factors, block, p.work)
        self.gamma = p.decays.pairwise(block, p.work("gamma", n, R, C, C))
        # dO and -dX side by side: one GEMM multiplies both by U^T, one by S^T. The sign makes
        # dA and the state's part of dK come out right without a pass over them.
        self.douts = p.work("dO, -dX", n, R, 2, C, V)
        # The gradients of this block's incoming states, and of its outgoing one.
        self.dstates = p.work("dstates", n + 1, R, K, V)

    def scan(self, dout: Tensor, dstate: Tensor) -> Tensor:
        """Fill -dX and the states' gradients, given that of the outgoing one; returns dS."""
        grid, (n, R, C), K = self.grid, self.rows, self.grid.key_dim
        do, dx = self.douts.unbind(2)
        do.view(n, grid.batch, -1, C, grid.value_dim).copy_(grid.view(dout, self.block))
        do = do.flatten(0, 1)
        attention, system = scores(grid, self.qk, self.gamma, self.work)
        self.attention, self.system = attention, system
        self.qk_diagonal = attention[:, :: grid.group].diagonal(dim1=-2, dim2=-1).clone()

        du = self.work("dU", n, R, C, grid.value_dim)
        torch.bmm(attention.flatten(0, 1).transpose(1, 2), do, out=du.flatten(0, 1))
        read = scaled(grid, self.qk, 0, self.from_start, self.work("read", n, R, C, K))
        dstates = self.dstates
        torch.bmm(read.flatten(0, 1).transpose(1, 2), do, out=dstates[:-1].flatten(0, 1))
        dstates[-1].copy_(dstate)
        erase = scaled(grid, self.qk, 1, self.beta * self.from_start, read)
        write = scaled(grid, self.qk, 1, self.to_end, self.work("write", n, R, C, K))

        steps = zip(
            du.unbind(0),
            dx.unbind(0),
            write.unbind(0),
            self.p.saved.inverses[self.block].transpose(-1, -2).unbind(0),
            erase.transpose(-1, -2).unbind(0),
            self.whole.unbind(0),
            dstates[1:].unbind(0),
            dstates[:-1].unbind(0),
            strict=True,
        )
        for u, x, k_write, inverse, k_erase, decay, after, before in reversed(list(steps)):
            u.baddbmm_(k_write, after)
            x.baddbmm_(inverse, u, beta=0, alpha=-1)
            before.baddbmm_(k_erase, x).addcmul_(after, decay)
        return dstates[0].clone()

    def values_gradient(self) -> Tensor:
        """dV (n, B, HV, C, V)."""
        n, R, C = self.rows
        dx = self.douts[:, :, 1]
        dv = torch.mul(dx, -self.beta, out=self.work("dU", n, R, C, self.grid.value_dim))
        return dv.view(n, self.grid.batch, -1, C, self.grid.value_dim)

    def queries_keys_gradients(self, dlog: Tensor, dbeta: Tensor) -> tuple[Tensor, Tensor]:
        """dQ and dK (n, B, H, C, K) of the op's inputs; writes those of c and beta (n, R, C)."""
        grid, (n, _, C), K, G = self.grid, self.rows, self.grid.key_dim, self.grid.group
        groups = (n, grid.key_rows, G, C)
        q, k = self.qk.view(n, grid.key_rows, 1, 2, C, K).unbind(3)
        beta = self.beta.squeeze(-1)
        dscores, diagonal, by_tokens = self._score_gradients(groups)

        # Readers of the state, and writers: first what the state gives, whose dots c needs alone.
        (dq, dk_rows), dk = self._reader_state_gradients(), self._writer_state_gradients()
        own_write = dk[:, :, -1].clone()
        dk[:, :, -1] = 0
        written = self._dot(dk, k)
        dlog_end = written.sum(-1) + self._decay_gradient()
        read = self._dot(dq, q).add_(by_tokens[0])
        erased = self._dot(dk_rows, k).add_(by_tokens[1])
        written.add_(by_tokens[2])
        torch.sub(erased, self._dot_values(), out=dbeta)
        erased.mul_(beta)
        torch.add(read, erased, out=dlog).sub_(written)
        dlog[..., -1] += dlog_end

        self._add_token_gradients(dscores, dk)
        dk.addcmul_(dk_rows, self.beta)
        dk[:, :, -1] += own_write
        dq, dk = (x.view(*groups, K).sum(2) if G > 1 else x for x in (dq, dk))
        q, k = q.squeeze(2), k.squeeze(2)
        dq.addcmul_(k, diagonal)
        dk.addcmul_(q, diagonal)
        if self.p.normalize_qk:
            # y = x / |x| has dx = (dy - y <y, dy>) / |x|, and <y, dy> is mostly known.
            own = diagonal.squeeze(-1) * self.qk_diagonal
            written[..., -1] += self._dot_last(own_write, k)
            along_q = read.view(groups).sum(2).add_(own).mul_(self.p.scale**-2)
            along_k = erased.add_(written).view(groups).sum(2).add_(own)
            dq.addcmul_(q, along_q.unsqueeze(-1), value=-1)
            dk.addcmul_(k, along_k.unsqueeze(-1), value=-1)
        return self._unscale(dq, 0), self._unscale(dk, 1)

    def _score_gradients(
        self, groups: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """dP and dA (n, R, 2, C, C) below the diagonal; dP's diagonal (n, B * H, C, 1); and
        <dq, q>, <dk, k> of what each token reads, erases and writes for others (n, R, C).

        The last are rows and columns of the same products, so that what cancels between them in
        the gradient of c does so.
        """
        n, R, C = self.rows
        dscores = self.work("dP, dA", n, R, 2, C, C)
        updates = self.updates.flatten(0, 1).transpose(1, 2)
        torch.bmm(self.douts.view(n * R, 2 * C, -1), updates, out=dscores.view(n * R, 2 * C, C))
        diagonal = dscores[:, :, 0].diagonal(dim1=-2, dim2=-1).reshape(groups).sum(2)
        for x in (self.gamma, self.attention, self.system):
            x.diagonal(dim1=-2, dim2=-1).zero_()
        read, erased = (
            x.mul_(dx)
            for x, dx in zip((self.attention, self.system), dscores.unbind(2), strict=True)
        )
        rows = read.sum(-1), erased.sum(-1)
        columns = read.addcmul_(erased, self.beta).sum(-2)
        return dscores.mul_(self.gamma.unsqueeze(2)), diagonal.unsqueeze(-1), (*rows, columns)

    def _reader_state_gradients(self) -> tuple[Tensor, Tensor]:
        """What reading the state gives dQ and, without beta, dK (n, R, C, K)."""
        n, R, C = self.rows
        rows = self.work("rows", n, R, 2, C, self.grid.key_dim)
        states = self.states.flatten(0, 1).transpose(1, 2)
        torch.bmm(self.douts.view(n * R, 2 * C, -1), states, out=rows.view(n * R, 2 * C, -1))
        dq, dk = rows.mul_(self.from_start.unsqueeze(2)).unbind(2)
        return dq, dk

    def _writer_state_gradients(self) -> Tensor:
        """What writing to the outgoing state gives dK (n, R, C, K)."""
        n, R, C = self.rows
        dk = self.work("write", n, R, C, self.grid.key_dim)
        dstates = self.dstates[1:].flatten(0, 1).transpose(1, 2)
        torch.bmm(self.updates.flatten(0, 1), dstates, out=dk.flatten(0, 1))
        return dk.mul_(self.to_end)

    def _add_token_gradients(self, dscores: Tensor, dk: Tensor) -> None:
        """Add what other tokens of the chunk give, to the readers' gradients and to ``dk``."""
        grid, (n, R, C), K, G = self.grid, self.rows, self.grid.key_dim, self.grid.group
        key_rows = n * grid.key_rows
        keys = self.qk[:, :, :, 1].reshape(key_rows, C, K)
        rows = self.work("rows", n, R, 2, C, K).view(key_rows, G * 2 * C, K)
        rows.baddbmm_(dscores.view(key_rows, G * 2 * C, C), keys)
        dscores[:, :, 1].mul_(self.beta)
        both = self.qk.view(n, grid.key_rows, 1, 2 * C, K).expand(-1, -1, G, -1, -1)
        dk.flatten(0, 1).baddbmm_(
            dscores.view(n * R, 2 * C, C).transpose(1, 2), both.reshape(n * R, 2 * C, K)
        )

    def _dot_last(self, x: Tensor, k: Tensor) -> Tensor:
        """<x, k> for each chunk's last token: x (n, R, K), k (n, B * H, C, K)."""
        n, R, _ = self.rows
        grouped = x.view(n, self.grid.key_rows, self.grid.group, -1)
        return (grouped * k[:, :, -1].unsqueeze(2)).sum(-1).view(n, R)

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        """<x, y> over K: x (n, R, C, K) with y (n, B * H, 1, C, K), giving (n, R, C)."""
        grouped = x.view(self.n, self.grid.key_rows, self.grid.group, *x.shape[2:])
        product = self.work("dot", *grouped.shape)
        return torch.mul(grouped, y, out=product).sum(-1).view(self.rows)

    def _dot_values(self) -> Tensor:
        """<-dX, V> over V (n, R, C)."""
        grid, (n, R, C) = self.grid, self.rows
        dx = self.douts[:, :, 1].view(n, grid.batch, -1, C, grid.value_dim)
        product = self.work("dU", n, R, C, grid.value_dim).view(dx.shape)
        return torch.mul(dx, grid.view(self.p.v, self.block), out=product).sum(-1).view(self.rows)

    def _decay_gradient(self) -> Tensor:
        """e^(c_C) <S, dS'>, what the chunk's whole decay gets (n, R)."""
        product = self.work("states dot", *self.states.shape)
        dot = torch.mul(self.states, self.dstates[1:], out=product).sum((-1, -2))
        return dot.mul_(self.whole.view(dot.shape))

    def _unscale(self, grad: Tensor, which: int) -> Tensor:
        """The gradient of a raw query (0) or key (1) given that of the scaled one."""
        grad = grad.view(self.n, self.grid.batch, -1, *grad.shape[2:])
        factor = self.p.factors[which]
        return grad.mul_(
            self.grid.view(factor, self.block) if isinstance(factor, Tensor) else factor
        )
