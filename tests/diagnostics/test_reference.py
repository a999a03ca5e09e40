"""The reference of the references: loops over single numbers, and what it may not import."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from olmo_core.diagnostics import reference, reference_recurrent
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.reference import causal_mask, positions, rotate
from olmo_core.diagnostics.subject import BATCH, TOKENS, Subject
from olmo_core.nn.attention.kernels.gated_delta_rule import reference as rule
from olmo_core.nn.attention.kernels.softmax import reference as softmax
from olmo_core.nn.attention.kernels.softmax.reference import dense_attention
from olmo_core.nn.rope import RoPEConfig, RoPEType

CPU = torch.device("cpu")


@pytest.mark.parametrize("module", [reference, reference_recurrent, softmax, rule])
def test_it_shares_no_code_with_what_it_checks(module: object) -> None:
    source = Path(str(module.__file__)).read_text()  # type: ignore[attr-defined]
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    assert not any(node.level for node in imports)
    imported = {node.module or "": [alias.name for alias in node.names] for node in imports}
    ours = {m: names for m, names in imported.items() if m.startswith("olmo_core.nn")}
    ours = {m: names for m, names in ours.items() if not m.endswith(".reference")}  # checked here
    data = ("Config", "Type", "Granularity")
    assert all(name.endswith(data) for names in ours.values() for name in names)


def test_attention_number_by_number() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, h, 3, generator=generator, dtype=torch.float64)
        for n, h in ((4, 2), (5, 1), (5, 1))
    )
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
    out, lse = dense_attention(q, k, v, mask, 0.7)
    for head in range(2):
        for i in range(4):
            seen = [j for j in range(5) if mask[i, j]]
            weights = [math.exp(0.7 * float(q[0, i, head] @ k[0, j, 0])) for j in seen]
            total = sum(weights)
            want = sum(
                (w / total * v[0, j, 0] for w, j in zip(weights, seen)), torch.zeros(3).double()
            )
            torch.testing.assert_close(out[0, i, head], want, rtol=1e-12, atol=1e-12)
            want_lse = math.log(total) if seen else -math.inf
            assert float(lse[0, head, i]) == pytest.approx(want_lse)


def test_a_row_without_keys_has_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 1, 3, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False, False], [True, True]])
    out, _ = dense_attention(q, k, v, mask, 1.0)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not out[0, 0].any() and not grads[0][0, 0].any()


def test_masks_and_positions() -> None:
    document = torch.tensor([3, 3, 3, 7, -1, -1])
    assert positions(document).tolist() == [0, 1, 2, 0, 0, 1]
    assert causal_mask(document, 2).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    angle = torch.arange(5)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    turn = torch.polar(torch.ones(5, 4), angle.float()).to(torch.complex128)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    interleaved = torch.view_as_real(pairs * turn).flatten(-2)
    got = rotate(RoPEConfig(RoPEType.complex, theta=100), x, torch.arange(5))
    torch.testing.assert_close(got, interleaved, rtol=1e-6, atol=1e-6)
    halves = torch.complex(x[..., :4], x[..., 4:]) * turn
    got = rotate(RoPEConfig(theta=100), x, torch.arange(5))
    torch.testing.assert_close(got, torch.cat((halves.real, halves.imag), -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_every_layer_of_verify_agrees_in_float64(name: str) -> None:
    subject = Subject(MIXERS[name], 16, CPU)
    layer = subject.layer("torch", torch.float64)
    with torch.no_grad():
        got = layer(subject.x)
    want = MIXERS[name].reference(
        16, subject.params, subject.x.flatten(0, 1), subject.document("whole")
    )
    torch.testing.assert_close(got, want.view(BATCH, TOKENS, -1), rtol=1e-11, atol=1e-12)
