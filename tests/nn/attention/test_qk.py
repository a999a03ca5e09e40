"""The layer's modules and the kernel in their place give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention.fused_qk import fused_qk
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import RoPEConfig, RoPEType, YaRNRoPEScalingConfig

ROPES = {
    "plain": RoPEConfig(),
    "fused": RoPEConfig(name=RoPEType.fused),
    "partial": RoPEConfig(partial_rotary_factor=0.5),
    "yarn": RoPEConfig(scaling=YaRNRoPEScalingConfig()),
}


def modules(
    rope: RoPEConfig | None, norm: str | None, per_head: bool, device: str
) -> dict[str, Any]:
    norms: list[Any] = [None, None]
    if norm is not None:
        config = LayerNormConfig(name=LayerNormType(norm), bias=False)
        norms = [config.build(64 if per_head else h * 64, init_device=device) for h in (4, 2)]
        for n in norms:
            torch.nn.init.normal_(n.weight)
    return {
        "q_norm": norms[0],
        "k_norm": norms[1],
        "per_head": per_head,
        "rope": None if rope is None else rope.build(64),
    }


def by_modules(
    q: Tensor, k: Tensor, m: dict[str, Any], rope_inputs: dict[str, Any]
) -> tuple[Tensor, ...]:
    if m["q_norm"] is not None:
        norms = (m["q_norm"], m["k_norm"])
        if m["per_head"]:
            q, k = (n(x) for n, x in zip(norms, (q, k), strict=True))
        else:
            q, k = (n(x.flatten(2)).view(x.shape) for n, x in zip(norms, (q, k), strict=True))
    return (q, k) if m["rope"] is None else m["rope"](q, k, **rope_inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["none", "documents", "shard"])
@pytest.mark.parametrize("norm", [None, "rms", "fused_rms"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("rope", [None, *ROPES])
def test_kernel_and_modules_agree(
    rope: str | None, per_head: bool, norm: str | None, positions: str
) -> None:
    if rope is None and norm is None:
        return
    m = modules(None if rope is None else ROPES[rope], norm, per_head, "cuda")
    rope_inputs: dict[str, Any] = {}
    if rope is not None and positions == "documents":
        rope_inputs = {"positions": torch.randint(40, (2, 9), device="cuda"), "max_position": 40}
    if rope is not None and positions == "shard":
        buffers = m["rope"].get_buffers(30, torch.device("cuda"))
        rope_inputs = {"pos_sin": buffers.pos_sin[5:14], "pos_cos": buffers.pos_cos[5:14]}
    q, k = (torch.randn(2, 9, h, 64, device="cuda").requires_grad_() for h in (4, 2))
    got = fused_qk(q, k, **m, rope_inputs=rope_inputs)
    assert got is not None
    want = by_modules(q, k, m, rope_inputs)
    leaves = [q, k] + [m[n].weight for n in ("q_norm", "k_norm") if m[n] is not None]
    dout = [torch.randn_like(q), torch.randn_like(k)]
    got_all = [*got, *torch.autograd.grad(got, leaves, dout)]
    want_all = [*want, *torch.autograd.grad(want, leaves, dout)]
    for a, b in zip(got_all, want_all, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_what_the_kernel_lacks_is_left_to_the_modules() -> None:
    q, k = (torch.randn(1, 3, h, 64, device="cuda") for h in (4, 2))
    m = modules(ROPES["plain"], "rms", False, "cuda")
    assert fused_qk(q, k, **m, rope_inputs={}) is not None
    assert fused_qk(q.double(), k.double(), **m, rope_inputs={}) is None
    for other in ("default", "qwen_rms"):
        assert fused_qk(q, k, **modules(None, other, False, "cuda"), rope_inputs={}) is None
    for name in (RoPEType.complex,):
        rope = modules(RoPEConfig(name=name), "rms", False, "cuda")
        assert fused_qk(q, k, **rope, rope_inputs={}) is None
    half = modules(RoPEConfig(full_precision=False), "rms", False, "cuda")
    assert fused_qk(q, k, **half, rope_inputs={}) is None
    wrong = {
        "pos_sin": torch.ones(2, 64, device="cuda"),
        "pos_cos": torch.ones(2, 64, device="cuda"),
    }
    assert fused_qk(q, k, **m, rope_inputs=wrong) is None
    m["q_norm"].register_forward_hook(lambda *_: None)
    assert fused_qk(q, k, **m, rope_inputs={}) is None


def test_nothing_to_do_on_a_cpu() -> None:
    q, k = (torch.randn(1, 3, h, 64) for h in (4, 2))
    assert fused_qk(q, k, **modules(ROPES["plain"], "rms", False, "cpu"), rope_inputs={}) is None
