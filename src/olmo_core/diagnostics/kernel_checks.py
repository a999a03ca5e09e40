"""One check for each :class:`Feature` of the capability table, against the definition.

``doctor`` makes its ticks from these, and ``verify`` its rows for the kernels. Each runs a small
problem, forward and (but for the caches) backward, with blocks, windows and documents that do not
fit each other.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_core.diagnostics.measures import Comparison, bound, reference_dtype
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.config import AttentionBackendName
from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.kernels.softmax import Feature, get_kernel
from olmo_core.nn.attention.kernels.softmax.reference import dense_attention
from olmo_core.nn.attention.parallel.exchange import accumulator
from olmo_core.nn.attention.parallel.layout import ZigZagLayout
from olmo_core.nn.attention.parallel.plan import ring_plan
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.attention.parallel.ring import merge_, ring_steps
from olmo_core.nn.attention.segments import Segments
from olmo_core.nn.functional import row_error

__all__ = ["CHECKS", "N_HEADS", "N_KV_HEADS", "Place"]

N_HEADS, N_KV_HEADS = 4, 2
_WINDOWS = (5, 70)


class Place(NamedTuple):
    """Where a check runs."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.head_dim**-0.5


class _Problem(NamedTuple):
    """Inputs, float64 in values that each dtype holds, and who sees whom."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor  # (t_q, t_k)
    segments: Segments


Check = Callable[[Place], list[Comparison]]


def _backward(place: Place) -> list[Comparison]:
    return _compare(place, _dense(place, 150, 150, -1))


def _window(place: Place) -> list[Comparison]:
    """Square problems; and fewer queries than keys: windows count from the bottom right."""
    shapes = [(150, 150, w) for w in _WINDOWS] + [(40, 150, w) for w in _WINDOWS] + [(90, 90, 2)]
    return [
        c._replace(what=f"{c.what} ({n_q} x {n_k}, window {w})")
        for n_q, n_k, w in shapes
        for c in _compare(place, _dense(place, n_q, n_k, w))
    ]


def _documents(place: Place) -> list[Comparison]:
    """Packed documents; then queries and keys of other lengths, some without any of the other."""
    own = (1, 9, 0, 31, 2, 90, 1)
    queries, keys = (5, 0, 40, 7, 1, 12, 3), (9, 4, 40, 0, 70, 2, 3)
    cases = [("packed", own, own, -1), ("packed, window 5", own, own, 5)]
    cases += [
        ("queries and keys", queries, keys, -1),
        ("queries and keys, window 5", queries, keys, 5),
    ]
    return [
        c._replace(what=f"{c.what} ({name})")
        for name, n_q, n_k, window in cases
        for c in _compare(place, _varlen(place, n_q, n_k, window))
    ]


def _packed_qkv(place: Place) -> list[Comparison]:
    p = _dense(place, 150, 150, -1, kv_heads=N_HEADS)
    backend = AttentionBackendName(place.backend).build(head_dim=place.head_dim, n_heads=N_HEADS)
    qkv = torch.stack((p.q, p.k, p.v), dim=2).to(place.device, place.dtype).requires_grad_()
    out = backend(qkv)
    (grad,) = torch.autograd.grad(out, qkv, p.dout.to(out))
    return _against_truth(place, p, (out, *grad.unbind(2)))


def _kv_cache(place: Place) -> list[Comparison]:
    """A prefill, a chunk, and single tokens, through windows of each size and without one."""
    return [
        c._replace(what=f"out (window {w})" if w > 0 else "out")
        for w in (-1, *_WINDOWS)
        for c in _decode(place, w, (60, 1, 20, *[1] * 30), None)
    ]


def _left_padding(place: Place) -> list[Comparison]:
    return [
        c._replace(what=f"out (window {w})" if w > 0 else "out")
        for w in (-1, *_WINDOWS)
        for c in _decode(place, w, (60, 20, *[1] * 15), 33)
    ]


def _lse(place: Place) -> list[Comparison]:
    """The log-sum-exp; then keys in two blocks, merged, with gradients from the merged one."""
    n, split = 96, 40
    p = _dense(place, n - split, n, -1)
    truth, plain = _answers(place, p)
    q, k, v, dout = (x.to(place.device, place.dtype) for x in (p.q, p.k, p.v, p.dout))
    kernel, scale = get_kernel(place.backend), place.scale
    blocks = (
        (k[:, :split], v[:, :split], Segments.dense(n - split, split, causal=False)),
        (k[:, split:], v[:, split:], Segments.dense(n - split, n - split)),
    )
    parts = [kernel.forward(q, bk, bv, s, scale=scale) for bk, bv, s in blocks]
    merged = torch.logsumexp(torch.stack([lse for _, lse, _ in parts]), 0)
    shares = ((lse - merged).exp().transpose(1, 2)[..., None] for _, lse, _ in parts)
    out = torch.stack([o * share for (o, _, _), share in zip(parts, shares)]).sum(0)
    grads = [
        kernel.backward(
            dout, q, bk, bv, out.to(q.dtype).contiguous(), merged.contiguous(), rng, s, scale=scale
        )
        for (bk, bv, s), (_, _, rng) in zip(blocks, parts)
    ]
    dq = grads[0][0].double() + grads[1][0].double()
    dk, dv = (torch.cat((grads[0][i], grads[1][i]), dim=1) for i in (1, 2))
    whole = kernel.forward(q, k, v, p.segments, scale=scale)[1]
    want = truth[4][..., None]
    error = row_error(plain[4][..., None], want)
    return [
        Comparison("lse", row_error(whole[..., None], want), bound(error, place.dtype)),
        Comparison("merged lse", row_error(merged[..., None], want), bound(error, place.dtype)),
        *(c._replace(what=f"merged {c.what}") for c in _against_truth(place, p, (out, dq, dk, dv))),
    ]


def _ring(place: Place) -> list[Comparison]:
    """What a kernel does in a ring of two ranks, both computed here, without their messages."""
    lengths, ranks = (60, 4, 0, 32), 2
    p = _varlen(place, lengths, lengths, -1)
    cu = [0, *accumulate(lengths)]
    plan = ring_plan(Reading(cu, place.device), ranks, 1)
    held = [ZigZagLayout().table(cu, ranks).of(r).tokens().to(place.device) for r in range(ranks)]
    whole = [x.to(place.device, place.dtype) for x in (p.q, p.k, p.v, p.dout)]
    shards = [[x.index_select(1, rows) for x in whole] for rows in held]
    kernel, scale, acc = get_kernel(place.backend), place.scale, accumulator(place.dtype)
    out, dq, dk, dv = (torch.zeros_like(x, dtype=acc) for x in (whole[0], *whole[:3]))
    for rank, (q, _, _, dout) in enumerate(shards):
        blocks = []
        for i, (queries, keys, segments) in enumerate(ring_steps(plan, rank, ranks)):
            owner = (rank - i) % ranks
            rows = held[rank] if queries is None else held[rank][queries]
            columns = held[owner] if keys is None else held[owner][keys]
            blocks.append((queries, rows, columns, segments))
        merged, lse = torch.zeros(()), torch.zeros(())
        for i, (queries, rows, columns, segments) in enumerate(blocks):
            k, v = (x.index_select(1, columns) for x in whole[1:3])
            more, more_lse, _ = kernel.forward(whole[0][:, rows], k, v, segments, scale=scale)
            if i == 0:
                merged, lse = more.to(acc), more_lse
            elif queries is None:
                merge_(merged, lse, more, more_lse)
            else:
                part, part_lse = merged[:, queries], lse[:, :, queries]
                merge_(part, part_lse, more, more_lse)
                merged[:, queries], lse[:, :, queries] = part, part_lse
        out[:, held[rank]] = merged
        answer, rng = merged.to(q.dtype), q.new_empty(0, dtype=torch.int64)
        for queries, rows, columns, segments in blocks:
            pick = slice(None) if queries is None else queries
            k, v = (x.index_select(1, columns) for x in whole[1:3])
            grads = kernel.backward(
                dout[:, pick].contiguous(), whole[0][:, rows], k, v, answer[:, pick].contiguous(),
                lse[:, :, pick].contiguous(), rng, segments, scale=scale,
            )  # fmt: skip
            for total, where, grad in zip((dq, dk, dv), (rows, columns, columns), grads):
                total.index_add_(1, where, grad.to(acc))
    return _against_truth(place, p, tuple(x.to(place.dtype) for x in (out, dq, dk, dv)))


def _ulysses(place: Place) -> list[Comparison]:
    """A half of the heads at a time, as each of two ranks has them."""
    p = _dense(place, 150, 150, -1)
    halves = []
    for half in range(2):
        q, k, v, dout = (x.chunk(2, dim=2)[half] for x in (p.q, p.k, p.v, p.dout))
        halves.append(_attend(place, p._replace(q=q, k=k, v=v, dout=dout), 0.0))
    return _against_truth(place, p, tuple(torch.cat(pair, dim=2) for pair in zip(*halves)))


def _dropout(place: Place) -> list[Comparison]:
    """Values of one-hot vectors make the output the weights themselves, dropped ones included."""
    n, p_drop = min(place.head_dim, 64), 0.3
    p = _dense(place, n, n, -1)
    one_hot = torch.eye(n, place.head_dim, dtype=torch.float64).to(p.v)
    one_hot = one_hot[None, :, None].expand(p.v.shape)
    weights = dense_attention(p.q, p.k, one_hot, p.mask, place.scale)[0][..., :n]

    def run(v: Tensor) -> tuple[Tensor, ...]:
        return _attend(place, p._replace(v=v), p_drop)

    devices = [place.device] if place.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        got = run(one_hot)[0][..., :n].cpu().double()
        other = run(one_hot)[0][..., :n].cpu().double()
        torch.manual_seed(0)
        answer = run(p.v)
    seen = p.mask.cpu()[None, :, None].expand(got.shape)
    kept = seen & (got > 0.5 * weights.cpu())
    share = 1 - kept.sum().item() / seen.sum().item()
    sigma = (p_drop * (1 - p_drop) / seen.sum().item()) ** 0.5
    same = float(((other > 0.5 * weights.cpu()) & seen).equal(kept))
    factor = (kept.double() / (1 - p_drop)).transpose(1, 2).to(p.q.device)  # (1, h, t_q, t_k)
    return [
        Comparison("share of dropped weights", abs(share - p_drop), 5 * sigma),
        Comparison("equality of two draws", same, 0.0),
        *_against_truth(place, p, answer, factor),
    ]


def _deterministic(place: Place) -> list[Comparison]:
    """Bits that differ between two runs under ``torch.use_deterministic_algorithms``."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    problems = (_dense(place, 150, 150, -1), _varlen(place, (1, 60, 90), (1, 60, 90), 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            runs = [[_attend(place, p) for p in problems] for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
    first, second = ([x for answer in run for x in answer] for run in runs)
    differing = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    return [Comparison("values that differ", float(differing), 0.0)]


def _dense(place: Place, n_q: int, n_k: int, window: int, kv_heads: int = N_KV_HEADS) -> _Problem:
    back = torch.arange(n_q)[:, None] + (n_k - n_q) - torch.arange(n_k)[None]
    mask = (back >= 0) & ((back < window) if window > 0 else True)
    segments = Segments.dense(n_q, n_k, window=window)
    return _Problem(*_inputs(place, n_q, n_k, kv_heads), mask.to(_exact(place)), segments)


def _varlen(place: Place, n_q: tuple[int, ...], n_k: tuple[int, ...], window: int) -> _Problem:
    mask = torch.zeros(sum(n_q), sum(n_k), dtype=torch.bool)
    q0 = k0 = 0
    for a, b in zip(n_q, n_k, strict=True):
        back = torch.arange(a)[:, None] + (b - a) - torch.arange(b)[None]
        mask[q0 : q0 + a, k0 : k0 + b] = (back >= 0) & ((back < window) if window > 0 else True)
        q0, k0 = q0 + a, k0 + b
    cu_q = torch.tensor([0, *n_q]).cumsum(0).to(place.device, torch.int32)
    cu_k = cu_q if n_q == n_k else torch.tensor([0, *n_k]).cumsum(0).to(place.device, torch.int32)
    segments = Segments(cu_q, cu_k, max(n_q), max(n_k), True, window)
    inputs = _inputs(place, sum(n_q), sum(n_k), N_KV_HEADS)
    return _Problem(*inputs, mask.to(_exact(place)), segments)


def _inputs(
    place: Place, n_q: int, n_k: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, keys = (n_q, N_HEADS), (n_k, kv_heads)
    drawn = []
    for name, (length, heads) in (("q", queries), ("k", keys), ("v", keys), ("dout", queries)):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        x = torch.randn(1, length, heads, place.head_dim, generator=generator, dtype=torch.float64)
        drawn.append(x.bfloat16().half().double().to(_exact(place)))
    return drawn[0], drawn[1], drawn[2], drawn[3]


def _exact(place: Place) -> torch.device:
    return torch.device("cpu") if place.device.type == "mps" else place.device


def _attend(place: Place, p: _Problem, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """``out, dq, dk, dv`` of the code under test."""
    q, k, v = (x.to(place.device, place.dtype).requires_grad_() for x in (p.q, p.k, p.v))
    out = attend(q, k, v, p.segments, scale=place.scale, dropout_p=dropout_p, kernel=place.backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), p.dout.to(out)))


def _compare(place: Place, p: _Problem) -> list[Comparison]:
    return _against_truth(place, p, _attend(place, p))


def _against_truth(
    place: Place, p: _Problem, got: tuple[Tensor, ...], weight_factor: Tensor | None = None
) -> list[Comparison]:
    """``out, dq, dk, dv`` with their bounds."""
    truth, plain = _answers(place, p, weight_factor)
    names = ("out", "dq", "dk", "dv")
    return [
        Comparison(name, row_error(x, want), bound(row_error(low, want), place.dtype))
        for name, x, want, low in zip(names, got, truth, plain)
    ]


def _answers(
    place: Place, p: _Problem, weight_factor: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """``out, dq, dk, dv, lse`` in float64, and in the precision that bounds ``place.dtype``."""
    answers = []
    for dtype in (torch.float64, reference_dtype(place.dtype)):
        device = p.q.device if dtype == torch.float64 else place.device
        q, k, v = (x.to(device, dtype).requires_grad_() for x in (p.q, p.k, p.v))
        out, lse = dense_attention(q, k, v, p.mask.to(device), place.scale, weight_factor)
        grads = torch.autograd.grad(out, (q, k, v), p.dout.to(out))
        answers.append([out.detach(), *grads, lse.detach()])
    return answers[0], answers[1]


def _decode(
    place: Place, window: int, chunks: tuple[int, ...], pad: int | None
) -> list[Comparison]:
    """Two rows, the second padded on the left, fed in ``chunks`` to a cache."""
    total = sum(chunks)
    rows = [_inputs(place, total, total, N_KV_HEADS)[:3] for _ in range(2)]
    flipped = tuple(x.flip(1) for x in rows[1])
    q, k, v = (torch.cat(pair).to(place.device, place.dtype) for pair in zip(rows[0], flipped))
    backend = AttentionBackendName(place.backend).build(
        head_dim=place.head_dim,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        window_size=(-1, -1) if window < 0 else (window - 1, 0),
    )
    cache = KVCacheManager(
        2, total, N_KV_HEADS, place.head_dim, place.device, place.dtype, window=window
    )
    if pad is not None:
        cache.record_leftpad(torch.tensor([0, pad], dtype=torch.int32, device=place.device))
    outs, at = [], 0
    with torch.no_grad():
        for n in chunks:
            part = slice(at, at + n)
            outs.append(backend((q[:, part], k[:, part], v[:, part]), kv_cache_manager=cache))
            at += n
    got = torch.cat(outs, 1)
    comparisons = []
    for row, start in ((0, 0), (1, pad or 0)):
        # A row without its padding is a dense problem of its own.
        p = _dense(place, total - start, total - start, window)
        inputs = rows[0] if row == 0 else flipped
        row_q, row_k, row_v = (x[:, start:] for x in inputs)
        p = p._replace(q=row_q, k=row_k, v=row_v)
        comparisons += _against_truth(place, p, (got[row : row + 1, start:],))
    return comparisons


CHECKS: Mapping[Feature, Check] = MappingProxyType(
    {
        Feature.backward: _backward,
        Feature.window: _window,
        Feature.documents: _documents,
        Feature.packed_qkv: _packed_qkv,
        Feature.kv_cache: _kv_cache,
        Feature.left_padding: _left_padding,
        Feature.dropout: _dropout,
        Feature.lse: _lse,
        Feature.deterministic: _deterministic,
        Feature.ring_cp: _ring,
        Feature.ulysses_cp: _ulysses,
    }
)
"""Every feature has one. Those of context parallelism are of the kernel's part, in one process."""
