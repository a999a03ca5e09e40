"""The fused op against its torch form, and the torch form against the definition in float64.

The kernels run on a GPU, or on a CPU under ``TRITON_INTERPRET=1`` where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.nn.attention.kernels.rope_qk_norm import (
    op,
    qk_norm_rope,
    qk_norm_rope_reference,
    rope_only,
    row_stat,
    unsupported,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unsupported(*(torch.empty(1, 1, 1, 2, device=DEVICE),) * 2)
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# Triton's interpreter reads loop bounds out of arrays in a way that numpy is about to forbid.
# It also truncates to bf16 where a GPU rounds.
SLACK = 1.5 if DEVICE == "cuda" else 4.0
# Each example may compile two kernels.
few = settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def table(rows: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frequency = 10_000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
    sin, cos = (torch.cat([f, f], -1).to(dtype).to(DEVICE) for f in (angle.sin(), angle.cos()))
    return sin, cos


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300)).item()


def run(
    f: Callable[..., Any], tensors: list[Tensor], dout: list[Tensor], **options: Any
) -> list[Tensor]:
    """Outputs and gradients of q, k, and both weights where given."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    weights = dict(zip(("q_weight", "k_weight"), leaves[2:], strict=False))
    out = f(leaves[0], leaves[1], **weights, **options)
    return [
        *out,
        *torch.autograd.grad(out, leaves, [d.to(o.dtype) for d, o in zip(dout, out, strict=True)]),
    ]


def problem(
    *, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, rotary: int, norm: str,
    weights: bool, positions: str, dtype: torch.dtype, strided: bool, wide: bool,
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:  # fmt: skip
    shapes = [(batch, tokens, h, dim) for h in (heads, kv_heads)]
    if strided:  # slices of one projection
        both = torch.randn(batch, tokens, heads + kv_heads, dim, device=DEVICE, dtype=dtype)
        tensors = [both[:, :, :heads], both[:, :, heads:]]
    else:
        tensors = [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes]
    per_head = norm == "head"
    if weights:
        sizes = (dim, dim) if per_head else (heads * dim, kv_heads * dim)
        tensors += [torch.randn(n, device=DEVICE) for n in sizes]
    options: dict[str, Any] = {"eps": None if norm == "none" else 1e-5, "per_head": per_head}
    if rotary:
        sin, cos = table(tokens + 9, rotary)
        if not wide:
            sin, cos = sin[:, : rotary // 2], cos[:, : rotary // 2]
        options.update(sin=sin, cos=cos, rotary_dim=rotary)
        if positions != "none":
            shape = (tokens,) if positions == "shared" else (batch, tokens)
            options["positions"] = torch.randint(tokens + 9, shape, device=DEVICE)
    return tensors, [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes], options


def exact(tensors: list[Tensor], dout: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    wider = {k: v.double() if k in ("sin", "cos") else v for k, v in options.items()}
    return run(
        qk_norm_rope_reference, [x.double() for x in tensors], [d.double() for d in dout], **wider
    )


CASES = {
    "batch": st.sampled_from([1, 2]),
    "tokens": st.sampled_from([1, 5, 7]),
    "heads": st.sampled_from([3, 4]),
    "kv_heads": st.sampled_from([1, 2]),
    "dim": st.sampled_from([16, 24]),
    "rotary": st.sampled_from([0, 4, 12, 16]),
    "norm": st.sampled_from(["full", "head", "none"]),
    "weights": st.booleans(),
    "positions": st.sampled_from(["none", "shared", "each"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "strided": st.booleans(),
    "wide": st.booleans(),
}


def hugging_face(
    q: Tensor, k: Tensor, *, q_weight: Tensor, k_weight: Tensor, eps: float, per_head: bool,
    sin: Tensor, cos: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The definition in its usual form, with a full table and a concatenated half-turn."""
    outs = []
    for x, w in ((q, q_weight), (k, k_weight)):
        flat = x if per_head else x.flatten(2)
        y = (flat / (flat.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w).view_as(x)
        first, second = y.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        outs.append(y * cos[: x.shape[1], None] + turned * sin[: x.shape[1], None])
    return outs


@pytest.mark.parametrize("per_head", [False, True])
def test_reference_is_the_definition(per_head: bool) -> None:
    q, k = (torch.randn(2, 5, h, 8, device=DEVICE, dtype=torch.float64) for h in (4, 2))
    weights = [
        torch.randn(8 if per_head else h * 8, device=DEVICE, dtype=torch.float64) for h in (4, 2)
    ]
    sin, cos = table(6, 8, torch.float64)
    options: dict[str, Any] = {"eps": 1e-5, "per_head": per_head, "sin": sin, "cos": cos}
    dout = [torch.randn_like(q), torch.randn_like(k)]
    got = run(qk_norm_rope_reference, [q, k, *weights], dout, **options)
    want = run(hugging_face, [q, k, *weights], dout, **options)
    assert [x.dtype for x in got] == [torch.float64] * 6
    assert max(map(error, got, want)) < 1e-14


def test_statistics_passed_in_are_the_ones_taken() -> None:
    """Tensor parallelism: half of the heads with the sums of all."""
    q, k = (torch.randn(2, 5, h, 8, device=DEVICE, dtype=torch.float64) for h in (4, 2))
    whole = qk_norm_rope_reference(q, k, eps=1e-5, per_head=False)
    stats = row_stat(q, k)
    assert stats.shape == (2, 5, 2)
    half = qk_norm_rope_reference(
        q[:, :, :2], k[:, :, :1], eps=1e-5, per_head=False, stats=stats, widths=(32, 16)
    )
    torch.testing.assert_close(half[0], whole[0][:, :, :2])
    torch.testing.assert_close(half[1], whole[1][:, :, :1])


@needs_kernels
@few
@given(case=st.fixed_dictionaries(CASES))
def test_kernels_match_the_reference(case: dict[str, Any]) -> None:
    tensors, dout, options = problem(**case)
    want = exact(tensors, dout, options)
    plain = run(qk_norm_rope_reference, tensors, dout, **options)
    got = run(qk_norm_rope, tensors, dout, **options)
    for mine, theirs, true in zip(got, plain, want, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert mine.is_contiguous()
        assert error(mine, true) <= SLACK * error(theirs, true) + 1e-6


@needs_kernels
@few
@given(case=st.fixed_dictionaries({**CASES, "rotary": st.sampled_from([4, 16])}))
def test_rope_only_matches_and_turns_back(case: dict[str, Any]) -> None:
    tensors, dout, options = problem(**{**case, "norm": "none", "weights": False})
    want = exact(tensors, dout, options)
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[case["dtype"]]
    rope = {k: v for k, v in options.items() if k not in ("eps", "per_head")}
    for got, true in zip(run(rope_only, tensors, dout, **rope), want, strict=True):
        assert error(got, true) < bound


@needs_kernels
def test_two_phases_are_one_pass() -> None:
    """Statistics as an input: outputs and all gradients as if taken inside, through autograd."""
    q, k = (torch.randn(2, 5, h, 16, device=DEVICE) for h in (4, 2))
    weights = [torch.randn(h * 16, device=DEVICE) for h in (4, 2)]
    sin, cos = table(9, 16)
    dout = [torch.randn_like(q), torch.randn_like(k)]
    options: dict[str, Any] = {"eps": 1e-5, "per_head": False, "sin": sin, "cos": cos}

    def two_phases(q: Tensor, k: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(q, k, stats=row_stat(q, k), widths=(64, 32), **rest)

    got = run(two_phases, [q, k, *weights], dout, **options)
    want = run(qk_norm_rope, [q, k, *weights], dout, **options)
    assert max(map(error, got, want)) < 1e-6


@needs_kernels
def test_sharded_tables_apply_row_by_row() -> None:
    q, k = (torch.randn(1, 8, h, 16, device=DEVICE) for h in (2, 1))
    sin, cos = table(8, 16)
    whole = rope_only(q, k, sin, cos)
    shard = rope_only(q[:, 3:6], k[:, 3:6], sin[3:6], cos[3:6])
    assert torch.equal(shard[0], whole[0][:, 3:6]) and torch.equal(shard[1], whole[1][:, 3:6])


def far_apart(x: Tensor, elements: int) -> Tensor:
    """A copy whose heads lie ``elements`` apart, in memory of which little is ever touched."""
    batch, tokens, heads, dim = x.shape
    memory = torch.empty(
        (heads - 1) * elements + batch * tokens * dim, dtype=x.dtype, device=DEVICE
    )
    strided = memory.as_strided(x.shape, (tokens * dim, dim, elements, 1))
    strided.copy_(x)
    return strided


@needs_kernels
@pytest.mark.parametrize("norm", [True, False])
def test_heads_may_be_billions_of_elements_apart(norm: bool) -> None:
    """(B, H, T, D) in memory with T * D = 2^30: offsets past 2^31, in forward and backward."""
    q, k, dq = (torch.randn(1, 4, h, 8, device=DEVICE, dtype=torch.float16) for h in (3, 1, 3))
    sin, cos = table(4, 8)
    options: dict[str, Any] = {"sin": sin, "cos": cos}
    if norm:
        options |= {"eps": 1e-5, "per_head": True}
    f = qk_norm_rope if norm else rope_only
    answers = []
    for near in (True, False):
        leaf = q.detach() if near else far_apart(q, 2**30)
        out = f(leaf.requires_grad_(), k, **options)[0]
        out.backward(dq if near else far_apart(dq, 2**30))
        answers += [out.detach(), leaf.grad]
        assert leaf.grad is not None
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])


@needs_kernels
def test_no_tokens() -> None:
    q, k = (torch.randn(1, 0, h, 16, device=DEVICE) for h in (2, 1))
    weights = [torch.ones(h * 16, device=DEVICE) for h in (2, 1)]
    got = run(qk_norm_rope, [q, k, *weights], [q, k], eps=1e-5, per_head=False)
    assert got[0].shape == q.shape and not got[4].any() and got[4].shape == (32,)


@needs_kernels
def test_second_derivative_is_refused() -> None:
    q, k = (torch.randn(1, 2, h, 16, device=DEVICE, requires_grad=True) for h in (2, 1))
    out, _ = qk_norm_rope(q, k, eps=1e-5, per_head=True)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dq.sum().backward()


@needs_kernels
@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_may_use_one_output(used: int) -> None:
    answers = []
    for f in (qk_norm_rope, qk_norm_rope_reference):
        torch.manual_seed(0)
        leaves = [torch.randn(1, 3, h, 16, device=DEVICE, requires_grad=True) for h in (2, 1)]
        out = f(*leaves, eps=1e-5, per_head=False)
        out[used].square().sum().backward()
        answers.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for got, want in zip(*answers, strict=True):
        assert (got - want).abs().max() < 1e-5
    assert not answers[0][1 - used].any()


@needs_kernels
def test_ops_pass_opcheck() -> None:
    q, k = (torch.randn(1, 3, h, 16, device=DEVICE, requires_grad=True) for h in (2, 1))
    w = [torch.randn(h * 16, device=DEVICE, requires_grad=True) for h in (2, 1)]
    sin, cos = table(4, 16)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (q, k, *w, sin, cos, None, None, 16, 32, 16, 1e-5, False)
    torch.library.opcheck(torch.ops.olmo_core.qk_norm_rope.default, args, test_utils=tests)
    rope = (q, k, sin, cos, None, 16, False)
    torch.library.opcheck(torch.ops.olmo_core.rope.default, rope, test_utils=tests)


@pytest.mark.gpu
def test_compiles_without_graph_breaks() -> None:
    q, k = (torch.randn(1, 6, h, 64, device=DEVICE, dtype=torch.bfloat16) for h in (4, 2))
    sin, cos = table(6, 64)
    options: dict[str, Any] = {"eps": 1e-5, "per_head": True, "sin": sin, "cos": cos}
    f = torch.compile(lambda q, k, **o: qk_norm_rope(q * 2, k, **o), fullgraph=True)
    dout = [torch.randn_like(q), torch.randn_like(k)]
    got = run(f, [q, k], dout, **options)
    want = run(lambda q, k, **o: qk_norm_rope(q * 2, k, **o), [q, k], dout, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_weight": torch.ones(3)}, r"q_weight must have shape \(16,\)"),
        ({"sin": torch.ones(4, 8)}, "sin and cos come together"),
        ({"positions": torch.arange(3)}, "positions need both"),
        ({"sin": torch.ones(2, 8), "cos": torch.ones(2, 8)}, "2 rows for 3 tokens"),
        ({"sin": torch.ones(4, 6), "cos": torch.ones(4, 6), "rotary_dim": 8}, "must be tables"),
        ({"sin": torch.ones(4, 16), "cos": torch.ones(4, 16)}, "at most 8, got 16"),
        ({"stats": torch.ones(1, 3, 2)}, "they need eps, widths"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    q, k = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 1, 8)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(q, k, eps=1e-5, per_head=False, **options)


def test_unsupported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 1, 2, 8)
    monkeypatch.setattr(op, "triton_refusal", lambda x: f"not on {x.device.type}")
    assert "not on cpu" in str(unsupported(q, q))
    monkeypatch.setattr(op, "triton_refusal", lambda x: None)
    assert unsupported(q, q) is None
    assert "float64" in str(unsupported(q.double(), q.double()))
    assert "even" in str(unsupported(q[..., :7], q[..., :7]))
    assert "32768" in str(unsupported(torch.ones(1, 1, 300, 128), torch.ones(1, 1, 1, 128)))
