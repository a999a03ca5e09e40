"""FlashQLA on a Hopper GPU, against the float64 recurrence on the same device.

Its kernels compile for each number of heads, with documents or without, with a state or without:
here are those of 16 key heads and 32 or 16 value heads of 128, which
`python -m benchmarks.flash_qla_gpu compile` makes side by side before.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention.kernels.gated_delta_rule.flash_qla import flash_qla_gated_delta_rule
from olmo_core.nn.attention.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from olmo_core.nn.attention.kernels.gated_delta_rule.rules import choose_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("flash_qla") is None, reason="flash_qla is not installed"),
    # A compiler's warnings are not ours.
    pytest.mark.filterwarnings("default"),
]
BOUND = 2e-2  # as for the Triton kernels: twice what rounding to bfloat16 leaves


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FlashQLA is used on compute capability 9.0")


def make(batch: int, tokens: int, values: int, value_dim: int) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, generator=draw, device="cuda")

    halves = [randn(*s).bfloat16() for s in ((16, 128), (16, 128), (values, value_dim))]
    return [*halves, -0.3 * randn(values).abs(), 2 * randn(values).sigmoid()]


CASES: dict[str, tuple[tuple[int, int, int, int], bool, bool]] = {
    "128/256": ((2, 131, 16, 256), False, False),
    "128/128": ((8, 67, 16, 128), False, False),
    "GVA with a state": ((2, 131, 32, 128), False, True),
    "GVA with documents": ((2, 90, 32, 128), True, False),
    "128/256 with documents and a state": ((2, 90, 16, 256), True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients(case: str) -> None:
    shape, documents, with_state = CASES[case]
    inputs = make(*shape)
    options: dict[str, Any] = {"normalize_qk": True}
    if documents:
        ends = [0, 1, 67, 67, 68, 133, 180]  # one token, none, a chunk and one; across the rows
        options["cu_doc_lens"] = torch.tensor(ends, dtype=torch.int32, device="cuda")
    if with_state:
        rows = 1 if documents else shape[0]
        inputs.append(torch.randn(rows, shape[2], 128, shape[3], device="cuda"))
    results = []
    for rule, wide in ((flash_qla_gated_delta_rule, False), (gated_delta_rule_reference, True)):
        leaves = [(x.double() if wide else x).requires_grad_() for x in inputs]
        state = leaves[5] if with_state else None
        out, final = rule(*leaves[:5], initial_state=state, **options)
        dout = torch.linspace(-1, 1, out.numel(), device="cuda").bfloat16().view_as(out)
        weights = [dout.to(out.dtype), torch.full_like(final, 0.1)]
        grads = torch.autograd.grad([out, final], leaves, weights)
        results.append([out, final, *grads])
        if not wide:  # as the table chooses it
            with torch.no_grad():
                again, _ = rule(*leaves[:5], initial_state=state, **options)
            assert (again - out).norm() <= 1e-2 * out.norm()
        inputs = [x.detach() for x in inputs]
    names = ["out", "state", "q", "k", "v", "g", "beta", "initial state"]
    errors = {
        name: ((got.double() - want).norm() / want.norm()).item()
        for name, got, want in zip(names, *results)
    }
    assert all(error <= BOUND for error in errors.values()), errors


def test_it_is_chosen_where_its_probe_agrees() -> None:
    q, _, v, *_ = make(2, 8192, 32, 128)
    assert choose_rule(q, v).name == "flash_qla"
    q.requires_grad_()
    assert choose_rule(q, v).name == "flash_qla"
