"""The chunked gated delta rule, backward. Shapes as in ``chunks``.

With the forward's Q (scaled), K, Gamma, T, W, U, S of a chunk, P = tril(Q K^T * Gamma), dO the
output's gradient and dS' that of the outgoing state, and X = beta (V - e^c K S), of which U = T X::

    dU = P^T dO + (e^(c_C - c) K) dS'
    dS = (e^c Q)^T dO + e^(c_C) dS' - W^T dU       the next step's dS'
    dX = T^T dU
    dP = tril(dO U^T) * Gamma          dA = -stril(dX U^T) * Gamma, of A = stril(beta K K^T * Gamma)
    dQ = e^c (dO S^T) + dP K
    dK = beta (dA K - e^c (dX S^T)) + (beta dA)^T K + dP^T Q + e^(c_C - c) (U dS'^T)
    dV = beta dX
    dbeta = rows of <dX, V> + <dA K - e^c (dX S^T), K>

An exponent c_i enters wherever q_i or k_i does with the same sign, and k_j with the other, so its
gradient is q dq - k dk taken over the terms above. Terms whose exponent is identically 0 (P's
diagonal, the last token's own write) cancel there in exact arithmetic only: at g = -80 they leave
an error of 2e28 times the gradient. They are kept out of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import ChunkGrid, Decays, RuleInputs, Workspace, accumulation_dtype
from .torch_forward import (
    Saved,
    load_queries_keys,
    query_key_factors,
    readers_writers,
    scores,
)


def chunked_backward(
    dout: Tensor, dfinal: Tensor | None, x: RuleInputs, saved: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the initial state, each in its input's dtype.

    :param dout: (B, T, HV, V), the gradient of the output.
    :param dfinal: (B, HV, K, V), the gradient of the final state; None for zero.
    """
    return Backward.of(x, saved).gradients(dout, dfinal)


@dataclass(frozen=True)
class Backward:
    """A backward pass: its chunked inputs, factors, decays, what forward saved, scratch."""

    grid: ChunkGrid
    q: Tensor
    k: Tensor
    v: Tensor
    betas: Tensor
    gate_dtypes: tuple[torch.dtype, torch.dtype]
    decays: Decays
    factors: tuple[Tensor | float, Tensor | float]
    saved: Saved
    scale: float
    normalize_qk: bool
    work: Workspace

    @staticmethod
    def of(x: RuleInputs, saved: Saved) -> Backward:
        q, k, v, g, beta = x.tensors
        grid = ChunkGrid.of(q, v)
        dtype = accumulation_dtype(q.dtype)
        return Backward(
            grid=grid,
            q=grid.chunked(grid.pad(q)),
            k=grid.chunked(grid.pad(k)),
            v=grid.chunked(grid.pad(v)),
            betas=grid.gates(beta, dtype),
            gate_dtypes=(g.dtype, beta.dtype),
            decays=Decays.of(grid, g, x.cu_doc_lens, dtype),
            factors=query_key_factors(grid, q, k, x.scale, x.normalize_qk),
            saved=saved,
            scale=x.scale,
            normalize_qk=x.normalize_qk,
            work=Workspace(grid, dtype, q.device),
        )

    def gradients(
        self, dout: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What :func:`chunked_backward` returns."""
        grid, q, v = self.grid, self.q, self.v
        dout = grid.chunked(grid.pad(dout))
        N, R, C, K, V = grid.chunks, grid.rows, grid.chunk, grid.key_dim, grid.value_dim
        padded = (grid.batch, N * C)
        dq, dk = (q.new_empty(*padded, grid.key_heads, K) for _ in range(2))
        dv = v.new_empty(*padded, grid.value_heads, V)
        dlog, dbeta = (self.betas.new_empty(N, R, C) for _ in range(2))
        dstate = self.betas.new_zeros(R, K, V)
        if dfinal is not None:
            dstate.copy_(dfinal.reshape(R, K, V))

        dqs, dks, dvs = (grid.chunked(x) for x in (dq, dk, dv))
        for block in reversed(list(grid.blocks())):
            step = _Block(self, block)
            dstate = step.scan(dout[block], dstate)
            step.values_gradient(dvs[block], dbeta[block])
            step.queries_keys_gradients(dqs[block], dks[block], dlog[block], dbeta[block])

        # log is a running sum of g inside each chunk.
        dg = grid.ungate(dlog.flip(-1).cumsum(-1).flip(-1)).to(self.gate_dtypes[0])
        dbeta = grid.ungate(dbeta).to(self.gate_dtypes[1])
        dq, dk, dv = (grid.unpad(x) for x in (dq, dk, dv))
        return dq, dk, dv, dg, dbeta, grid.state(dstate)

    def initial_gradient(self, dout: Tensor, stop: int) -> Tensor:
        """The last of :meth:`gradients`, without dfinal and from the first ``stop`` tokens alone,
        in two fifths of the time."""
        grid = self.grid
        dout = grid.chunked(grid.pad(dout))
        dstate = self.betas.new_zeros(grid.rows, grid.key_dim, grid.value_dim)
        for block in reversed(list(grid.blocks(0, grid.chunk_of(stop - 1) + 1))):
            dstate = _Block(self, block).carry(dout[block], dstate)
        return grid.state(dstate)


class _Block:
    """One block's gradients: :meth:`scan` first, from its last chunk to its first."""

    def __init__(self, problem: Backward, block: slice) -> None:
        p, grid = problem, problem.grid
        n, R, C, V = block.stop - block.start, grid.rows, grid.chunk, grid.value_dim
        self.p, self.grid, self.block, self.work = problem, grid, block, p.work
        self.n, self.rows = n, (n, R, C)
        self.beta = p.betas[block].unsqueeze(-1)
        self.from_start = p.decays.from_start[block].unsqueeze(-1)
        self.to_end = p.decays.to_end[block].unsqueeze(-1)
        self.whole = p.decays.whole[block]
        self.states, self.updates = p.saved.states[block], p.saved.updates[block]
        self.qk = load_queries_keys(grid, p.q, p.k, p.factors, block, p.work)
        self.gamma = p.decays.pairwise(block, p.work("gamma", n, R, C, C))
        self.scores = scores(grid, self.qk, self.gamma, p.work)
        # dO and -dX side by side: one GEMM multiplies both by U^T, one by S^T. The sign makes
        # dA and the state's part of dK come out right without a pass over them.
        self.douts = p.work("dO, -dX", n, R, 2, C, V)
        # dX itself, until the first product of two tensors takes its memory.
        self.dx = p.work("products", n, R, C, V)
        # The gradients of this block's incoming states, and of its outgoing one.
        self.dstates = p.work("dstates", n + 1, R, grid.key_dim, V)

    def scan(self, dout: Tensor, dstate: Tensor) -> Tensor:
        """:meth:`carry`, and fill dX."""
        dstate = self.carry(dout, dstate)
        inverses = self.p.saved.inverses[self.block].flatten(0, 1)
        du = self.work("dU", *self.rows, self.grid.value_dim)
        torch.bmm(inverses.transpose(1, 2), du.flatten(0, 1), out=self.dx.flatten(0, 1))
        torch.neg(self.dx, out=self.douts[:, :, 1])
        return dstate

    def carry(self, dout: Tensor, dstate: Tensor) -> Tensor:
        """Fill dU and the states' gradients, given that of the outgoing one; returns dS."""
        grid, (n, R, C) = self.grid, self.rows
        self.douts[:, :, 0].view(dout.shape).copy_(dout)
        do = self.douts[:, :, 0].flatten(0, 1)
        inverses = self.p.saved.inverses[self.block].flatten(0, 1)

        du = self.work("dU", n, R, C, grid.value_dim)
        torch.bmm(self.scores[:, :, 0].flatten(0, 1).transpose(1, 2), do, out=du.flatten(0, 1))
        readers, writers, erasers = readers_writers(
            grid, self.qk, self.p.decays, self.p.betas, self.block, self.work
        )
        w = self.work("w", *erasers.shape)
        torch.bmm(inverses, erasers.flatten(0, 1), out=w.flatten(0, 1))
        dstates = self.dstates
        torch.bmm(readers.flatten(0, 1).transpose(1, 2), do, out=dstates[:-1].flatten(0, 1))
        dstates[-1].copy_(dstate)

        chunks = dstates.unbind(0)
        steps = zip(
            du.unbind(0),
            writers.unbind(0),
            w.transpose(-1, -2).unbind(0),
            self.whole.unbind(0),
            chunks[1:],
            chunks[:-1],
            strict=True,
        )
        for u, writer, w_transposed, decay, after, before in reversed(list(steps)):
            u.baddbmm_(writer, after)
            before.baddbmm_(w_transposed, u, alpha=-1).addcmul_(after, decay)
        return chunks[0].clone()

    def values_gradient(self, dv: Tensor, dbeta: Tensor) -> None:
        """Writes dV (n, B, HV, C, V) and the values' part of beta's gradient (n, R, C)."""
        dx = self.dx.view(dv.shape)
        torch.mul(dx, self.beta.view(*dv.shape[:-1], 1), out=dv)
        product = self.work("dU", *self.rows, self.grid.value_dim)
        torch.mul(dx, self.p.v[self.block], out=product.view(dx.shape))
        torch.sum(product, -1, out=dbeta)

    def queries_keys_gradients(self, dq: Tensor, dk: Tensor, dlog: Tensor, dbeta: Tensor) -> None:
        """Writes dQ and dK (n, B, H, C, K) of the op's inputs and that of c (n, R, C), and
        completes beta's."""
        grid, (n, _, C), K = self.grid, self.rows, self.grid.key_dim
        groups = (n, grid.key_rows, grid.group)
        qk = self.qk.view(n, grid.key_rows, 1, 2, C, K)
        dscores, own, by_rows, by_columns = self._score_gradients()

        # Readers of the state, and writers: first what the state gives, whose dots c needs alone.
        grads, dk_writes = self._reader_state_gradients(), self._writer_state_gradients()
        written = self._dot(dk_writes, qk[:, :, :, 1])
        own_write = written[..., -1].clone()
        written[..., -1] = 0
        dlog_end = written.sum(-1) + self._decay_gradient()
        by_rows += self._dot(grads, qk)
        read, erased = by_rows.unbind(2)
        written += by_columns
        dbeta += erased
        erased *= self.beta.squeeze(-1)
        torch.add(read, erased, out=dlog).sub_(written)
        dlog[..., -1] += dlog_end

        self._add_token_gradients(dscores, grads, dk_writes)
        grads = grads.view(*groups, 2, C, K).sum(2) if grid.group > 1 else grads
        if self.p.normalize_qk:
            # y = x / |x| has dx = (dy - y <y, dy>) / |x|, and <y, dy> is mostly known.
            written[..., -1] += own_write
            erased += written
            along = by_rows.add_(own.unsqueeze(2)).view(*groups, 2, C).sum(2)
            along[:, :, 0] *= self.p.scale**-2
            grads.addcmul_(qk.squeeze(2), along.unsqueeze(-1), value=-1)
        for i, (out, factor) in enumerate(zip((dq, dk), self.p.factors, strict=True)):
            grad = grads[:, :, i].view(out.shape)
            torch.mul(grad, factor[self.block] if isinstance(factor, Tensor) else factor, out=out)

    def _score_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dP and dA (n, R, 2, C, C); <dP, P> on the diagonal (n, R, C); and below it <dq, q> and
        <dk, k> of what each token reads and erases (n, R, 2, C) and writes (n, R, C).

        The last are rows and columns of the same products, so that what cancels between them in
        the gradient of c does so.
        """
        n, R, C = self.rows
        dscores = self.work("raw scores", n, R, 2, C, C)
        updates = self.updates.flatten(0, 1).transpose(1, 2)
        torch.bmm(self.douts.view(n * R, 2 * C, -1), updates, out=dscores.view(n * R, 2 * C, C))
        products = self.scores.mul_(dscores)
        diagonal = products.diagonal(dim1=-2, dim2=-1)
        own = diagonal[:, :, 0].clone()
        diagonal.zero_()
        by_rows = products.sum(-1)
        read, erased = products.unbind(2)
        by_columns = read.addcmul_(erased, self.beta).sum(-2)
        dscores.mul_(self.gamma.unsqueeze(2))
        dscores[:, :, 1].diagonal(dim1=-2, dim2=-1).zero_()
        return dscores, own, by_rows, by_columns

    def _reader_state_gradients(self) -> Tensor:
        """What reading the state gives dQ and, without beta, dK (n, R, 2, C, K)."""
        n, R, C = self.rows
        grads = self.work("grads", n, R, 2, C, self.grid.key_dim)
        states = self.states.flatten(0, 1).transpose(1, 2)
        torch.bmm(self.douts.view(n * R, 2 * C, -1), states, out=grads.view(n * R, 2 * C, -1))
        return grads.mul_(self.from_start.unsqueeze(2))

    def _writer_state_gradients(self) -> Tensor:
        """What writing to the outgoing state gives dK (n, R, C, K)."""
        n, R, C = self.rows
        dk = self.work("w", n, R, C, self.grid.key_dim)
        dstates = self.dstates[1:].flatten(0, 1).transpose(1, 2)
        torch.bmm(self.updates.flatten(0, 1), dstates, out=dk.flatten(0, 1))
        return dk.mul_(self.to_end)

    def _add_token_gradients(self, dscores: Tensor, grads: Tensor, dk_writes: Tensor) -> None:
        """Complete ``grads`` with what other tokens of the chunk give, and with ``dk_writes``."""
        grid, (n, R, C), K, G = self.grid, self.rows, self.grid.key_dim, self.grid.group
        key_rows = n * grid.key_rows
        keys = self.qk[:, :, :, 1].flatten(0, 2)
        grads.view(key_rows, G * 2 * C, K).baddbmm_(dscores.view(key_rows, G * 2 * C, C), keys)
        dscores[:, :, 1].mul_(self.beta)
        both = self.qk.view(n, grid.key_rows, 1, 2 * C, K).expand(-1, -1, G, -1, -1)
        dk_writes.flatten(0, 1).baddbmm_(
            dscores.view(n * R, 2 * C, C).transpose(1, 2), both.reshape(n * R, 2 * C, K)
        )
        dk = grads[:, :, 1]
        torch.addcmul(dk_writes, dk, self.beta, out=dk)

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        """<x, y> over K: x (n, R, ..., C, K) with y (n, B * H, 1, ..., C, K)."""
        grouped = x.view(self.n, self.grid.key_rows, self.grid.group, *x.shape[2:])
        product = self.work("products", *grouped.shape)
        return torch.mul(grouped, y, out=product).sum(-1).view(x.shape[:-1])

    def _decay_gradient(self) -> Tensor:
        """e^(c_C) <S, dS'>, what the chunk's whole decay gets (n, R)."""
        product = self.work("products", *self.states.shape)
        dot = torch.mul(self.states, self.dstates[1:], out=product).sum((-1, -2))
        return dot.mul_(self.whole.view(dot.shape))
