"""Each library kernel on a GPU against float64: outputs, log-sum-exp and all gradients.

A kernel may be off by as much as torch's own half-precision attention, not by a guess: the bound of
each case is twice the error that the mathematics has with q, k, v and the weights rounded to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention.capabilities import CAPABILITIES, Environment, Request, refusals
from olmo_core.nn.attention.kernels.softmax import Feature, Kernel, get_kernel
from olmo_core.nn.attention.segments import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # libraries warn at import
KERNELS = ["torch", "flash_2", "flash_3", "flash_4", "te"]
CUDA = "cuda"


def kernel_or_skip(name: str, dim: int, dtype: torch.dtype, *features: Feature) -> Kernel:
    request = Request(dtype, dim, frozenset(features))
    reasons = refusals(CAPABILITIES[name], Environment.detect(CUDA), request)
    if reasons:
        pytest.skip("; ".join(reasons))
    return get_kernel(name)


def poison() -> None:
    """Fill the allocator's free memory with NaN, so that an unwritten output shows."""
    blocks = [torch.full((2**20,), math.nan, device=CUDA) for _ in range(24)]
    del blocks


@dataclass
class Reference:
    """Attention by its definition in float64, from keys that may be a block of all keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    s: Segments
    scale: float

    def scores(self) -> Tensor:
        rep = self.q.shape[2] // self.k.shape[2]
        keys = self.k.double().repeat_interleave(rep, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", self.q.double(), keys) * self.scale
        hidden = ~self.s.materialize(self.q.shape[1], self.k.shape[1]).to(CUDA)
        return scores.masked_fill(hidden, -math.inf)

    def forward(self) -> tuple[Tensor, Tensor]:
        scores = self.scores()
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None].nan_to_num(neginf=0.0)).exp()
        values = self.v.double().repeat_interleave(self.q.shape[2] // self.k.shape[2], 2)
        return torch.einsum("bhqk,bkhd->bqhd", weights, values), lse

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """This block's share, from the global out and lse (Dao, 2023, section 3.1)."""
        g = self.k.shape[2]
        rep = self.q.shape[2] // g
        dout, out, lse = dout.double(), out.double(), lse.double()
        keys, values = (x.double().repeat_interleave(rep, 2) for x in (self.k, self.v))
        weights = (self.scores() - lse[..., None].nan_to_num(neginf=0.0)).exp()
        d_weights = torch.einsum("bqhd,bkhd->bhqk", dout, values)
        delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
        d_scores = weights * (d_weights - delta) * self.scale
        dq = torch.einsum("bhqk,bkhd->bqhd", d_scores, keys)
        dk = torch.einsum("bhqk,bqhd->bkhd", d_scores, self.q.double())
        dv = torch.einsum("bhqk,bqhd->bkhd", weights, dout)
        fold = lambda x: x.unflatten(2, (g, rep)).sum(3)  # noqa: E731
        return dq, fold(dk), fold(dv)


def error(got: Tensor, want: Tensor) -> float:
    """Relative to the norm of ``want``, which is zero for dq where each query sees one key."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-3 * want.numel() ** 0.5)).item()


def bound(dtype: torch.dtype) -> float:
    """bf16 keeps 8 bits; weights, out and gradients are each rounded once or twice."""
    return {torch.bfloat16: 8e-3, torch.float16: 1.2e-3}[dtype]


def tensors(
    batch: int, n_q: int, n_k: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as slices of one projection where lengths allow, and a dense gradient."""
    q = torch.randn(batch, n_q, heads, dim, device=CUDA, dtype=dtype)
    kv = torch.randn(batch, n_k, 2 * kv_heads, dim, device=CUDA, dtype=dtype)
    return q, kv[:, :, :kv_heads], kv[:, :, kv_heads:], torch.randn_like(q)


def cu(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32, device=CUDA)


def check(kernel: Kernel, s: Segments, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    scale = 0.7 * q.shape[3] ** -0.5
    reference = Reference(q, k, v, s, scale)
    want, want_lse = reference.forward()
    poison()
    out, lse, rng = kernel.forward(q, k, v, s, scale=scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    assert lse.is_contiguous() and rng.shape == (0,)
    empty = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty), "a query without keys has lse -inf, no other has"
    assert not out.transpose(1, 2)[empty].any(), "a query without keys gives 0"
    assert error(out, want) < bound(q.dtype)
    assert error(lse[~empty], want_lse[~empty]) < 1e-3
    poison()
    grads = kernel.backward(dout, q, k, v, out, lse, rng, s, scale=scale)
    for name, got, true in zip("qkv", grads, reference.backward(dout, want, want_lse), strict=True):
        assert got.shape == true.shape and got.dtype == q.dtype
        assert error(got, true) < bound(q.dtype), f"d{name} is off by {error(got, true):.1e}"


PROBLEMS: dict[str, Callable[[], Segments]] = {
    "causal": lambda: Segments.dense(200, 200),
    "full": lambda: Segments.dense(200, 200, causal=False),
    "window": lambda: Segments.dense(200, 200, window=37),
    "window of 1": lambda: Segments.dense(200, 200, window=1),
    "window of all": lambda: Segments.dense(200, 200, window=1000),
    "fewer queries": lambda: Segments.dense(70, 200),
    "fewer queries, window": lambda: Segments.dense(70, 200, window=50),
    "one query": lambda: Segments.dense(1, 200),
    "one token": lambda: Segments.dense(1, 1),
    "one key": lambda: Segments.dense(200, 1, causal=False),
    "more queries": lambda: Segments.dense(200, 70),
}
DOCUMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, int]] = {
    "documents": ((7, 8, 130, 257), (7, 8, 130, 257), True, -1),
    "repeated ends": ((40, 130, 257, 257, 257), (40, 130, 257, 257, 257), True, -1),
    "empty in the middle": ((40, 40, 257), (40, 40, 257), True, -1),
    "documents, window": ((7, 8, 130, 257), (7, 8, 130, 257), True, 25),
    "tiny": (tuple(range(1, 258)), tuple(range(1, 258)), True, -1),
    "one token": (tuple(range(1, 258)), tuple(range(1, 258)), True, -1),
    "gathered keys": ((30, 31, 100), (60, 131, 231), True, -1),
    "gathered keys, window": ((30, 31, 100), (60, 131, 231), True, 40),
    "not causal": ((30, 100), (60, 131), False, -1),
    "queries without keys": ((30, 100, 120), (60, 60, 131), True, -1),
    "keys without queries": ((30, 30, 100), (60, 90, 171), True, -1),
    "more queries than keys": ((90, 100), (20, 60), True, -1),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", KERNELS)
def test_dense(name: str, problem: str) -> None:
    s = PROBLEMS[problem]()
    kernel = kernel_or_skip(name, 128, torch.bfloat16, Feature.lse, Feature.backward)
    check(kernel, s, *tensors(2, s.max_q, s.max_k, 8, 2, 128, torch.bfloat16))


@pytest.mark.parametrize("problem", DOCUMENTS)
@pytest.mark.parametrize("name", KERNELS)
def test_documents(name: str, problem: str) -> None:
    ends_q, ends_k, causal, window = DOCUMENTS[problem]
    longest = [max(b - a for a, b in zip((0, *e), e)) for e in (ends_q, ends_k)]
    cu_q = cu(*ends_q)
    cu_k = cu_q if ends_k == ends_q else cu(*ends_k)
    loose = 0 if problem == "one token" else 3  # upper bounds need not be tight
    s = Segments(cu_q, cu_k, longest[0] + loose, longest[1] + loose, causal, window)
    kernel = kernel_or_skip(name, 128, torch.bfloat16, Feature.documents, Feature.lse)
    check(kernel, s, *tensors(1, ends_q[-1], ends_k[-1], 8, 2, 128, torch.bfloat16))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 1)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KERNELS)
def test_heads_and_dtypes(
    name: str, dtype: torch.dtype, dim: int, heads: int, kv_heads: int
) -> None:
    kernel = kernel_or_skip(name, dim, dtype)
    check(kernel, Segments.dense(130, 130), *tensors(2, 130, 130, heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("name", KERNELS)
def test_lengths_are_about_the_flattened_batch(name: str) -> None:
    """The second document crosses a row."""
    kernel = kernel_or_skip(name, 64, torch.bfloat16, Feature.documents)
    q, k, v, dout = tensors(3, 50, 50, 4, 2, 64, torch.bfloat16)
    s = Segments.documents(cu(20, 70, 71, 150), 79)
    out, lse, rng = kernel.forward(q, k, v, s, scale=0.1)
    grads = kernel.backward(dout, q, k, v, out, lse, rng, s, scale=0.1)
    assert out.shape == q.shape and [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    row = [x.flatten(0, 1)[None] for x in (q, k, v)]
    want, want_lse, rng = kernel.forward(*row, s, scale=0.1)
    assert torch.equal(out.view(want.shape), want) and torch.equal(lse, want_lse)
    dout = dout.view(want.shape)
    one_row = kernel.backward(dout, *row, want, want_lse, rng, s, scale=0.1)
    for a, b in zip(grads, one_row, strict=True):
        assert error(a.view(b.shape), b) < 1e-3  # atomic additions come in any order


@pytest.mark.parametrize("name", KERNELS)
def test_two_key_blocks_merge(name: str) -> None:
    """Keys in two blocks, merged; then each block's gradients from the global out and lse."""
    kernel = kernel_or_skip(name, 128, torch.bfloat16, Feature.lse, Feature.documents)
    n, half = 256, 128
    q, k, v, dout = tensors(1, n, 2 * n, 8, 2, 128, torch.bfloat16)
    ends = cu(half, n)
    whole = Segments(ends, cu(2 * half, 2 * n), half, 2 * half, True, -1)
    old = torch.cat([torch.arange(half), torch.arange(2 * half, 3 * half)]).to(CUDA)
    new = old + half
    blocks = [
        (k[:, old], v[:, old], Segments(ends, cu(half, n), half, half, False, -1)),
        (k[:, new], v[:, new], Segments(ends, ends, half, half, True, -1)),
    ]
    scale = 0.1
    reference = Reference(q, k, v, whole, scale)
    want, want_lse = reference.forward()
    parts = [kernel.forward(q, kb, vb, s, scale=scale) for kb, vb, s in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(
        o.float() * (part_lse - lse).exp().transpose(1, 2)[..., None] for o, part_lse, _ in parts
    )
    assert isinstance(out, Tensor)
    assert error(out, want) < bound(q.dtype)
    out = out.to(q.dtype)
    dq_want, dk_want, dv_want = reference.backward(dout, want, want_lse)
    dq = torch.zeros_like(dq_want)
    for (kb, vb, s), (_, _, rng), at in zip(blocks, parts, (old, new), strict=True):
        grads = kernel.backward(dout, q, kb, vb, out, lse, rng, s, scale=scale)
        dq += grads[0].double()
        assert error(grads[1], dk_want[:, at]) < bound(q.dtype)
        assert error(grads[2], dv_want[:, at]) < bound(q.dtype)
    assert error(dq, dq_want) < bound(q.dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_no_keys_and_no_queries(name: str) -> None:
    kernel = kernel_or_skip(name, 64, torch.bfloat16)
    for n_q, n_k in ((5, 0), (0, 5)):
        q, k, v, dout = tensors(2, n_q, n_k, 4, 2, 64, torch.bfloat16)
        out, lse, rng = kernel.forward(q, k, v, Segments.dense(n_q, n_k), scale=1.0)
        grads = kernel.backward(dout, q, k, v, out, lse, rng, Segments.dense(n_q, n_k), scale=1.0)
        assert not out.any() and bool((lse == -math.inf).all())
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", ["torch", "flash_2"])
def test_dropout_replays_in_backward(name: str, lengths: bool) -> None:
    """v = 1 turns the output into the kept weight, and dv sums the same weights over queries."""
    kernel = kernel_or_skip(name, 64, torch.bfloat16, Feature.dropout)
    n, p = 512, 0.25
    s = Segments.documents(cu(n), n) if lengths else Segments.dense(n, n)
    q, k, _, _ = tensors(1, n, n, 4, 4, 64, torch.bfloat16)
    ones = torch.ones_like(q)
    out, lse, rng = kernel.forward(q, k, ones, s, scale=0.125, dropout_p=p)
    assert rng.shape == (2,) and rng.dtype == torch.int64
    assert abs(out.float().mean().item() - 1) < 0.05 and out.float().std() > 0.01
    _, _, dv = kernel.backward(ones, q, k, ones, out, lse, rng, s, scale=0.125, dropout_p=p)
    # sum_ij P~_ij, by queries and by keys: equal only if both passes dropped the same weights.
    by_query, by_key = (x[..., 0].double().sum() for x in (out, dv))
    assert abs(by_query - by_key) / by_query < 2e-3
    again, _, other = kernel.forward(q, k, ones, s, scale=0.125, dropout_p=p)
    assert not torch.equal(again, out) and not torch.equal(other, rng)
