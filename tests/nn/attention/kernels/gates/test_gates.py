"""The gates' Triton kernels against plain expressions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.nn.attention.kernels import gates
from olmo_core.nn.attention.kernels.gates import op
from olmo_core.nn.attention.kernels.table import choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
REASON = op._refusal(torch.ones(1, 1, 1, device=DEVICE))
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
examples = settings(max_examples=10, phases=[Phase.explicit, Phase.generate])


def check(
    mine: Callable[..., Any], exact: Callable[..., Any], inputs: list[Tensor], bound: float
) -> list[Tensor]:
    """Outputs and gradients within ``bound`` of float64, in the inputs' dtypes, twice the same."""
    wide = [x.double().requires_grad_() for x in inputs]
    wants = exact(*wide)
    wants = wants if isinstance(wants, tuple) else (wants,)
    cotangents = [torch.randn_like(want).to(LOW) for want in wants]
    wants = (*wants, *torch.autograd.grad(wants, wide, [c.double() for c in cotangents]))
    runs = []
    for _ in range(2):
        low = [x.to(DEVICE).requires_grad_() for x in inputs]
        outs = mine(*low)
        outs = outs if isinstance(outs, tuple) else (outs,)
        given = [c.to(DEVICE, out.dtype) for c, out in zip(cotangents, outs, strict=True)]
        runs.append([*outs, *torch.autograd.grad(outs, low, given)])
    for got, again, want in zip(*runs, wants, strict=True):
        assert torch.equal(got, again)
        assert (got.cpu().double() - want).norm() <= bound * want.norm().clamp_min(1e-2)
    for x, dx in zip(inputs, runs[0][-len(inputs) :], strict=True):
        assert dx.dtype == x.dtype and dx.shape == x.shape
    return runs[0]


@needs_kernels
@examples
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 3, 129, 200]),
    heads=st.sampled_from([1, 3, 16]),
    double=st.booleans(),
    padded=st.booleans(),
    strided=st.booleans(),
)
def test_decay_gates(
    batch: int, tokens: int, heads: int, double: bool, padded: bool, strided: bool
) -> None:
    both = (4 * torch.randn(batch, tokens, 2 * heads)).to(LOW)
    a, b = both.split(heads, -1) if strided else (x.contiguous() for x in both.split(heads, -1))
    padding = torch.rand(batch, tokens) < 0.3 if padded else None

    def exact(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        beta = torch.sigmoid(b) * (2 if double else 1)
        beta = beta if padding is None else beta.masked_fill(padding[..., None], 0)
        return -A_log.exp() * F.softplus(a + dt_bias, threshold=50), beta

    def mine(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        mask = None if padding is None else padding.to(DEVICE)
        return gates.decay_gates(*inputs, mask, double=double)

    inputs = [a, b, torch.rand(heads), torch.randn(heads) - 3]
    g, beta, *_ = check(mine, exact, inputs, torch.finfo(LOW).eps)
    assert g.dtype == beta.dtype == torch.float32


@needs_kernels
def test_decays_far_from_zero_keep_their_relative_accuracy() -> None:
    a = torch.tensor([-60.0, -20, -17, -16, -1, 0, 1, 17, 40]).view(1, 9, 1)
    inputs = [a, a, torch.zeros(1), torch.zeros(1)]
    g, _ = gates.decay_gates(*(x.to(DEVICE) for x in inputs), double=False)
    want = -F.softplus(a.double(), threshold=50)
    torch.testing.assert_close(g.cpu().double(), want, rtol=1e-5, atol=0)


@needs_kernels
@examples
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.sampled_from([1, 24, 64, 256]),
    dtype=st.sampled_from([LOW, torch.float32]),
)
def test_gated_rms_norm(rows: list[int], width: int, dtype: torch.dtype) -> None:
    x, gate = (torch.randn(*rows, width).to(dtype) for _ in range(2))

    def exact(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, 1e-5) * F.silu(gate)

    def mine(*inputs: Tensor) -> Tensor:
        return gates.gated_rms_norm(*inputs, 1e-5)

    check(mine, exact, [x, gate, torch.randn(width)], torch.finfo(LOW).eps)


@needs_kernels
@examples
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.sampled_from([1, 24, 128]),
    headwise=st.booleans(),
    rounded=st.booleans(),
)
def test_sigmoid_gate(rows: list[int], width: int, headwise: bool, rounded: bool) -> None:
    x = torch.randn(*rows, width).to(LOW)
    gate = torch.randn(*rows, 1 if headwise else width).to(LOW)

    def mine(x: Tensor, gate: Tensor) -> Tensor:
        return gates.sigmoid_gate(x, gate, rounded=rounded)

    # A rounded gate is off by half a unit, and its slope by its own share of that.
    bound = torch.finfo(LOW).eps * (4 if rounded else 1)
    out, *_ = check(mine, lambda x, gate: x * torch.sigmoid(gate), [x, gate], bound)
    if rounded:
        want = x.to(DEVICE) * torch.sigmoid(gate.to(DEVICE))
        torch.testing.assert_close(out, want, rtol=torch.finfo(LOW).eps, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("name", ["decay_gates", "gated_rms_norm", "sigmoid_gate"])
def test_opcheck(name: str) -> None:
    x, y = (torch.randn(2, 5, 3, device=DEVICE).requires_grad_() for _ in range(2))
    w, z = (torch.randn(3, device=DEVICE).requires_grad_() for _ in range(2))
    args = {
        "decay_gates": (x, y, w, z, torch.zeros(2, 5, dtype=torch.bool, device=DEVICE), True),
        "gated_rms_norm": (x, y, w, 1e-5),
        "sigmoid_gate": (x, y, False),
    }[name]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.olmo_core, name).default, args, test_utils=tests)


@pytest.mark.parametrize("table", ["GATES", "GATED_NORM", "SIGMOID_GATE"])
def test_the_choice_has_a_reason(table: str) -> None:
    rows = getattr(gates, table)
    x = torch.ones(1, 1, 1)
    inputs = (x, x, False) if table == "SIGMOID_GATE" else (x, x, x)
    with mock.patch.object(op, "triton_refusal", lambda x: None):
        assert choose(rows, *inputs).name == "triton"
        wide = [y.double() if isinstance(y, Tensor) else y for y in inputs]
        assert "take no torch.float64" in str(choose(rows, *wide))
        empty = [y[:, :0] if isinstance(y, Tensor) else y for y in inputs]
        assert "there is nothing in" in str(choose(rows, *empty))
    with mock.patch.object(op, "triton_refusal", lambda x: "no driver"):
        assert str(choose(rows, *inputs)) == "torch: runs anywhere; not triton, since no driver"


def test_one_dtype_for_a_sigmoid_gate() -> None:
    x = torch.ones(1, 1, 1)
    assert "one dtype" in str(choose(gates.SIGMOID_GATE, x, x.half(), False))


@pytest.mark.gpu
def test_other_lengths_and_batches_compile_nothing_anew() -> None:
    from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet
    from olmo_core.nn.attention.kernels.convolution import triton_walk
    from olmo_core.nn.attention.kernels.gated_delta_rule import (
        triton_backward,
        triton_forward,
        triton_shared,
    )
    from olmo_core.nn.attention.kernels.gates import triton_gates

    modules = (triton_walk, triton_backward, triton_forward, triton_shared, triton_gates)
    kernels = {f for m in modules for f in vars(m).values() if hasattr(f, "device_caches")}

    def compiled() -> int:
        return sum(len(cache[0]) for f in kernels for cache in f.device_caches.values())

    layer = GatedDeltaNet(
        d_model=128, n_heads=2, dtype=torch.bfloat16, conv_bias=True, init_device="cuda"
    )

    def run(batch: int, tokens: int, ends: list[int] | None) -> None:
        x = torch.randn(batch, tokens, 128, device="cuda", dtype=torch.bfloat16)
        cu = None if ends is None else torch.tensor(ends, device="cuda", dtype=torch.int32)
        layer(x.requires_grad_(), cu).sum().backward()

    run(1, 100, None)
    run(2, 100, [0, 30, 200])
    before = compiled()
    assert before > 8
    for batch, tokens in ((1, 1), (2, 333), (3, 64), (1, 1000)):
        run(batch, tokens, None)
        run(batch, tokens, [0, 0, batch * tokens // 2, batch * tokens])
    assert compiled() == before
