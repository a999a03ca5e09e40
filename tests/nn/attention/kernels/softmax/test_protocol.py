"""The kernel protocol on the CPU: fused and block-wise implementations of one varlen problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nn.attention.reference import relative, softmax_attention
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.kernels.softmax import Kernel, blockwise, get_kernel
from olmo_core.nn.attention.segments import Segments


class Blockwise:
    """What the torch kernel falls back to on other devices, reachable here by name."""

    name = "blockwise"
    forward = staticmethod(blockwise.forward)
    backward = staticmethod(blockwise.backward)


KERNELS: dict[str, Kernel] = {"torch": get_kernel("torch"), "blockwise": Blockwise()}
SCALE = 0.3


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    lengths = st.integers(0, 9)
    segments = draw(st.integers(1, 12))
    same = draw(st.booleans())
    q = draw(st.lists(lengths, min_size=segments, max_size=segments))
    k = q if same else draw(st.lists(lengths, min_size=segments, max_size=segments))
    if draw(st.booleans()):
        q, k = (
            [n + 150 if i == 0 else n for i, n in enumerate(q)],
            ([n + 150 if i == 0 else n for i, n in enumerate(k)]),
        )
    causal = draw(st.booleans())
    return {
        "q": q, "k": k, "same": same, "causal": causal,
        "window": draw(st.sampled_from([-1, 1, 2, 70, 1000])) if causal else -1,
        "heads": draw(st.sampled_from([(1, 1), (4, 2), (3, 1)])),
        "head_dim": draw(st.sampled_from([1, 4, 7])),
    }  # fmt: skip


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(c: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Segments]:
    cu_q = cumulative(c["q"])
    cu_k = cu_q if c["same"] else cumulative(c["k"])
    (h, g), d = c["heads"], c["head_dim"]
    n_q, n_k = int(cu_q[-1]), int(cu_k[-1])
    q, dout = (torch.randn(1, n_q, h, d, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, n_k, g, d, dtype=dtype) for _ in range(2))
    s = Segments(cu_q, cu_k, max(c["q"]), max(c["k"]), c["causal"], c["window"])
    return [q, k, v, dout], s


def reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor) -> list[Tensor]:
    q, k, v = (x[0].detach().double().requires_grad_() for x in (q, k, v))
    out = softmax_attention(q, k, v, mask, SCALE)
    grads = torch.autograd.grad(out, (q, k, v), dout[0].double())
    return [x[None] for x in (out.detach(), *grads)]


def dense_mask(c: dict[str, Any]) -> Tensor:
    """By the definition of a bottom-right problem, one pair at a time."""
    mask = torch.zeros(sum(c["q"]), sum(c["k"]), dtype=torch.bool)
    q0 = k0 = 0
    for n, m in zip(c["q"], c["k"]):
        for i in range(n):
            last = i + m - n if c["causal"] else m - 1
            first = 0 if c["window"] < 0 else last - c["window"] + 1
            mask[q0 + i, k0 + max(0, first) : k0 + max(0, last + 1)] = True
        q0, k0 = q0 + n, k0 + m
    return mask


@settings(max_examples=60)
@given(problems())
def test_segments_materialize_the_definition(c: dict[str, Any]) -> None:
    _, s = tensors(c)
    assert torch.equal(s.materialize(sum(c["q"]), sum(c["k"])), dense_mask(c))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@settings(max_examples=60)
@given(c=problems())
def test_forward_and_backward(kernel: Kernel, c: dict[str, Any]) -> None:
    (q, k, v, dout), s = tensors(c)
    mask = dense_mask(c)
    out, lse, rng = kernel.forward(q, k, v, s, scale=SCALE)
    assert out.is_contiguous() and lse.is_contiguous() and rng.shape == (0,)
    assert lse.shape == (1, q.shape[2], q.shape[1]) and lse.dtype == torch.float64
    if not q.numel() or not k.numel():
        assert (out == 0).all() and (lse == -math.inf).all()
        return
    want, *grads = reference(q, k, v, dout, mask)
    rep = q.shape[2] // k.shape[2]
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0].repeat_interleave(rep, 1)) * SCALE
    assert torch.allclose(lse[0], scores.masked_fill(~mask, -math.inf).logsumexp(-1), atol=1e-12)
    got = (out, *kernel.backward(dout, q, k, v, out, lse, rng, s, scale=SCALE))
    for a, b in zip(got, (want, *grads)):
        assert (a - b).abs().max() < 1e-11
    empty = ~mask.any(-1)
    assert (out[0, empty] == 0).all() and (lse[0][:, empty] == -math.inf).all()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_key_blocks_merge_and_their_gradients_add_up(kernel: Kernel, dtype: torch.dtype) -> None:
    """What ring attention needs: backward with the out and lse of all blocks."""
    n, h, g, d = 24, 4, 2, 8
    q, dout = (torch.randn(1, n, h, d, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, 2 * n, g, d, dtype=dtype) for _ in range(2))
    mask = torch.ones(n, 2 * n, dtype=torch.bool).tril(n)
    want = reference(q, k, v, dout, mask)
    blocks = [
        (slice(0, n), Segments.dense(n, n, causal=False)),
        (slice(n, 2 * n), Segments.dense(n, n)),
    ]
    parts = [kernel.forward(q, k[:, at], v[:, at], s, scale=SCALE) for at, s in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part[1] - lse).exp().transpose(1, 2)[..., None] for part in parts]
    out = sum(part[0].to(lse.dtype) * w for part, w in zip(parts, weights)).to(dtype)
    dq, dk, dv = torch.zeros_like(q, dtype=torch.float64), [], []
    for at, s in blocks:
        grads = kernel.backward(dout, q, k[:, at], v[:, at], out, lse, parts[0][2], s, scale=SCALE)
        dq, dk, dv = dq + grads[0], [*dk, grads[1]], [*dv, grads[2]]
    bound = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for got, expected in zip((out, dq, torch.cat(dk, 1), torch.cat(dv, 1)), want):
        assert relative(got, expected) < bound


@pytest.mark.parametrize("ends", [(20, 70, 71, 150), range(2, 151, 2)], ids=["few", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lengths_are_about_the_flattened_batch(ends: Sequence[int], dtype: torch.dtype) -> None:
    """The first document crosses no row, the second does."""
    kernel = KERNELS["torch"]
    q, dout = (torch.randn(3, 50, 4, 8, dtype=dtype) for _ in range(2))
    k, v = torch.randn(2, 3, 50, 2, 8, dtype=dtype)
    cu = torch.tensor([0, *ends], dtype=torch.int32)
    for s in (Segments.documents(cu, 79), Segments.documents(cu, 79, window=3)):
        out, lse, rng = kernel.forward(q, k, v, s, scale=SCALE)
        grads = kernel.backward(dout, q, k, v, out, lse, rng, s, scale=SCALE)
        assert out.shape == q.shape and [g.shape for g in grads] == [q.shape, k.shape, v.shape]
        row = [x.flatten(0, 1)[None] for x in (q, k, v, dout)]
        want, want_lse, rng = kernel.forward(*row[:3], s, scale=SCALE)
        assert torch.equal(out.view(want.shape), want) and torch.equal(lse, want_lse)
        one_row = kernel.backward(row[3], *row[:3], want, want_lse, rng, s, scale=SCALE)
        assert all(torch.equal(a.view(b.shape), b) for a, b in zip(grads, one_row, strict=True))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_strided_views_of_packed_qkv(kernel: Kernel) -> None:
    qkv = torch.randn(2, 9, 3, 2, 4, dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    s = Segments.dense(9, 9, window=4)
    strided = kernel.forward(q, k, v, s, scale=SCALE)[0]
    assert torch.equal(
        strided, kernel.forward(*(x.contiguous() for x in (q, k, v)), s, scale=SCALE)[0]
    )


@pytest.mark.parametrize(("window", "causal"), [(-1, True), (50, True)])
def test_saved_memory_grows_with_the_window(window: int, causal: bool) -> None:
    """Saved tensors are the inputs, the output and lse: never a mask of T x T."""
    saved = {}
    for n in (256, 512):
        q = torch.randn(1, n, 2, 4, requires_grad=True)
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend(q, q, q, Segments.dense(n, n, window=window), scale=1.0, kernel="torch")
        saved[n] = total
    assert saved[512] == 2 * saved[256]


def test_ops_have_correct_fakes_and_autograd() -> None:
    q = torch.randn(1, 12, 4, 8, requires_grad=True)
    k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(2))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    problem = (cu, cu, 7, 7, True, -1, 0.5, 0.0, "torch")
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(torch.ops.olmo_core.attend, (q, k, v, *problem), test_utils=checks)


@pytest.mark.parametrize(
    ("q", "k", "match"),
    [
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, 4), "Expected q"),
        (torch.zeros(1, 3, 2, 4), torch.zeros(2, 3, 2, 4), "agree in batch"),
        (torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 8), "agree in batch"),
        (torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 2, 4), "multiple of the"),
        (torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4).half(), "share a floating dtype"),
        (torch.zeros(1, 3, 2, 4).int(), torch.zeros(1, 3, 2, 4).int(), "share a floating dtype"),
        (torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4, device="meta"), "share a device"),
    ],
)
def test_bad_calls_of_attend(q: Tensor, k: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        attend(q, k, k, Segments.dense(3, 3), scale=1.0, kernel="torch")
