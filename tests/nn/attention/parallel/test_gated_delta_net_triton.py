"""The Triton form of the rule on several gloo ranks, on one GPU or interpreted: it errs in half
precision as on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gloo_ranks import on_ranks
from nn.attention.kernels.gated_delta_rule.test_triton_rule import DEVICE, DTYPE, needs_kernels
from nn.attention.parallel.schedules import int32
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule, op
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from olmo_core.nn.attention.kernels.table import choose
from olmo_core.nn.attention.parallel.op import Shard
from olmo_core.nn.attention.parallel.state_exchange import sharded_gated_delta_rule

pytestmark = [
    pytest.mark.triton,
    pytest.mark.distributed,
    # Triton's interpreter reads loop bounds in a way that numpy is about to forbid.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
ON_GPU = DEVICE == "cuda"
ROWS, HEADS, KEY_DIM, VALUE_DIM = (192, 4, 128, 256) if ON_GPU else (66, 1, 64, 64)


def draw(tokens: int) -> list[Tensor]:
    """q, k, v, g, beta and dout, on the CPU. Decays are slight: maps are far from 0."""
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int, *width: int) -> Tensor:
        return torch.randn(1, tokens, heads, *width, generator=generator)

    q, k = (randn(HEADS, KEY_DIM).to(DTYPE) for _ in range(2))
    v, dout = (randn(2 * HEADS, VALUE_DIM).to(DTYPE) for _ in range(2))
    return [q, k, v, -0.002 * randn(2 * HEADS).abs(), 0.3 * randn(2 * HEADS).sigmoid(), dout]


def both_ways(rule: Callable[..., Any], inputs: list[Tensor], *args: Any, **options: Any) -> Any:
    *leaves, dout = (x.to(DEVICE) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out = rule(*leaves, *args, normalize_qk=True, **options)
    out = out if isinstance(out, Tensor) else out[0]
    return [x.cpu().double() for x in (out.detach(), *torch.autograd.grad(out, leaves, dout))]


def sharded(rank: int, n: int, cu: list[int]) -> list[Tensor]:
    """This rank's rows of the output and of each gradient."""
    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    lengths = int32(cu).to(DEVICE)
    shard = Shard(lengths, "contiguous", False, -1, 1, KEY_DIM**-0.5, "", group, "")
    rows = slice(rank * cu[-1] // n, (rank + 1) * cu[-1] // n)
    mine = [x[:, rows] for x in draw(cu[-1])]
    assert choose(op.FORMS, mine[0].to(DEVICE), mine[2].to(DEVICE)).name == "triton"
    return both_ways(sharded_gated_delta_rule, mine, shard)


@needs_kernels
@pytest.mark.parametrize(
    "n",
    [
        pytest.param(3, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.gpu) for n in (2, 4)),
    ],
)
def test_it_errs_as_on_one_rank(n: int) -> None:
    total = n * ROWS
    documents = [0, 5, total // 4 + 9, total]
    for cu in ([0, total], documents) if ON_GPU else ([0, total],):
        lengths = int32(cu).to(DEVICE)
        inputs = draw(total)
        whole = both_ways(gated_delta_rule, inputs, cu_doc_lens=lengths)
        exact_rule = gated_delta_rule if ON_GPU else gated_delta_rule_reference
        want = both_ways(exact_rule, [x.double() for x in inputs], cu_doc_lens=lengths)
        parts = on_ranks(n, sharded, cu, timeout=300)
        got = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
        ratios = [
            float((a - c).norm() / (b - c).norm()) for a, b, c in zip(got, whole, want, strict=True)
        ]
        assert all(math.isfinite(x) and x <= 1.2 for x in ratios), ratios
