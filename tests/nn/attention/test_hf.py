"""Attention with the weights of a Hugging Face model gives what that model's attention gives.

The models are tiny and random, and run whole, one document at a time: they build their own masks
and rotary embeddings, and hooks record what goes into each attention module. All documents packed
into one sequence then go through this library's layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from olmo_core.nn.attention import Attention
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import (
    PIRoPEScalingConfig,
    RoPEConfig,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

D, H, KV, WINDOW, EPS = 48, 6, 2, 4, 1e-5
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": KV,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
TOLERANCE = 1e-5
RENAMED = {"q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v", "o_proj": "w_out"}


def norm(name: LayerNormType) -> LayerNormConfig:
    return LayerNormConfig(name=name, eps=EPS, bias=False)


def llama(scaling: dict[str, Any] | None = None, **more: Any) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **(scaling or {})}
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, rope_parameters=rope, **more))


def olmo2() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    return transformers.Olmo2Model(
        transformers.Olmo2Config(**SIZES, rope_parameters=rope, rms_norm_eps=EPS)
    )


def olmo3() -> nn.Module:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 64,
    }
    default = {"rope_type": "default", "rope_theta": 500_000.0}
    config = transformers.Olmo3Config(
        **{**SIZES, "max_position_embeddings": 512},
        rms_norm_eps=EPS,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": default, "full_attention": yarn},
    )
    return transformers.Olmo3Model(config)


def qwen3() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return transformers.Qwen3Model(
        transformers.Qwen3Config(**SIZES, head_dim=10, rope_parameters=rope, rms_norm_eps=EPS)
    )


class Family(NamedTuple):
    model: Callable[[], nn.Module]
    layers: list[dict[str, Any]]
    """What this library calls each layer's options."""


def rope(theta: float, scaling: Any = None) -> RoPEConfig:
    return RoPEConfig(theta=theta, scaling=scaling)


OLMO: dict[str, Any] = {"qk_norm": norm(LayerNormType.rms)}
QWEN: dict[str, Any] = {"qk_norm": norm(LayerNormType.qwen_rms), "use_head_qk_norm": True}
FAMILIES = {
    "llama": Family(llama, [{"rope": rope(10_000)}] * 2),
    "llama with biases": Family(
        lambda: llama(attention_bias=True), [{"rope": rope(10_000), "bias": True}] * 2
    ),
    "llama, linear scaling": Family(
        lambda: llama({"rope_type": "linear", "factor": 4.0}),
        [{"rope": rope(10_000, PIRoPEScalingConfig(factor=4.0))}] * 2,
    ),
    "llama 3.1 scaling": Family(
        lambda: llama(
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 180,
            }
        ),
        [
            {
                "rope": rope(
                    10_000,
                    StepwiseRoPEScalingConfig(
                        factor=8.0,
                        low_freq_proportion=0.5,
                        high_freq_proportion=0.25,
                        old_context_len=180,
                    ),
                )
            }
        ]
        * 2,
    ),
    "olmo2": Family(olmo2, [{"rope": rope(500_000), **OLMO}] * 2),
    "olmo3": Family(
        olmo3,
        [
            {"rope": rope(500_000), "window_size": WINDOW, **OLMO},
            {
                "rope": rope(500_000, YaRNRoPEScalingConfig(factor=8.0, old_context_len=64)),
                **OLMO,
            },
        ],
    ),
    "qwen3": Family(qwen3, [{"rope": rope(1_000_000), "head_dim": 10, **QWEN}] * 2),
}


def randomize_norms(model: nn.Module) -> None:
    """Norm weights of one would hide a forgotten norm's weight."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.uniform_(parameter, 0.5, 1.5)


def recorded(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """The hidden states and other keywords that each attention module gets."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert args == ()
        found.append((kwargs.pop("hidden_states").detach(), kwargs))

    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k: record(m, a, dict(k)), with_kwargs=True
        )
        for layer in model.layers
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def our_name(name: str) -> str:
    module, kind = name.split(".")
    return f"{RENAMED.get(module, module)}.{kind}"


def ours(theirs: nn.Module, options: dict[str, Any]) -> Attention:
    layer = Attention(d_model=D, n_heads=H, n_kv_heads=KV, **{"bias": False, **options})
    layer.load_state_dict({our_name(k): v for k, v in theirs.state_dict().items()})
    return layer


@pytest.mark.parametrize("lengths", [[15], [7, 1, 12, 3]], ids=["whole", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of(family: str, lengths: list[int]) -> None:
    model = FAMILIES[family].model().eval()
    randomize_norms(model)
    documents = [recorded(model, torch.randint(64, (1, n))) for n in lengths]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    for index, options in enumerate(FAMILIES[family].layers):
        theirs = model.layers[index].self_attn
        layer = ours(theirs, options)
        hidden = torch.cat([document[index][0] for document in documents], dim=1)
        cotangent = torch.randn_like(hidden)

        expected_in = hidden.clone().requires_grad_()
        expected = torch.cat(
            [
                theirs(piece, **document[index][1])[0]
                for piece, document in zip(
                    expected_in.split(lengths, dim=1), documents, strict=True
                )
            ],
            dim=1,
        )
        names, parameters = zip(*theirs.named_parameters(), strict=True)
        expected_grads = torch.autograd.grad(expected, [expected_in, *parameters], cotangent)

        x = hidden.clone().requires_grad_()
        out = layer(x, cu_doc_lens=cu if len(lengths) > 1 else None)
        parameters = [layer.get_parameter(our_name(name)) for name in names]
        grads = torch.autograd.grad(out, [x, *parameters], cotangent)

        torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)
        for name, grad, wanted in zip(["x", *names], grads, expected_grads, strict=True):
            error = (grad - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            assert error < TOLERANCE, f"layer {index}, gradient of {name}: {error}"
