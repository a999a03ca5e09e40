"""Layers whose heads or columns are dealt to ranks: dealt = whole, in float64."""

from __future__ import annotations

import pytest
import torch

from gloo_ranks import on_ranks
from nn.attention.parallel.sharing import (
    FEED_FORWARD,
    LAYERS,
    MIXERS,
    RECURRENT,
    SOFTMAX,
    D,
    check_gradients,
    error,
    make,
    mesh_of,
)
from olmo_core.nn.sharded import is_sharded

pytestmark = pytest.mark.distributed


def exact(rank: int, n: int, names: list[str]) -> None:
    from torch.distributed.tensor import Shard

    mesh, tokens = mesh_of(n), 12
    cu = torch.tensor([0, 5, 5, 19, 2 * tokens], dtype=torch.int32)
    for name in names:
        whole = make(name)
        keywords = {"cu_doc_lens": cu} if name in MIXERS else {}
        x, dout = torch.randn(2, 2, tokens, D, dtype=torch.float64)
        x_whole = x.clone().requires_grad_()
        want = whole(x_whole, **keywords)
        want.backward(dout)
        for layout in (None, Shard(1)):
            layer = make(name)
            layer.apply_tp(mesh, layout, layout)

            def part(t: torch.Tensor, cut: bool = layout is not None) -> torch.Tensor:
                return t.chunk(n, 1)[rank].contiguous() if cut else t

            mine = part(x).clone().requires_grad_()
            if layout is None:
                out = layer(mine, **keywords)
            else:
                out = layer(x=mine, **keywords)
            assert not is_sharded(out)
            out.backward(part(dout))
            assert error(out, part(want)) < 1e-12, name
            assert mine.grad is not None and x_whole.grad is not None
            assert error(mine.grad, part(x_whole.grad)) < 1e-12, name
            check_gradients(layer, whole)


@pytest.mark.parametrize(
    "names", [list(SOFTMAX), [*RECURRENT, *FEED_FORWARD]], ids=["softmax", "other"]
)
def test_on_two_ranks(names: list[str]) -> None:
    on_ranks(2, exact, names)


def test_on_four_ranks() -> None:
    on_ranks(4, exact, list(LAYERS))
