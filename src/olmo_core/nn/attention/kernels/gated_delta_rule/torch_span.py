"""The chunked gated delta rule of a span whose incoming state follows from its own map.

The outgoing state is S' = M S + N. A chunk's is A S + B, with A = e^(c_C) - (e^(c_C - c) K)^T W and
B = (e^(c_C - c) K)^T T (beta V). From the last chunk to the first, with D the product of the A
behind a chunk::

    X = D (e^(c_C - c) K)^T
    N += X T (beta V)
    D = D A = e^(c_C) D - X W

so M = D at the end. Nothing as large as a state of values is carried, what chunks are prepared from
serves both the map and the outputs, and no outputs are computed for the map. Between the two it is
kept: 3 K + 2 C numbers for each token and value head.

Backward, the incoming state's gradient alone needs neither dQ, dK nor dV; its recurrence is run
once more for them, with the outgoing state's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunks import RuleInputs
from .torch_backward import Backward
from .torch_forward import Forward, Prepared, Saved


def chunked_span_forward(
    x: RuleInputs, incoming: Callable[[Tensor, Tensor], Tensor], last_start: int, *, save: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """The output (B, T, HV, V), M (B, HV, K, K), and with ``save`` the rest.

    The arguments are those of :func:`.span.span_forward`.
    """
    forward = Forward.of(x, save)
    grid, new = forward.grid, forward.betas.new_empty
    first = grid.chunk_of(last_start)
    n = forward.state(None)
    d = torch.eye(grid.key_dim, dtype=n.dtype, device=n.device).repeat(grid.rows, 1, 1)
    kept: list[tuple[slice, Prepared]] = []
    for block in reversed(list(grid.blocks())):
        prepared = forward.prepare(block, lambda _, *shape: new(shape))
        kept.append((block, prepared))
        skipped = max(0, first - block.start)  # nothing of those chunks is in the outgoing state
        _compose(prepared, forward.decays.whole[block], skipped, n, d)
    if x.cu_doc_lens is None:
        m = d.mT.contiguous()
    else:
        m = torch.zeros_like(d)  # a document that starts here knows no earlier state
    state = forward.state(incoming(grid.state(n), grid.state(m)))
    while kept:
        block, prepared = kept.pop()
        state = forward.advance(block, prepared, state)
    out, _, saved = forward.results(state)
    return out, grid.state(m), saved


def _compose(prepared: Prepared, whole: Tensor, skipped: int, n: Tensor, d: Tensor) -> None:
    """Add a block to N (R, K, V) and to the transposed D (R, K, K) of those behind it, in place."""
    steps = zip(
        prepared.writers[skipped:].unbind(0),
        prepared.w[skipped:].transpose(-1, -2).unbind(0),
        prepared.updates[skipped:].unbind(0),
        whole[skipped:].unbind(0),
        strict=True,
    )
    x = torch.empty_like(prepared.writers[0])
    for writers, w, values, decay in reversed(list(steps)):
        torch.bmm(writers, d, out=x)
        n.baddbmm_(x.transpose(1, 2), values)
        d.mul_(decay).baddbmm_(w, x, alpha=-1)


def chunked_span_backward(
    dout: Tensor,
    x: RuleInputs,
    saved: Saved,
    outgoing: Callable[[Tensor], Tensor],
    first_stop: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g and beta, each in its input's dtype.

    The arguments are those of :func:`.span.span_backward`.
    """
    backward = Backward.of(x, saved)
    dfinal = outgoing(backward.initial_gradient(dout, first_stop))
    return backward.gradients(dout, dfinal)[:5]
