"""Several gloo ranks on one GPU: each kernel under each schedule errs in bf16 as on one rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import (
    SCALE,
    context_of,
    dense,
    draw,
    forward_backward,
    int32,
    own_rows,
)
from olmo_core.distributed.utils import get_full_tensor
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.capabilities import CAPABILITIES, Environment, Request, refusals
from olmo_core.nn.attention.segments import Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),  # libraries warn at import
]
HEADS, DIM = (4, 2), 64
DOCUMENTS = ([0, 1024], [0, 64, 448, 1024])


def squared_errors(
    rank: int, n: int, kernel: str, layout: str | None, ulysses: int, window: int, cu: list[int]
) -> list[float]:
    """Of out, dq, dk, dv against float64: summed over this rank's rows."""
    whole = [x.bfloat16() for x in draw(1, cu[-1], HEADS, DIM)]
    rows = own_rows(layout, cu, rank, n, ulysses)
    got = forward_backward(
        context_of(n, layout, ulysses=ulysses), [x.cuda() for x in whole], rows.cuda(),
        lengths=int32(cu).cuda(), window=window, kernel=kernel,
    )  # fmt: skip
    want = dense(*(x.double() for x in whole), cu, window)
    return [float((a.cpu().double() - b[:, rows]).square().sum()) for a, b in zip(got, want)]


def unsharded(kernel: str, window: int, cu: list[int]) -> list[float]:
    whole = [x.bfloat16() for x in draw(1, cu[-1], HEADS, DIM)]
    want = dense(*(x.double() for x in whole), cu, window)
    *qkv, dout = (x.cuda() for x in whole)
    qkv = [x.requires_grad_() for x in qkv]
    segments = Segments.documents(int32(cu).cuda(), cu[-1], window=window)
    out = attend(*qkv, segments, scale=SCALE, kernel=kernel)
    got = [out, *torch.autograd.grad(out, qkv, dout)]
    return [float((a.detach().cpu().double() - b).square().sum()) for a, b in zip(got, want)]


@pytest.mark.parametrize(
    ("layout", "ulysses", "window", "bound"),
    [
        ("zig_zag", 1, -1, 1.5),
        ("zig_zag", 1, 100, 1.1),
        ("contiguous", 1, -1, 1.1),
        ("balanced", 1, -1, 1.1),
        (None, 1, 100, 1.1),
        ("zig_zag", 2, -1, 1.5),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("kernel", ["torch", "flash_2", "flash_3", "flash_4", "te"])
def test_a_kernel_errs_like_one_rank(
    kernel: str, n: int, layout: str | None, ulysses: int, window: int, bound: float
) -> None:
    request = Request(torch.bfloat16, DIM)
    if reasons := refusals(CAPABILITIES[kernel], Environment.detect("cuda"), request):
        pytest.skip(f"{kernel}: {reasons[0]}")
    if ulysses > 1 and n < 4:
        pytest.skip("a ring of one rank is no ring")
    for cu in DOCUMENTS:
        base = unsharded(kernel, window, cu)
        answers: list[Any] = on_ranks(
            n, squared_errors, kernel, layout, ulysses, window, cu, timeout=300
        )
        ratios = [math.sqrt(sum(a) / b) for a, b in zip(zip(*answers), base, strict=True)]
        # dk and dv travel in bf16: a rounding more than on one rank, where roundings are all there
        # is sqrt(2) times the error.
        assert max(ratios[:2]) <= bound and max(ratios[2:]) <= 1.5, ratios


def put_together(rank: int, n: int) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mine = torch.full((2,), float(rank), device="cuda")
    whole = get_full_tensor(DTensor.from_local(mine, init_device_mesh("cuda", (n,)), [Shard(0)]))
    assert whole.is_cuda
    return whole.tolist()


def test_a_whole_tensor_of_ranks_that_share_a_gpu() -> None:
    assert on_ranks(2, put_together) == [[0.0, 0.0, 1.0, 1.0]] * 2
