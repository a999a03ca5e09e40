"""A gated delta net on a shard, with what each load balancer returned: shard = whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gloo_ranks import on_ranks
from nn.attention.parallel.test_layers import (
    draw_input,
    error_of,
    int32,
    place,
    run_sharded,
    run_whole,
)
from olmo_core.nn.attention import GatedDeltaNet

pytestmark = pytest.mark.distributed

SIZES: dict[str, dict[str, Any]] = {
    "groups": {"n_heads": 2, "n_v_heads": 4},
    "one key head": {"n_heads": 1, "n_v_heads": 4, "conv_bias": True},
    "as many": {"n_heads": 4, "n_v_heads": 4},
    "three": {"n_heads": 3, "n_v_heads": 6, "conv_bias": True},
}


def make_gdn(sizes: str, **options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)  # the same weights on all ranks
    options = {"head_dim": 6, "expand_v": 1.5, "dtype": torch.float64, **SIZES[sizes], **options}
    layer = GatedDeltaNet(d_model=12, **options)
    with torch.no_grad():
        layer.A_log.copy_(torch.linspace(-3, 1, layer.n_v_heads))
        for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
            if conv.bias is not None:
                conv.bias.normal_()
    return layer


def documents(n: int) -> Iterator[list[int]]:
    """Cumulative lengths for ``n`` ranks."""
    m = 2 * n
    yield [0, 6 * m]
    yield [0, 3 * m, 3 * m, 4 * m, 9 * m, 12 * m]
    yield [m * i for i in range(7)]  # chunks of one token
    yield [0, 1, 2, 3, 17, 20, 21, 47]  # padded by some balancers
    yield [0, 20 * m, 28 * m]
    yield [0, m]  # shards shorter than the kernel
    yield [0, 3, 2 * n + 1]


def exact(rank: int, n: int, style: str, names: tuple[str, ...]) -> float:
    worst = 0.0
    for name in names:
        whole = make_gdn(name)
        sharded = copy.deepcopy(whole)
        arguments, balancer = place(style, n)
        sharded.apply_cp(**arguments)
        cases: list[tuple[int, list[int] | None]] = [(1, cu) for cu in documents(n)]
        if style != "llama3":  # which shards by document alone
            cases.append((2, None))
        for batch, cu in cases:
            x, dout = draw_input(batch, 24 if cu is None else cu[-1], whole.d_model)
            want = run_whole(whole, x, dout, cu)
            got = run_sharded(sharded, balancer, x, dout, cu)
            worst = max(worst, error_of(got, want))
            assert worst < 1e-11, (name, cu, worst)
    return worst


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
@pytest.mark.parametrize("n", [1, 2])
def test_on_one_and_two_ranks(n: int, style: str) -> None:
    on_ranks(n, exact, style, ("groups", "one key head", "as many"))


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
def test_on_three_ranks(style: str) -> None:
    on_ranks(3, exact, style, ("three",))


@pytest.mark.parametrize("style", ["zig_zag+ulysses", "llama3+ulysses", "balanced+ulysses"])
def test_on_a_ring_with_ulysses_inside(style: str) -> None:
    on_ranks(4, exact, style, ("groups", "one key head"))


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
def test_on_four_ranks(style: str) -> None:
    on_ranks(4, exact, style, ("groups", "one key head"))
