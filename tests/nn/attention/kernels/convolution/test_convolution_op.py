"""The short convolution's op: its Triton kernels and its torch form against torch's conv1d in
float64, one document at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.nn.attention.kernels.convolution import ROWS, Stream, op, short_convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
REASON = ROWS[0].refusal([Stream(torch.ones(1, 1, 1, device=DEVICE), torch.ones(1, 1, 1))])
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FORMS = [
    pytest.param("torch"),
    pytest.param("triton", marks=[pytest.mark.triton, needs_kernels]),
]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
examples = settings(max_examples=4, phases=[Phase.explicit, Phase.generate])


@contextmanager
def forced(form: str) -> Iterator[None]:
    """One row alone; in the interpreter with short spans, several of which a small problem has."""
    with mock.patch.object(op, "ROWS", [row for row in ROWS if row.name == form]):
        if form == "torch" or DEVICE == "cuda":
            yield
            return
        from olmo_core.nn.attention.kernels.convolution import triton_walk

        with (
            mock.patch.object(triton_walk, "_BLOCK", 64),
            mock.patch.object(triton_walk, "_FORWARD", (8, 20, 4)),
            mock.patch.object(triton_walk, "_BACKWARD", (4, 20, 2)),
        ):
            yield


def conv1d(s: Stream, lengths: list[int] | None, silu: bool) -> Tensor:
    """Each document by itself, after the state if it is the first; (B, T, C)."""
    batch, tokens, channels = s.x.shape
    past, weight = s.weight.shape[2] - 1, s.weight
    documents = [tokens] * batch if lengths is None else lengths
    outs, zeros = [], s.x.new_zeros(1, past, channels)
    for i, piece in enumerate(s.x.reshape(1, batch * tokens, channels).split(documents, 1)):
        before = zeros
        if s.state is not None and (lengths is None or i == 0):
            before = s.state[i : i + 1]
        padded = torch.cat((before, piece), 1).transpose(1, 2)
        if piece.shape[1]:
            outs.append(F.conv1d(padded, weight, s.bias, groups=channels).transpose(1, 2))
    out = torch.cat(outs, 1).view(s.x.shape)
    return F.silu(out) if silu else out


def last_inputs(s: Stream, lengths: list[int] | None) -> Tensor:
    past = s.weight.shape[2] - 1
    before = s.x.new_zeros(s.x.shape[0], past, s.x.shape[2]) if s.state is None else s.state
    if lengths is None:
        return torch.cat((before, s.x), 1)[:, s.x.shape[1] :]
    while not lengths[-1] and len(lengths) > 1:
        lengths = lengths[:-1]
    whole = len(lengths) == 1
    parts = (before if whole else torch.zeros_like(before), s.x[:, s.x.shape[1] - lengths[-1] :])
    return torch.cat(parts, 1)[:, lengths[-1] :]


def make(
    batch: int, tokens: int, widths: list[int], size: int, bias: bool, state: bool,
    strided: bool = False,
) -> list[Stream]:  # fmt: skip
    xs = torch.randn(batch, tokens, sum(widths)).split(widths, -1)
    return [
        Stream(
            (x if strided else x.contiguous()).to(LOW),
            torch.randn(width, 1, size),
            torch.randn(width) if bias else None,
            torch.randn(batch, size - 1, width).to(LOW) if state else None,
        )
        for x, width in zip(xs, widths, strict=True)
    ]


def on(streams: list[Stream], move: Callable[[Tensor], Tensor]) -> list[Stream]:
    fields = ("x", "weight", "bias", "state")
    return [
        Stream(*(None if (x := getattr(s, f)) is None else move(x) for f in fields))
        for s in streams
    ]


def leaves(streams: list[Stream]) -> list[Tensor]:
    return [x for s in streams for x in (s.x, s.weight, s.bias, s.state) if x is not None]


def check(streams: list[Stream], lengths: list[int] | None, silu: bool, form: str) -> None:
    seen = None
    if lengths is not None:
        past = streams[0].weight.shape[2] - 1 if streams[0].state is not None else 0
        starts = [p + (past if i == 0 else 0) for i, n in enumerate(lengths) for p in range(n)]
        seen = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    exact = on(streams, lambda x: x.detach().double().requires_grad_())
    mine = on(streams, lambda x: x.detach().to(DEVICE).requires_grad_())
    want = [conv1d(s, lengths, silu) for s in exact]
    want += [last_inputs(s, lengths) for s in exact]
    cotangents = [torch.randn_like(w).to(LOW) for w in want]
    wants = torch.autograd.grad(want, leaves(exact), [c.double() for c in cotangents])
    with forced(form):
        outs, states = short_convolution(mine, seen=seen, silu=silu, outgoing=True)
        got = torch.autograd.grad(
            [*outs, *states], leaves(mine), [c.to(DEVICE) for c in cotangents]
        )
    eps = torch.finfo(LOW).eps
    for a, b in zip((*outs, *states, *got), (*want, *wants), strict=True):
        assert a.is_contiguous() and a.shape == b.shape
        error = (a.double().cpu() - b).norm() / b.norm().clamp_min(1e-2)
        assert error <= eps, error  # float32 sums, rounded once
    for x, dx in zip(leaves(mine), got, strict=True):
        assert x.dtype == dx.dtype


@pytest.mark.parametrize("form", FORMS)
@examples
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 3, 33, 34, 70, 120]),
    widths=st.lists(st.sampled_from([1, 8, 64, 70]), min_size=1, max_size=3),
    size=st.sampled_from([1, 2, 3, 4, 8]),
    bias=st.booleans(),
    state=st.booleans(),
    silu=st.booleans(),
    strided=st.booleans(),
)
def test_rows_by_themselves(form: str, silu: bool, **shape: Any) -> None:
    check(make(**shape), None, silu, form)


@pytest.mark.parametrize("form", FORMS)
@examples
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any),
    size=st.sampled_from([1, 2, 4, 8]),
    state=st.booleans(),
    bias=st.booleans(),
)
def test_documents(form: str, lengths: list[int], size: int, state: bool, bias: bool) -> None:
    check(make(1, sum(lengths), [64, 8], size, bias, state), lengths, True, form)


@pytest.mark.parametrize("form", FORMS)
def test_documents_of_one_token(form: str) -> None:
    check(make(1, 50, [64], 4, True, True), [1] * 50, True, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_is_not_seen_changes_nothing(form: str, bad: float) -> None:
    """Not even by 0 * NaN, forward or in dx."""
    (clean,) = on(make(1, 90, [64], 4, True, False), lambda x: x.to(DEVICE).requires_grad_())
    x = clean.x.detach().clone()
    x[:, 40:45] = bad
    (spoilt,) = [Stream(x.requires_grad_(), clean.weight, clean.bias)]
    seen = torch.cat([torch.arange(n) for n in (40, 5, 45)]).to(DEVICE, torch.int32)
    rest = [*range(40), *range(45, 90)]
    results = []
    for stream in (clean, spoilt):
        with forced(form):
            (y,), _ = short_convolution([stream], seen=seen)
            (dx,) = torch.autograd.grad(y, stream.x, torch.ones_like(y))
        results.append((y[:, rest], dx[:, rest]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.triton
@needs_kernels
def test_the_same_bits_each_run_and_every_output_written(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = on(make(2, 33, [64, 8, 24], 4, True, True), lambda x: x.to(DEVICE).requires_grad_())
    runs, empty = [], torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    for _ in range(2):
        with forced("triton"):
            outs, _ = short_convolution(streams)
            grads = torch.autograd.grad(outs, leaves(streams), [y.detach() for y in outs])
        runs.append((*outs, *grads))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.triton
@needs_kernels
def test_float32_and_wide_weights() -> None:
    (s,) = on(make(1, 60, [64], 4, False, False), lambda x: x.to(DEVICE).float())
    (y,), _ = short_convolution([s])
    (want,) = on([s], lambda x: x.double().cpu())
    torch.testing.assert_close(y.cpu().double(), conv1d(want, None, True), rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    streams = make(1, 9, [3, 5], 4, True, True)
    columns = itertools.zip_longest(*([x.float() for x in leaves([s])] for s in streams))
    args = [x.requires_grad_() if x is not None else x for c in columns for x in (*c, None)]
    seen = torch.tensor([3, 4, 0, 1, 2, 0, 0, 1, 2], dtype=torch.int32)
    for last in ((seen, True, True), (None, False, False)):
        torch.library.opcheck(torch.ops.olmo_core.short_convolution.default, (*args, *last))


def test_the_choice_has_a_reason() -> None:
    def choose(size: int, dtype: torch.dtype) -> str:
        weight = torch.ones(1, 1, size)
        return str(op.choice([Stream(torch.ones(1, 1, 1, dtype=dtype), weight)]))

    with mock.patch.object(op, "triton_refusal", lambda x: None):
        assert choose(4, torch.float32).startswith("triton: ")
        assert "at most 8, not 9" in choose(9, torch.float32)
        assert "take no torch.float64" in choose(4, torch.float64)
    with mock.patch.object(op, "triton_refusal", lambda x: "no driver"):
        assert choose(4, torch.float32) == "torch: runs anywhere; not triton, since no driver"
