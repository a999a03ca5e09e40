"""The Triton form's passes for spans against the recurrence in float64, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nn.attention.kernels.gated_delta_rule.test_span import of_rule, of_span, without
from nn.attention.kernels.gated_delta_rule.test_triton_rule import (
    BOUND,
    DEVICE,
    DTYPE,
    few,
    make,
    needs_kernels,
)
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

pytestmark = [
    pytest.mark.triton,
    # Triton's interpreter reads loop bounds in a way that numpy is about to forbid.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def check(
    inputs: dict[str, torch.Tensor], lengths: list[int] | None = None, bound: float = BOUND
) -> dict[str, torch.Tensor]:
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    got = of_span(inputs, cu)
    exact = {name: x.double() for name, x in inputs.items()}
    want = of_rule(gated_delta_rule_reference, exact, cu)
    errors = {
        name: float((got[name].double() - x).norm() / x.norm().clamp_min(1e-2))
        for name, x in want.items()
    }
    assert max(errors.values()) <= bound, errors
    return got


@needs_kernels
@settings(few, max_examples=min(5, few.max_examples))
@given(
    batch=st.integers(1, 2),
    lengths=st.lists(st.sampled_from([1, 2, 30, 63, 64, 65]), min_size=1, max_size=4),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    key_dim=st.sampled_from([16, 24, 72]),
    value_dim=st.sampled_from([8, 64, 80]),
    strided=st.booleans(),
)
def test_any_documents(batch: int, lengths: list[int], **options: Any) -> None:
    several = len(lengths) > 1
    inputs = make(1 if several else batch, sum(lengths), **options)
    check(inputs, lengths if several else None)


@needs_kernels
def test_wide_keys_and_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    check(make(tokens=66, key_dim=192, value_dim=80))
    inputs = make(tokens=66, group=2, key_dim=80, value_dim=144)
    want = of_span(inputs)  # on a CPU any grid is large
    monkeypatch.setattr(
        "olmo_core.nn.attention.kernels.gated_delta_rule.triton_span.multiprocessors",
        lambda _: 10**6,
    )
    for name, x in check(inputs).items():
        assert torch.equal(x, want[name]), name


@needs_kernels
@pytest.mark.parametrize("documents", [False, True])
def test_strong_decay(documents: bool) -> None:
    inputs = make(tokens=150)
    inputs["g"][:, ::3] = -80
    check(inputs, [1, 69, 80] if documents else None)


@needs_kernels
def test_keys_that_are_alike() -> None:
    """As far off as the whole rule, and as the map by two calls of it."""
    inputs = make(tokens=100, key_dim=64, decay=1e-3)
    inputs["k"] = (inputs["k"][:, :1] + 0.05 * inputs["k"]).to(DTYPE)
    inputs["beta"].fill_(1.99)
    check(inputs, bound=10 * BOUND)
    exact = {name: x.double() for name, x in inputs.items()}
    want = of_rule(gated_delta_rule_reference, exact)
    got = of_span(inputs)
    with pytest.MonkeyPatch.context() as patch:
        without(patch)
        twice = of_span(inputs)
    for name in ("state", "dinitial"):
        own, theirs = ((x[name].double() - want[name]).norm() for x in (got, twice))
        assert own <= 2 * theirs, (name, own, theirs)


@needs_kernels
def test_a_document_of_nan_stays_out_of_maps() -> None:
    inputs = make(tokens=256)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 64:192] = float("nan")
    cu = torch.tensor([0, 64, 192, 256], dtype=torch.int32, device=DEVICE)
    got = of_span(inputs, cu)
    assert got["state"].isfinite().all() and got["dinitial"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("key_dim", [64, 128, 256])
def test_size_of_a_model(key_dim: int) -> None:
    for batch, lengths in ((2, None), (1, [300, 1, 999])):
        shape = {"key_heads": 4, "group": 2, "key_dim": key_dim, "value_dim": 256}
        check(make(batch, 1300, strided=True, decay=0.1, **shape), lengths)
