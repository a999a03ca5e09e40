"""Ops run on the device of their tensors, whichever is current."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from olmo_core.nn.attention import Attention, FusedAttention, GatedDeltaNet, NormalizedAttention
from olmo_core.nn.dispatch import on_its_device
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_another_device_becomes_current(
    monkeypatch: pytest.MonkeyPatch, index: int, entered: list[int]
) -> None:
    seen: list[int] = []
    inside: list[bool] = []

    @contextmanager
    def device(where: Any) -> Any:
        seen.append(where.index)
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    x: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index))
    run = on_its_device(lambda x, y: (y, bool(inside)))
    assert run(x, 3) == (3, bool(entered))
    assert seen == entered and not inside


def test_a_cpu_asks_no_gpu() -> None:
    assert on_its_device(lambda x: x + 1)(torch.zeros(1)) == 1


LAYERS: dict[str, Any] = {
    "attention": lambda: Attention(
        d_model=8, n_heads=2, n_kv_heads=1, rope=RoPEConfig(), qk_norm=LayerNormConfig()
    ),
    "normalized": lambda: NormalizedAttention(d_model=8, n_heads=2),
    "fused": lambda: FusedAttention(d_model=8, n_heads=2),
    "delta": lambda: GatedDeltaNet(d_model=8, n_heads=2),
}


@pytest.mark.parametrize("kind", [*LAYERS])
def test_forward_mode_is_refused(kind: str) -> None:
    """An op below autograd would drop tangents, and the derivative be zero without a word."""
    layer, x = LAYERS[kind](), torch.randn(1, 5, 8)
    weight = "w_qkv.weight" if kind == "fused" else "w_k.weight"

    def of_weight(w: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, {weight: w}, x)

    refused = pytest.raises(RuntimeError, match="no forward-mode derivative")
    with refused:
        torch.func.jvp(layer, (x,), (x,))
    with refused:
        torch.func.jacfwd(layer)(x)
    with refused:
        torch.func.jacfwd(of_weight)(layer.get_parameter(weight).detach())
    with refused, forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [*LAYERS])
def test_reverse_mode_transforms_give_the_gradients(kind: str) -> None:
    layer, x = LAYERS[kind]().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().sum()

    close = torch.testing.assert_close
    close(torch.func.grad(loss)(x), want)
    close(torch.func.jacrev(loss)(x), want)
    close(torch.func.vjp(loss, x)[1](torch.ones((), dtype=x.dtype))[0], want)
    per_sample = torch.vmap(torch.func.grad(lambda row: loss(row[None])))(x)
    close(per_sample, want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_dropout_under_vmap_draws_for_each_row_or_raises() -> None:
    layer = Attention(d_model=8, n_heads=2, dropout=0.5)
    x = torch.randn(1, 12, 8).expand(4, 1, 12, 8)
    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match=f"randomness is '{randomness}'"):
            torch.vmap(layer, randomness=randomness)(x)
    rows = torch.vmap(layer, randomness="different")(x)
    assert all(not torch.equal(rows[0], row) for row in rows[1:])
    layer.eval()
    rows = torch.vmap(layer)(x)
    assert all(torch.equal(rows[0], row) for row in rows[1:])
