"""The Triton kernels against the recurrence in float64: outputs, final states and every gradient.

They run on a GPU in bfloat16, or on a CPU under ``TRITON_INTERPRET=1`` in float16, since Triton's
interpreter has no bfloat16 products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.diagnostics.extras import EXTRAS
from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule, triton_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from olmo_core.nn.attention.kernels.gated_delta_rule.triton_rule import unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# The recurrence, rounded at its ends only, is off by 2.4e-3 in bfloat16 and by 3e-4 in float16.
BOUND = 1e-2 if DEVICE == "cuda" else 1e-3
REASON = unsupported(*(torch.empty(1, 1, 1, 16, device=DEVICE, dtype=DTYPE),) * 2)
NAMES = ("out", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# Triton's interpreter reads loop bounds out of arrays in a way that numpy is about to forbid.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
# On a GPU each example may compile ten kernels, half a minute.
few = settings(max_examples=3 if DEVICE == "cuda" else 5, phases=[Phase.explicit, Phase.generate])


def make(
    batch: int = 1, tokens: int = 100, key_heads: int = 1, group: int = 1, key_dim: int = 32,
    value_dim: int = 48, states: int | None = None, gates: torch.dtype = torch.float32,
    strided: bool = False, decay: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    heads = key_heads * group
    widths = [key_heads * key_dim, key_heads * key_dim, heads * value_dim]
    parts = torch.randn(batch, tokens, sum(widths)).to(DEVICE, DTYPE).split(widths, -1)
    shapes = [(key_heads, key_dim), (key_heads, key_dim), (heads, value_dim)]
    q, k, v = (x.unflatten(-1, shape) for x, shape in zip(parts, shapes, strict=True))
    if not strided:
        q, k, v = (x.contiguous() for x in (q, k, v))
    rand = torch.rand(2, batch, tokens, heads).to(DEVICE)
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": (-decay * rand[0]).to(gates),
        "beta": (2 * rand[1]).to(gates),
        "initial_state": torch.randn(states or batch, heads, key_dim, value_dim).to(DEVICE),
    }


def run(
    fn: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """The output, the final state and the gradients of all inputs, by a fixed cotangent."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, state = fn(**leaves, **{"normalize_qk": True, **options})
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        # What the output's dtype holds, for both sides.
        torch.randn(x.shape, generator=generator).to(dtype).to(x)
        for x, dtype in ((out, DTYPE), (state, torch.float32))
    ]
    grads = torch.autograd.grad(
        (out, state), list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return dict(zip(NAMES, (out.detach(), state.detach(), *grads), strict=True))


def check(inputs: dict[str, Tensor], bound: float = BOUND, **options: Any) -> dict[str, Tensor]:
    got = run(gated_delta_rule, inputs, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    want = run(gated_delta_rule_reference, exact, **options)
    for name, x in inputs.items():
        grad = got[{"initial_state": "dinitial"}.get(name, f"d{name}")]
        assert grad.shape == x.shape and grad.dtype == x.dtype and grad.is_contiguous()
    assert got["out"].dtype == DTYPE and got["out"].is_contiguous()
    assert got["state"].dtype == torch.float32
    wrong = {}
    for name, true in want.items():
        # Absolute where nothing is left of an input, such as an initial state after g = -80.
        error = (got[name].double() - true).norm() / true.norm().clamp_min(1e-2)
        if not error <= (bound if got[name].dtype != torch.bfloat16 else max(bound, BOUND)):
            wrong[name] = error.item()
    assert not wrong, f"relative errors above {bound}: {wrong}"
    return got


@needs_kernels
@few
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 2, 63, 64, 65, 130]),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    key_dim=st.sampled_from([16, 24, 64, 96]),
    value_dim=st.sampled_from([8, 16, 64, 80]),
    strided=st.booleans(),
    gates=st.sampled_from([torch.float32, DTYPE]),
    normalize_qk=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_outputs_and_gradients(normalize_qk: bool, scale: float | None, **shape: Any) -> None:
    inputs = make(**shape)
    if not normalize_qk:  # the rule diverges where beta * |k|^2 > 2
        inputs["k"] = torch.nn.functional.normalize(inputs["k"].float(), dim=-1).to(DTYPE)
    check(inputs, normalize_qk=normalize_qk, scale=scale)


@needs_kernels
@few
@given(
    batch=st.integers(1, 2),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    group=st.integers(1, 2),
)
def test_any_documents(batch: int, lengths: list[int], group: int) -> None:
    total = sum(lengths)
    tokens = max(1, -(-total // batch))
    lengths = [*lengths, batch * tokens - total]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    check(make(batch, tokens, group=group, states=1), cu_doc_lens=cu)


@needs_kernels
@pytest.mark.parametrize("ends", [[1, 70, 200, 260], [260, 260], [10, 128, 260]])
def test_documents_split_the_scan(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans begin where a document does: at once, in the middle, or as far back as the start."""
    from olmo_core.nn.attention.kernels.gated_delta_rule import triton_backward, triton_forward

    inputs = make(tokens=260, states=1, decay=0.1)
    cu = torch.tensor([0, *ends], device=DEVICE, dtype=torch.int32)
    results = []
    for spans in (1, 3):
        for module in (triton_forward, triton_backward):
            monkeypatch.setattr(module, "spans_for", lambda *_, n=spans: n)
        results.append(run(gated_delta_rule, inputs, cu_doc_lens=cu))
    whole, split = results
    for name, x in whole.items():
        assert torch.equal(x, split[name]), name


@needs_kernels
@pytest.mark.parametrize("key_dim", [128, 192, pytest.param(256, marks=pytest.mark.slow)])
def test_wide_keys(key_dim: int) -> None:
    check(make(tokens=70, group=2, key_dim=key_dim, value_dim=144))


@needs_kernels
def test_documents_of_one_token() -> None:
    cu = torch.arange(71, device=DEVICE, dtype=torch.int32)
    got = check(make(tokens=70, group=2), cu_doc_lens=cu)
    assert not got["dg"][:, 1:].any()  # nothing decays inside them


@needs_kernels
@pytest.mark.parametrize("documents", [False, True])
def test_strong_decay(documents: bool) -> None:
    inputs = make(tokens=150)
    inputs["g"][:, ::3] = -80
    cu = torch.tensor([0, 1, 70, 150], device=DEVICE, dtype=torch.int32)
    check(inputs, cu_doc_lens=cu if documents else None)


@needs_kernels
def test_gradients_of_the_strongest_decays() -> None:
    """1e-31 at g = -70. Next to the terms whose exponent is 0, which cancel, nothing is left of it;
    q dq - k dk would leave their rounding instead, 1e-7."""
    inputs = make(tokens=64)
    inputs["g"].fill_(-70)
    exact = {name: x.double() for name, x in inputs.items()}
    got, want = run(gated_delta_rule, inputs), run(gated_delta_rule_reference, exact)
    assert (got["dg"].double() - want["dg"]).norm() <= BOUND * want["dg"].norm()


@needs_kernels
def test_long_sums_of_decays_keep_their_differences() -> None:
    """c is -2e6 by the chunk's end: in float32, exp(c_i - c_j) would be off by a tenth."""
    inputs = make(tokens=64, decay=0.01)
    inputs["g"][:, :40] -= 5e4
    check(inputs)


@needs_kernels
def test_correlated_keys() -> None:
    """The inverse's entries alternate in sign: a Neumann product would be wrong by 7e19."""
    inputs = make(tokens=130, key_dim=64, decay=1e-3)
    inputs["k"] = (inputs["k"][:, :1] + 0.05 * inputs["k"]).to(DTYPE)
    inputs["beta"].fill_(1.99)
    check(inputs, bound=10 * BOUND)


@needs_kernels
@pytest.mark.parametrize("which", ["out", "state"])
def test_one_gradient_alone(which: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in make(tokens=70).items()}
    del inputs["initial_state"]
    result = gated_delta_rule(**inputs, normalize_qk=True)[which == "state"]
    cotangent = torch.randn_like(result)
    got = torch.autograd.grad(result, list(inputs.values()), cotangent, materialize_grads=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    result = gated_delta_rule_reference(**exact, normalize_qk=True)[which == "state"]
    want = torch.autograd.grad(
        result, list(exact.values()), cotangent.double(), materialize_grads=True
    )
    for mine, true in zip(got, want, strict=True):
        assert (mine.double() - true).norm() <= BOUND * true.norm()


@needs_kernels
def test_op_passes_opcheck() -> None:
    inputs = {name: x.requires_grad_() for name, x in make(tokens=70).items()}
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (*inputs.values(), None, 0.2, True, True)
    torch.library.opcheck(torch.ops.olmo_core.gated_delta_rule.default, args, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("value_dim", [128, 256])
def test_size_of_a_model(value_dim: int) -> None:
    shape = {"key_heads": 4, "group": 2, "key_dim": 128, "value_dim": value_dim}
    check(make(2, 1000, strided=True, decay=0.1, **shape))


@pytest.mark.gpu
def test_compiles_without_graph_breaks() -> None:
    inputs = make(tokens=70, key_dim=64, value_dim=64)
    f = torch.compile(lambda **x: gated_delta_rule(**x), fullgraph=True)
    got, want = run(f, inputs), run(gated_delta_rule, inputs)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=0)


def test_unsupported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 1, 2, 16, dtype=torch.float16)
    monkeypatch.setattr(triton_rule, "triton_refusal", lambda x: f"not on {x.device.type}")
    assert "not on cpu" in str(unsupported(q, q))
    monkeypatch.setattr(triton_rule, "triton_refusal", lambda x: None)
    monkeypatch.setattr(triton_rule, "INTERPRETED", True)
    assert unsupported(q, q) is None
    assert "no bfloat16 products" in str(unsupported(q.bfloat16(), q.bfloat16()))
    assert "not torch.float32" in str(unsupported(q.float(), q.float()))
    assert "at most 256, not 512" in str(unsupported(q.expand(1, 1, 2, 16).repeat(1, 1, 1, 32), q))
    assert "at most 65535" in str(unsupported(q.expand(40000, 1, 2, 16), q))
    assert "no tokens" in str(unsupported(q[:, :0], q[:, :0]))


@needs_kernels
def test_doctor_tries_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, probe, _ = EXTRAS["gated_delta_rule"]
    assert probe(torch.device(DEVICE)) == ("", "")

    def wrong(q: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        scale = 1.0 if q.dtype == torch.float16 else None
        return gated_delta_rule(q, *rest, scale=scale, **options)

    monkeypatch.setattr("olmo_core.nn.attention.kernels.gated_delta_rule.gated_delta_rule", wrong)
    assert "is off by" in probe(torch.device(DEVICE))[1]
