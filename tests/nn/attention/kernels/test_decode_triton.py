"""Split-KV decoding against its definition, with NaN wherever a kernel must not look."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention.kernels import decode_triton
from olmo_core.nn.attention.kernels.decode_triton import decode, n_splits, unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unsupported(*(torch.empty(1, 1, 1, 16, device=DEVICE),) * 2)
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))
pytestmark = [
    pytest.mark.triton,
    # Triton's interpreter: loop bounds read out of arrays, and log2(0) of a row without keys.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


def definition(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int
) -> Tensor:
    """One softmax per row, query and head, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            stop = int(ends[b]) - (q.shape[1] - 1 - i)
            start = int(starts[b]) if window < 0 else max(int(starts[b]), stop - window)
            if stop <= start:
                continue
            keys, values = (x[b, start:stop].double().repeat_interleave(group, 1) for x in (k, v))
            weights = (torch.einsum("hd,shd->hs", q[b, i].double(), keys) * scale).softmax(-1)
            out[b, i] = torch.einsum("hs,shd->hd", weights, values)
    return out


def cache(
    starts: Tensor, ends: Tensor, slots: int, heads: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """Random where visible and NaN elsewhere; heads and slots are transposed in memory."""
    x = torch.full((len(starts), heads, slots, dim), math.nan, dtype=dtype, device=DEVICE)
    x = x.transpose(1, 2)
    for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        x[b, start:end] = torch.randn(max(end - start, 0), heads, dim, dtype=dtype, device=DEVICE)
    return x


@needs_kernel
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "queries", "window", "splits"),
    [
        (4, 2, 32, 1, -1, 1),
        (4, 2, 24, 3, 7, 3),  # head_dim padded, a window that moves with the query
        (8, 1, 64, 8, -1, 5),  # more splits than some rows have slots
        (16, 4, 128, 1, 100, 4),
        (3, 3, 16, 2, 1, 2),
        (6, 2, 96, 4, -1, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_is_the_definition(
    heads: int, kv_heads: int, dim: int, queries: int, window: int, splits: int,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 products")
    monkeypatch.setattr(decode_triton, "n_splits", lambda *_: splits)
    slots = 200
    starts = torch.tensor([3, 0, 17, 60], dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([3, 200, 130, 61], dtype=torch.int32, device=DEVICE)  # empty, full, ...
    q = torch.randn(4, queries, heads, dim, dtype=dtype, device=DEVICE)
    k, v = (cache(starts, ends, slots, kv_heads, dim, dtype) for _ in range(2))
    got = decode(q, k, v, starts, ends, scale=0.3, window=window)
    want = definition(q, k, v, starts, ends, 0.3, window)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert got.dtype == dtype and got.is_contiguous()
    assert not got[0].any()
    assert ((got.double() - want).norm() / want.norm()).item() < bound


def test_splits_fill_the_gpu() -> None:
    assert n_splits(128, 8192, 132) == 2  # 256 of 264 programs that fit at once
    assert n_splits(4, 8192, 132) >= 30  # of 32 shares that are long enough
    assert n_splits(4, 100, 132) == 1
    for programs in (1, 3, 40, 128, 1000):
        for slots in (1, 500, 5_000, 100_000):
            assert 1 <= n_splits(programs, slots, 132) <= max(1, slots // 256)


@pytest.mark.gpu
def test_one_graph_serves_all_lengths() -> None:
    """The lengths are read on the device, so a captured step replays at any position."""
    starts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    ends = torch.full((2,), 900, dtype=torch.int32, device=DEVICE)
    q = torch.randn(2, 1, 8, 64, dtype=torch.bfloat16, device=DEVICE)
    k, v = (torch.randn(2, 1000, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    decode(q, k, v, starts, ends, scale=0.125)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, k, v, starts, ends, scale=0.125)
    for end in (900, 1, 333, 1000):
        ends.fill_(end)
        graph.replay()
        want = definition(q, k, v, starts, ends, 0.125, -1)
        assert ((out.double() - want).norm() / want.norm()).item() < 1.5e-2


@pytest.mark.gpu
def test_compiles_without_graph_breaks() -> None:
    starts, ends = (torch.tensor([n, n + 50], dtype=torch.int32, device=DEVICE) for n in (0, 64))
    q = torch.randn(2, 1, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    k = torch.randn(2, 128, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    f = torch.compile(lambda *args: decode(*args, scale=0.125), fullgraph=True)
    assert torch.equal(f(q, k, k, starts, ends), decode(q, k, k, starts, ends, scale=0.125))


def test_unsupported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.ones(1, 1, 4, 32), torch.ones(1, 9, 2, 32)
    monkeypatch.setattr(decode_triton, "triton_refusal", lambda x: f"not on {x.device.type}")
    assert "not on cpu" in str(unsupported(q, k))
    monkeypatch.setattr(decode_triton, "triton_refusal", lambda x: None)
    assert unsupported(q, k) is None
    assert "share a dtype" in str(unsupported(q, k.half()))
    assert "at most 256, not 512" in str(
        unsupported(torch.ones(1, 1, 1, 512), torch.ones(1, 1, 1, 512))
    )
    assert "at most 8 query tokens" in str(unsupported(torch.ones(1, 9, 4, 32), k))
