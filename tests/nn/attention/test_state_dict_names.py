"""State dicts of OLMo-core load by name: names, shapes and dtypes as its layers have them.

They are written out here by hand, from the description of those layers, not from ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olmo_core.nn.attention import AttentionConfig, GateConfig, GatedDeltaNetConfig
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

D, H, KV, HD = 24, 4, 2, 6
Q, K = H * HD, KV * HD
RMS = LayerNormConfig(name="rms", bias=False)  # type: ignore[arg-type]


def linear(name: str, rows: int, columns: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def projections(bias: bool) -> dict[str, tuple[int, ...]]:
    return {
        **linear("w_q", Q, D, bias),
        **linear("w_k", K, D, bias),
        **linear("w_v", K, D, bias),
        **linear("w_out", D, Q, bias),
    }


def attention(**options: Any) -> AttentionConfig:
    return AttentionConfig(n_heads=H, n_kv_heads=KV, rope=RoPEConfig(), **options)


# A delta net with two key heads of 8, four value heads of 16, and kernels of 4.
GDN = {
    **linear("w_q", 16, D),
    **linear("w_k", 16, D),
    **linear("w_v", 64, D),
    **linear("w_a", 4, D),
    **linear("w_b", 4, D),
    **linear("w_g", 64, D),
    **linear("w_out", D, 64),
    "A_log": (4,),
    "dt_bias": (4,),
    "q_conv1d.weight": (16, 1, 4),
    "k_conv1d.weight": (16, 1, 4),
    "v_conv1d.weight": (64, 1, 4),
    "o_norm.weight": (16,),
}
CASES: dict[str, tuple[SequenceMixerConfig, dict[str, tuple[int, ...]]]] = {
    "biases": (attention(), projections(True)),
    "norms over the full width": (
        attention(bias=False, qk_norm=LayerNormConfig()),
        {
            **projections(False),
            "q_norm.weight": (Q,),
            "q_norm.bias": (Q,),
            "k_norm.weight": (K,),
            "k_norm.bias": (K,),
        },
    ),
    "norms of heads": (
        attention(bias=False, qk_norm=RMS, use_head_qk_norm=True),
        {**projections(False), "q_norm.weight": (HD,), "k_norm.weight": (HD,)},
    ),
    "gate of heads": (
        attention(bias=False, gate=GateConfig()),
        {**projections(False), **linear("w_g", H, D)},
    ),
    "gate of elements, biases": (
        attention(gate=GateConfig(granularity="elementwise")),  # type: ignore[arg-type]
        {**projections(True), **linear("w_g", Q, D, True)},
    ),
    "normalized": (
        attention(name="normalized"),
        {**projections(False), "sq": (Q,), "sk": (K,)},
    ),
    "fused": (
        AttentionConfig(name="fused", n_heads=H, bias=False),  # type: ignore[arg-type]
        {**linear("w_qkv", 3 * D, D), **linear("w_out", D, D)},
    ),
    "delta net": (GatedDeltaNetConfig(n_heads=2, n_v_heads=4, head_dim=8), GDN),
}


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_of_this_description_loads(name: str) -> None:
    config, shapes = CASES[name]
    state: dict[str, Tensor] = {key: torch.rand(shape) for key, shape in shapes.items()}
    layer = config.build(D, layer_idx=0, n_layers=1)
    layer.load_state_dict(state, strict=True)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())
    # Nothing of a cache or a table of RoPE is in it, whatever has run.
    layer(torch.randn(1, 5, D))
    layer.init_kv_cache_manager(1, 8)
    with torch.no_grad():
        layer(torch.randn(1, 3, D))
    layer.load_state_dict(state, strict=True)


def test_gates_of_a_half_precision_delta_net_stay_float32() -> None:
    config, shapes = CASES["delta net"]
    layer = config.replace(dtype="bfloat16").build(D, layer_idx=0, n_layers=1)
    wide = {key for key, x in layer.state_dict().items() if x.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "o_norm.weight"} and shapes.keys() >= wide
