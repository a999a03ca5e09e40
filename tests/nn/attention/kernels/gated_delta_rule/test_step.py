"""A decoding step of the gated delta rule against the recurrence in float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from olmo_core.nn.attention.kernels.gated_delta_rule import gated_delta_rule_step_, step
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SAMPLE = torch.ones(1, 1, 8, device=DEVICE)
REASON = step._refusal(SAMPLE, SAMPLE, SAMPLE[None])
FORMS = [
    "torch",
    pytest.param(
        "triton",
        marks=[pytest.mark.triton, pytest.mark.skipif(REASON is not None, reason=str(REASON))],
    ),
]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    key_dim=st.sampled_from([16, 24, 128]),
    value_dim=st.sampled_from([8, 64, 80]),
    normalize_qk=st.booleans(),
    strided=st.booleans(),
)
def test_steps_follow_the_recurrence(
    form: str, batch: int, heads: int, group: int, key_dim: int, value_dim: int,
    normalize_qk: bool, strided: bool,
) -> None:  # fmt: skip
    tokens, values = 3, heads * group
    q, k = (torch.randn(batch, tokens, heads, key_dim).to(DEVICE, LOW) for _ in range(2))
    k = torch.nn.functional.normalize(k.float(), dim=-1).to(LOW)
    v = torch.randn(batch, tokens, values, value_dim).to(DEVICE, LOW)
    g, beta = -torch.rand(batch, tokens, values), 2 * torch.rand(batch, tokens, values)
    g, beta = g.to(DEVICE), beta.to(DEVICE)
    state = torch.randn(batch, values, key_dim, value_dim, device=DEVICE)
    exact = [x.double() for x in (q, k, v, g, beta)]
    want, want_state = gated_delta_rule_reference(
        *exact, initial_state=state.double(), normalize_qk=normalize_qk
    )
    outs = []
    rows = [row for row in step.STEPS if row.name == form]
    with mock.patch.object(step, "STEPS", rows):
        for t in range(tokens):
            inputs = [x[:, t] if strided else x[:, t].contiguous() for x in (q, k, v, g, beta)]
            before = state.clone()
            out, update = gated_delta_rule_step_(*inputs, state, normalize_qk=normalize_qk)
            key = inputs[1].double()
            key = step.normalize(key) if normalize_qk else key
            key = key.repeat_interleave(group, 1)
            decay = inputs[3].double().exp()[..., None, None]
            rebuilt = before.double() * decay + key[..., None] * update.double()[..., None, :]
            assert (rebuilt - state).norm() <= 1e-5 * state.norm()
            outs.append(out)
    eps = torch.finfo(LOW).eps
    assert (torch.stack(outs, 1) - want).norm() <= eps * want.norm()
    assert (state - want_state).norm() <= 1e-5 * want_state.norm()


def test_the_choice_has_a_reason() -> None:
    x, state = torch.ones(1, 1, 8), torch.ones(1, 1, 8, 8)
    with mock.patch.object(step, "triton_refusal", lambda x: None):
        assert step.choose_step(x, x, state).name == "triton"
        assert "torch.float64" in str(step.choose_step(x, x, state.double()))
        assert "contiguous" in str(step.choose_step(x, x, state.transpose(2, 3)[:, :, :3]))
        assert "at most 512 keys" in str(step.choose_step(x, x, torch.ones(1, 1, 600, 2)))
    with mock.patch.object(step, "triton_refusal", lambda x: "no driver"):
        assert str(step.choose_step(x, x, state)).startswith("torch: runs anywhere; not triton")
