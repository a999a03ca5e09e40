"""Cases of bad calls: configurations, inputs, lengths, RoPE. See ``test_bad_calls``.

Each is a lambda, the error that it must raise, and what the message must say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import (
    Attention,
    AttentionConfig,
    FusedAttention,
    GateConfig,
    NormalizedAttention,
    SlidingWindowAttentionConfig,
    TorchAttentionBackend,
)
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEType,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)

Case = tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...], str]
D, H, T = 16, 4, 6
CONFIG = OLMoConfigurationError
VALUE_OR_TYPE = (ValueError, TypeError)


def build(d_model: int = D, **kwargs: Any) -> Any:
    kwargs.setdefault("n_heads", H)
    return AttentionConfig(**kwargs).build(d_model, layer_idx=0, n_layers=2)


def layer(**kwargs: Any) -> Attention:
    return Attention(**{"d_model": D, "n_heads": H, **kwargs})


def x(batch: int = 1, seq: int = T, width: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(batch, seq, width, dtype=dtype)


def cu(*ends: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ends, dtype=dtype)


def cached(batch: int = 1, length: int = 8, **kwargs: Any) -> Attention:
    mixer = layer(**kwargs).eval()
    mixer.init_kv_cache_manager(batch, length)
    return mixer


def twice(mixer: Attention, first: Tensor, second: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        mixer(first)
        return mixer(second, **kwargs)


def backend(**kwargs: Any) -> TorchAttentionBackend:
    return TorchAttentionBackend(**{"head_dim": 4, "n_heads": H, **kwargs})


def qkv(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.ones(q), torch.ones(k), torch.ones(v)


CONFIGURATION: dict[str, Case] = {
    "no heads": (lambda: build(n_heads=0), CONFIG, r"n_heads.*0"),
    "negative heads": (lambda: build(n_heads=-4), CONFIG, r"n_heads.*-4"),
    "more kv heads than heads": (lambda: build(n_kv_heads=8), CONFIG, r"n_kv_heads.*8"),
    "kv heads do not divide heads": (lambda: build(n_kv_heads=3), CONFIG, r"n_kv_heads.*3"),
    "zero kv heads is not None": (lambda: build(n_kv_heads=0), CONFIG, r"n_kv_heads.*0"),
    "negative kv heads": (lambda: build(n_kv_heads=-1), CONFIG, r"n_kv_heads.*-1"),
    "heads do not divide d_model": (lambda: build(100, n_heads=8), CONFIG, r"d_model.*100.*8"),
    "zero d_model": (lambda: build(0), CONFIG, r"d_model.*0"),
    "zero head_dim": (lambda: build(head_dim=0), CONFIG, r"head_dim.*0"),
    "odd head_dim with RoPE": (lambda: build(head_dim=5, rope=RoPEConfig()), CONFIG, r"(even|odd)"),
    "negative dropout": (lambda: build(dropout=-0.1), CONFIG, r"dropout.*-0\.1"),
    "dropout of everything": (lambda: build(dropout=1.0), CONFIG, r"dropout.*1\.0"),
    "zero clip": (lambda: build(clip_qkv=0.0), CONFIG, r"clip_qkv.*0"),
    "negative clip": (lambda: build(clip_qkv=-1.0), CONFIG, r"clip_qkv.*-1"),
    "zero window": (lambda: layer(window_size=0), CONFIG, r"window_size.*0"),
    "negative window": (lambda: layer(window_size=-5), CONFIG, r"window_size.*-5"),
    "unknown backend": (lambda: build(backend="flash_5"), CONFIG, r"flash_4.*flash_5"),
    "unknown variant": (lambda: build(name="fast"), CONFIG, r"fused.*fast"),
    "unknown dtype": (lambda: build(dtype="int8"), CONFIG, r"bfloat16.*int8"),
    "integer dtype": (lambda: layer(dtype=torch.int32), CONFIG, r"int32"),
    "use_flash against backend": (
        lambda: layer(use_flash=True, backend="torch"),
        CONFIG,
        r"use_flash.*torch",
    ),
    "unknown gate": (lambda: GateConfig(granularity="row"), CONFIG, r"headwise.*row"),
    "unknown norm": (lambda: LayerNormConfig(name="rmsnorm"), CONFIG, r"qwen_rms.*rmsnorm"),
    "negative eps": (
        lambda: LayerNormConfig(name=LayerNormType.rms, eps=-1e-5).build(8),
        CONFIG,
        r"eps.*-1e-05",
    ),
    "fused with kv heads": (lambda: build(name="fused", n_kv_heads=2), CONFIG, r"n_kv_heads"),
    "fused with a gate": (lambda: build(name="fused", gate=GateConfig()), CONFIG, r"gate"),
    "fused with qk_norm": (
        lambda: build(name="fused", qk_norm=LayerNormConfig(name=LayerNormType.rms)),
        CONFIG,
        r"qk_norm",
    ),
    "fused with default RoPE": (
        lambda: FusedAttention(d_model=D, n_heads=H, rope=RoPEConfig()),
        CONFIG,
        r"fused",
    ),
    "fused with a head_dim": (lambda: build(name="fused", head_dim=8), CONFIG, r"head_dim"),
    "normalized with bias": (lambda: build(name="normalized", bias=True), CONFIG, r"bias"),
    "normalized with a gate": (
        lambda: build(name="normalized", gate=GateConfig()),
        CONFIG,
        r"gate",
    ),
    "normalized with clip": (lambda: build(name="normalized", clip_qkv=1.0), CONFIG, r"clip_qkv"),
    "normalized with dropout": (lambda: build(name="normalized", dropout=0.1), CONFIG, r"dropout"),
    "head norm without a norm": (lambda: build(use_head_qk_norm=True), CONFIG, r"qk_norm"),
    "layer past the last": (
        lambda: AttentionConfig(n_heads=H).build(D, layer_idx=2, n_layers=2),
        (CONFIG, ValueError),
        r"layer_idx.*2",
    ),
    "empty pattern": (lambda: SlidingWindowAttentionConfig(pattern=[]), CONFIG, r"pattern"),
    "zero in a pattern": (lambda: SlidingWindowAttentionConfig([4, 0]), CONFIG, r"pattern.*0"),
    "-2 in a pattern": (lambda: SlidingWindowAttentionConfig([-2]), CONFIG, r"pattern.*-2"),
    "window of a full layer": (
        lambda: SlidingWindowAttentionConfig([4, -1]).get_window_size(0, 4),
        ValueError,
        r"Layer 0",
    ),
    "window of a layer past the last": (
        lambda: SlidingWindowAttentionConfig([4]).should_use_swa(4, 4),
        ValueError,
        r"layer_idx.*4",
    ),
    "unknown RoPE": (lambda: RoPEConfig(name="rotary"), CONFIG, r"complex.*rotary"),
    "zero theta": (lambda: RoPEConfig(theta=0).build(8), CONFIG, r"theta.*0"),
    "no rotary part": (
        lambda: RoPEConfig(partial_rotary_factor=0.0).build(8),
        CONFIG,
        r"partial_rotary_factor",
    ),
    "rotary part above one": (
        lambda: RoPEConfig(partial_rotary_factor=1.5).build(8),
        CONFIG,
        r"partial_rotary_factor",
    ),
    "zero PI factor": (
        lambda: RoPEConfig(scaling=PIRoPEScalingConfig(factor=0.0)).build(8),
        CONFIG,
        r"factor",
    ),
    "zero ABF theta": (
        lambda: RoPEConfig(scaling=ABFRoPEScalingConfig(new_theta=0)).build(8),
        CONFIG,
        r"new_theta",
    ),
    "zero YaRN factor": (
        lambda: RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=0.0)).build(8),
        CONFIG,
        r"factor",
    ),
    "stepwise bounds crossed": (
        lambda: RoPEConfig(
            scaling=StepwiseRoPEScalingConfig(low_freq_proportion=0.8, high_freq_proportion=0.25)
        ).build(8),
        CONFIG,
        r"low_freq_proportion",
    ),
    "unknown key": (
        lambda: AttentionConfig.from_dict({"n_head": 4}),
        CONFIG,
        r"n_head.*n_heads",
    ),
    "unknown type": (
        lambda: AttentionConfig.from_dict({"type": "atention"}),
        CONFIG,
        r"atention.*attention",
    ),
    "unknown override": (lambda: AttentionConfig().merge(["rope.thta=1"]), CONFIG, r"thta.*theta"),
    "override without a value": (lambda: AttentionConfig().merge(["n_heads"]), CONFIG, r"n_heads"),
    "text for a number": (
        lambda: AttentionConfig().merge(["n_heads=many"]),
        CONFIG,
        r"n_heads.*many",
    ),
    "unknown init method": (
        lambda: layer().init_weights(init_method="xavier", d_model=D, block_idx=0, num_blocks=1),
        (CONFIG, ValueError),
        r"xavier.*llama",
    ),
    "block past the last": (
        lambda: layer().init_weights(
            init_method="llama_depth", d_model=D, block_idx=3, num_blocks=2
        ),
        (CONFIG, ValueError),
        r"block_idx.*3",
    ),
}

INPUTS: dict[str, Case] = {
    "two dimensions": (lambda: layer()(torch.ones(T, D)), ValueError, r"batch.*\(6, 16\)"),
    "four dimensions": (lambda: layer()(torch.ones(1, 1, T, D)), ValueError, r"\(1, 1, 6, 16\)"),
    "wrong width": (lambda: layer()(x(width=D + 1)), ValueError, r"16.*17"),
    "integers": (lambda: layer()(x(dtype=torch.int64)), (TypeError, ValueError), r"int64"),
    "complex numbers": (lambda: layer()(x(dtype=torch.complex64)), VALUE_OR_TYPE, r"complex64"),
    "another float type": (lambda: layer()(x(dtype=torch.float64)), VALUE_OR_TYPE, r"float64"),
    "another device": (
        lambda: layer()(x().to("meta")),
        (ValueError, RuntimeError),
        r"meta",
    ),
    "not a tensor": (lambda: layer()([[1.0] * D]), TypeError, r"list"),
    "an unknown keyword": (lambda: layer()(x(), doc_lens=cu(0, T)), TypeError, r"doc_lens"),
    "fused, wrong width": (
        lambda: FusedAttention(d_model=D, n_heads=H)(x(width=8)),
        ValueError,
        r"16.*8",
    ),
    "normalized, two dimensions": (
        lambda: NormalizedAttention(d_model=D, n_heads=H)(torch.ones(T, D)),
        ValueError,
        r"\(6, 16\)",
    ),
}

LENGTHS: dict[str, Case] = {
    "max_doc_len alone": (lambda: layer()(x(), max_doc_len=T), ValueError, r"cu_doc_lens"),
    "int64": (lambda: layer()(x(), cu_doc_lens=cu(0, T, dtype=torch.int64)), TypeError, r"int64"),
    "floats": (lambda: layer()(x(), cu_doc_lens=torch.tensor([0.0, T])), TypeError, r"float32"),
    "a list": (lambda: layer()(x(), cu_doc_lens=[0, T]), TypeError, r"list"),
    "two dimensions": (lambda: layer()(x(), cu_doc_lens=cu(0, T)[None]), ValueError, r"\(1, 2\)"),
    "one element": (lambda: layer()(x(), cu_doc_lens=cu(0)), ValueError, r"\(1,\)"),
    "no element": (lambda: layer()(x(), cu_doc_lens=cu()), ValueError, r"\(0,\)"),
    "not from 0": (lambda: layer()(x(), cu_doc_lens=cu(1, T)), ValueError, r"start at 0.*1"),
    "decreasing": (lambda: layer()(x(), cu_doc_lens=cu(0, 4, 2, T)), ValueError, r"decrease"),
    "negative": (lambda: layer()(x(), cu_doc_lens=cu(0, -2, T)), ValueError, r"decrease.*-2"),
    "short": (lambda: layer()(x(), cu_doc_lens=cu(0, 4)), ValueError, r"end at.*6.*4"),
    "long": (lambda: layer()(x(), cu_doc_lens=cu(0, 7)), ValueError, r"end at.*6.*7"),
    "of one row": (lambda: layer()(x(batch=2), cu_doc_lens=cu(0, T)), ValueError, r"end at.*12.*6"),
    "another device": (
        lambda: layer()(x(), cu_doc_lens=cu(0, T).to("meta")),
        (ValueError, RuntimeError),
        r"meta",
    ),
    "max_doc_len too small": (
        lambda: layer()(x(), cu_doc_lens=cu(0, 4, T), max_doc_len=3),
        ValueError,
        r"4.*max_doc_len=3",
    ),
    "max_doc_len zero": (
        lambda: layer()(x(), cu_doc_lens=cu(0, T), max_doc_len=0),
        ValueError,
        r"max_doc_len",
    ),
    "max_doc_len a float": (
        lambda: layer()(x(), cu_doc_lens=cu(0, T), max_doc_len=6.0),
        TypeError,
        r"float",
    ),
    "max_doc_len a tensor": (
        lambda: layer()(x(), cu_doc_lens=cu(0, T), max_doc_len=torch.tensor(T)),
        TypeError,
        r"Tensor",
    ),
    "a window, and documents that do not end": (
        lambda: layer(window_size=2)(x(), cu_doc_lens=cu(0, 4)),
        ValueError,
        r"end at.*6.*4",
    ),
    "fused, short": (
        lambda: FusedAttention(d_model=D, n_heads=H)(x(), cu_doc_lens=cu(0, 4)),
        ValueError,
        r"end at.*6.*4",
    ),
    "fused, max_doc_len alone": (
        lambda: FusedAttention(d_model=D, n_heads=H)(x(), max_doc_len=T),
        ValueError,
        r"cu_doc_lens",
    ),
    "cu_doc_lens_q alone": (
        lambda: layer()(x(), cu_doc_lens_q=cu(0, T)),
        (ValueError, RuntimeError),
        r"cu_doc_lens_q",
    ),
    "max_doc_len_q alone": (
        lambda: layer()(x(), max_doc_len_q=T),
        (ValueError, RuntimeError),
        r"max_doc_len_q",
    ),
    "local_k_slice alone": (
        lambda: layer()(x(), local_k_slice=slice(0, T)),
        (ValueError, RuntimeError),
        r"local_k_slice",
    ),
    "llama3's keywords without context parallelism": (
        lambda: layer()(
            x(),
            cu_doc_lens_q=cu(0, T),
            cu_doc_lens_k=cu(0, 2 * T),
            max_doc_len_q=T,
            max_doc_len_k=2 * T,
            local_k_slice=slice(0, 2 * T),
        ),
        (ValueError, RuntimeError),
        r"apply_cp|context.parallel",
    ),
    "both kinds of lengths": (
        lambda: layer()(x(), cu_doc_lens=cu(0, T), cu_doc_lens_q=cu(0, T), cu_doc_lens_k=cu(0, T)),
        (ValueError, RuntimeError),
        r"cu_doc_lens",
    ),
}

TABLE = torch.ones(T, 4)
ROPE: dict[str, Case] = {
    "sine without cosine": (
        lambda: layer(rope=RoPEConfig())(x(), pos_sin=TABLE),
        ValueError,
        r"pos_cos",
    ),
    "complex buffers for the default RoPE": (
        lambda: layer(rope=RoPEConfig())(x(), freqs_cis=torch.ones(T, 2, dtype=torch.complex64)),
        ValueError,
        r"freqs_cis",
    ),
    "real buffers for the complex RoPE": (
        lambda: layer(rope=RoPEConfig(name=RoPEType.complex))(x(), pos_sin=TABLE, pos_cos=TABLE),
        ValueError,
        r"(freqs_cis|complex)",
    ),
    "too few rows": (
        lambda: layer(rope=RoPEConfig())(x(), pos_sin=TABLE[:4], pos_cos=TABLE[:4]),
        ValueError,
        r"4",
    ),
    "another width": (
        lambda: layer(rope=RoPEConfig())(x(), pos_sin=TABLE[:, :2], pos_cos=TABLE[:, :2]),
        ValueError,
        r"2",
    ),
    "buffers without RoPE": (
        lambda: layer()(x(), pos_sin=TABLE, pos_cos=TABLE),
        ValueError,
        r"(rope|RoPE)",
    ),
    "a bf16 table in full precision": (
        lambda: layer(rope=RoPEConfig())(x(), pos_sin=TABLE.bfloat16(), pos_cos=TABLE.bfloat16()),
        CONFIG,
        r"bfloat16",
    ),
}
