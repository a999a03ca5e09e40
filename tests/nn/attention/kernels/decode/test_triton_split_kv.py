"""Split-KV decoding against its definition, with NaN wherever a kernel must not look."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.decoding.step import decode_step
from olmo_core.nn.attention.kernels.decode import triton_split_kv
from olmo_core.nn.attention.kernels.decode.triton_split_kv import n_splits, split_kv, unsupported

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
    q: Tensor, keys: Tensor, values: Tensor, position: int, leftpad: Tensor, scale: float,
    window: int,
) -> Tensor:  # fmt: skip
    """One softmax per row and head, in float64, over keys in order of position."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[2] // keys.shape[2]
    for b, pad in enumerate(leftpad.tolist()):
        start = pad if window < 0 else max(pad, position + 1 - window)
        if start > position:
            continue
        k, v = (
            x[b, start : position + 1].double().repeat_interleave(group, 1) for x in (keys, values)
        )
        weights = (torch.einsum("hd,shd->hs", q[b, 0].double(), k) * scale).softmax(-1)
        out[b, 0] = torch.einsum("hs,shd->hd", weights, v)
    return out


def cache_before(
    tokens: Tensor, position: int, leftpad: Tensor, slots: int, is_ring: bool
) -> Tensor:
    """The tokens before ``position`` in their slots, and NaN elsewhere; heads and slots are
    transposed in memory."""
    batch, _, heads, dim = tokens.shape
    x = torch.full((batch, heads, slots, dim), math.nan, dtype=tokens.dtype, device=DEVICE)
    x = x.transpose(1, 2)
    for b, pad in enumerate(leftpad.tolist()):
        for p in range(pad, position):
            x[b, (p - pad) % slots if is_ring else p] = tokens[b, p]
    return x


@needs_kernel
def test_heads_may_be_billions_of_elements_apart() -> None:
    """A cache that is (B, H, S, D) in memory with S * D = 2^30, and queries likewise."""

    def far_apart(x: Tensor) -> Tensor:
        _, length, heads, dim = x.shape
        memory = torch.empty((heads - 1) * 2**30 + length * dim, dtype=x.dtype, device=DEVICE)
        return memory.as_strided(x.shape, (length * dim, dim, 2**30, 1)).copy_(x)

    near = [torch.randn(1, n, 3, 16, device=DEVICE, dtype=torch.float16) for n in (1, 1, 1, 20, 20)]
    seqlen, leftpad = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (9, [0]))
    want = split_kv(*near, seqlen, leftpad, scale=0.25, store=True)
    far = [far_apart(x) for x in near]
    assert torch.equal(split_kv(*far, seqlen, leftpad, scale=0.25, store=True), want)
    assert torch.equal(far[3][:, 9], near[1][:, 0]) and torch.equal(far[4][:, 9], near[2][:, 0])


@needs_kernel
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "slots", "splits"),
    [
        (4, 2, 32, -1, 200, 1),
        (4, 2, 24, 7, 150, 3),  # head_dim padded; a window without a ring
        (8, 1, 64, -1, 131, 5),  # more splits than some rows have slots
        (16, 4, 128, 100, 100, 4),  # a ring, full
        (3, 3, 16, 1, 1, 2),
        (6, 2, 96, 140, 140, 2),  # a ring, not full
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store", [True, False])
def test_decode_is_the_definition(
    heads: int, kv_heads: int, dim: int, window: int, slots: int, splits: int, store: bool,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 products")
    monkeypatch.setattr(triton_split_kv, "n_splits", lambda *_: splits)
    position, is_ring = 130, slots == window
    leftpad = torch.tensor([131, 0, 17, 130, 129], dtype=torch.int32, device=DEVICE)
    q = torch.randn(5, 1, heads, dim, dtype=dtype, device=DEVICE)
    keys, values = torch.randn(2, 5, 131, kv_heads, dim, dtype=dtype, device=DEVICE)
    k_cache, v_cache = (cache_before(x, position, leftpad, slots, is_ring) for x in (keys, values))
    seqlen = torch.tensor(position, dtype=torch.int32, device=DEVICE)
    k, v = keys[:, -1:], values[:, -1:]
    got = split_kv(
        q, k, v, k_cache, v_cache, seqlen, leftpad,
        scale=0.3, window=window, is_ring=is_ring, store=store,
    )  # fmt: skip
    want = definition(q, keys, values, position, leftpad, 0.3, window)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert got.dtype == dtype and got.is_contiguous()
    assert not got[0].any()
    assert ((got.double() - want).norm() / want.norm()).item() < bound
    for cache, new, tokens in ((k_cache, k, keys), (v_cache, v, values)):
        after = cache_before(tokens, position, leftpad, slots, is_ring)
        for b, pad in enumerate(leftpad.tolist()):
            slot = (position - pad) % slots if is_ring else position
            if store:
                after[b, slot] = new[b, 0] if pad <= position else 0
        assert torch.equal(cache.nan_to_num(7.0), after.nan_to_num(7.0)), (
            "one slot a row is written, or none"
        )


@needs_kernel
@pytest.mark.parametrize(("window", "rollback"), [(-1, 0), (4, 0), (13, 6), (40, 0)])
@pytest.mark.parametrize("leftpad", [None, (0, 5, 18)])
def test_a_cache_fills_as_without_triton(
    window: int, rollback: int, leftpad: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token from an empty cache, padding included."""
    q, k, v = torch.randn(3, 3, 18, 2, 16, device=DEVICE)
    answers, stored = [], []
    for with_triton in (True, False):
        if not with_triton:
            monkeypatch.setattr(triton_split_kv, "unsupported", lambda *_: "not now")
        cache = KVCacheManager(
            3, 18, 2, 16, DEVICE, torch.float32, window=window, max_rollback=rollback
        )
        if leftpad is not None:
            cache.record_leftpad(torch.tensor(leftpad, dtype=torch.int32, device=DEVICE))
        steps = [
            decode_step(
                q[:, t, None], k[:, t, None], v[:, t, None], cache, scale=0.3, window=window
            )
            for t in range(18)
        ]
        answers.append(torch.cat(steps, dim=1))
        stored.append(torch.stack([cache.k_cache, cache.v_cache]))
        assert cache.cache_seqlens.item() == 18
    assert (answers[0] - answers[1]).abs().max() < 1e-5
    assert torch.equal(*stored)


@needs_kernel
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("position", [20, 21, 500])
def test_a_token_without_a_slot_is_loud_and_harmless(
    splits: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replayed CUDA graph can't raise."""
    monkeypatch.setattr(triton_split_kv, "n_splits", lambda *_: splits)
    memory = torch.randn(2, 3, 40, 2, 16, device=DEVICE)
    k_cache, v_cache = memory[:, :, :20]
    before = memory.clone()
    q, k, v = torch.randn(3, 3, 1, 2, 16, device=DEVICE)
    seqlen, leftpad = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (position, [0, 4, 20])
    )
    out = split_kv(q, k, v, k_cache, v_cache, seqlen, leftpad, scale=0.3, store=True)
    assert out.isnan().all()
    assert torch.equal(memory, before)


def test_splits_fill_the_gpu() -> None:
    assert n_splits(128, 8192, 132) == 2  # 256 of 264 programs that fit at once
    assert n_splits(4, 8192, 132) >= 30  # of 32 shares that are long enough
    assert n_splits(4, 100, 132) == 1
    for programs in (1, 3, 40, 128, 1000):
        for slots in (1, 500, 5_000, 100_000):
            assert 1 <= n_splits(programs, slots, 132) <= max(1, slots // 256)


@pytest.mark.gpu
def test_one_graph_serves_all_lengths() -> None:
    """The position is read on the device, so a captured step replays at any position."""
    seqlen = torch.tensor(900, dtype=torch.int32, device=DEVICE)
    leftpad = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    q = torch.randn(2, 1, 8, 64, dtype=torch.bfloat16, device=DEVICE)
    k_cache, v_cache = torch.randn(2, 2, 1000, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    k, v = torch.randn(2, 2, 1, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    split_kv(q, k, v, k_cache, v_cache, seqlen, leftpad, scale=0.125)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = split_kv(q, k, v, k_cache, v_cache, seqlen, leftpad, scale=0.125, store=True)
    for position in (900, 0, 333, 999):
        seqlen.fill_(position)
        graph.replay()
        assert torch.equal(k_cache[:, position], k[:, 0])
        want = definition(q, k_cache, v_cache, position, leftpad, 0.125, -1)
        assert ((out.double() - want).norm() / want.norm()).item() < 1.5e-2


@needs_kernel
@pytest.mark.parametrize("window", [-1, 4])
def test_a_compiled_step_stores_too(window: int) -> None:
    """Caches may be views of one tensor, which Inductor of torch 2.11 gets wrong in place."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = torch.randn(3, 2, 12, 2, 64, dtype=dtype, device=DEVICE)
    steps: list[Tensor] = []
    stored = []
    compiled = torch.compile(
        decode_step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager"
    )
    for step in (decode_step, compiled):
        cache = KVCacheManager(2, 12, 2, 64, DEVICE, dtype, window=window)
        cache.k_cache, cache.v_cache = torch.zeros(2, *cache.k_cache.shape).to(cache.k_cache)
        cache.record_leftpad(torch.tensor([0, 3], dtype=torch.int32, device=DEVICE))
        outs = [
            step(q[:, t, None], k[:, t, None], v[:, t, None], cache, scale=0.3, window=window)
            for t in range(12)
        ]
        steps.append(torch.cat(outs, dim=1))
        stored.append(torch.stack([cache.k_cache, cache.v_cache]))
        assert cache.cache_seqlens.item() == 12
    assert torch.equal(*steps) and torch.equal(*stored)


def test_unsupported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.ones(1, 1, 4, 32), torch.ones(1, 9, 2, 32)
    monkeypatch.setattr(triton_split_kv, "triton_refusal", lambda x: f"not on {x.device.type}")
    assert "not on cpu" in str(unsupported(q, k))
    monkeypatch.setattr(triton_split_kv, "triton_refusal", lambda x: None)
    assert unsupported(q, k) is None
    assert "share a dtype" in str(unsupported(q, k.half()))
    assert "at most 256, not 512" in str(
        unsupported(torch.ones(1, 1, 1, 512), torch.ones(1, 1, 1, 512))
    )
    assert "at most 128 query heads" in str(
        unsupported(torch.ones(1, 1, 400, 32), torch.ones(1, 9, 2, 32))
    )
