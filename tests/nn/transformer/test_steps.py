"""Decoding steps in any order: what a layer keeps for a step is right for the next one, of any
model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig
from olmo_core.nn.attention.config import SlidingWindowAttentionConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import Transformer, TransformerBlockConfig, TransformerConfig

T = 20


def build(theta: float, seed: int) -> Transformer:
    """As wide as the products in blocks need, with a window, a plain layer and a delta net."""
    rope = RoPEConfig(theta=theta)
    window = SlidingWindowAttentionConfig([5], False, False)
    mixers: list[Any] = [
        AttentionConfig(n_heads=4, n_kv_heads=2, bias=True, rope=rope),
        AttentionConfig(n_heads=4, rope=rope, sliding_window=window),
        GatedDeltaNetConfig(n_heads=2, head_dim=16),
    ]
    blocks = [TransformerBlockConfig(sequence_mixer=m) for m in mixers]
    model = TransformerConfig(192, 200, 3, blocks=blocks, pattern=[0, 1, 2]).build()
    model.init_weights(seed=seed)
    return model.eval()


MODELS = [build(10_000, 0), build(100, 1)]


@settings(deadline=None, max_examples=8)
@given(
    order=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), min_size=8, max_size=16),
    batch=st.integers(1, 3),
    pad=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_interleaved_models_with_rollbacks_and_padding(
    order: list[tuple[int, int]], batch: int, pad: int, seed: int
) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(200, (batch, T))
    leftpad = torch.zeros(batch, dtype=torch.int32)
    leftpad[-1] = pad
    held, new = [0, 0], [0, 0]
    with torch.no_grad():
        wholes = [model(ids, cache_leftpad=leftpad) for model in MODELS]
        with (
            MODELS[0].decoding(batch, T, max_rollback=2),
            MODELS[1].decoding(batch, T, max_rollback=2),
        ):
            for which, n in order:
                model, at = MODELS[which], held[which]
                stop = min(T, at + (n if at else 6))
                if stop == at or (n == 3 and new[which] > 2):
                    model.rollback(min(2, new[which]))
                    held[which] -= min(2, new[which])
                    new[which] = 0
                    continue
                first = {} if at else {"cache_leftpad": leftpad}
                for a, b in [(at, stop)] if not at else [(i, i + 1) for i in range(at, stop)]:
                    got, want = model(ids[:, a:b], **first), wholes[which][:, a:b]
                    real = torch.arange(a, b) >= leftpad[:, None]
                    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)
                held[which], new[which] = stop, new[which] + stop - at


def test_a_layer_that_is_called_alone_in_between() -> None:
    model, ids = MODELS[0], torch.randint(200, (1, T))
    layer = model.mixers[0]
    with torch.no_grad():
        whole = model(ids)
        with model.decoding(1, T, max_rollback=3):
            model(ids[:, :6])
            x = torch.randn(1, 1, 192)
            alone = layer(x)
            with pytest.raises(RuntimeError, match="different numbers of tokens"):
                model(ids[:, 6:7])
            layer.kv_cache_manager.rollback(1)
            got = model(ids[:, 6:7])
            model.rollback(1)
            torch.testing.assert_close(layer(x), alone, atol=0, rtol=0)
    torch.testing.assert_close(got, whole[:, 6:7], atol=2e-5, rtol=1e-4)


def test_a_position_that_changes_on_the_device_alone_counts() -> None:
    """As after captured steps, which the host does not see."""
    layer, x = MODELS[1].mixers[0], torch.randn(1, 12, 192)
    layer.init_kv_cache_manager(1, T)
    cache = layer.kv_cache_manager
    with torch.no_grad():
        try:
            layer(x[:, :9])
            tenth, eleventh = layer(x[:, 9:10]), layer(x[:, 9:10])
            cache.cache_seqlens.fill_(9)
            again = layer(x[:, 9:10])
        finally:
            layer.kv_cache_manager = None
    assert torch.equal(again, tenth) and not torch.equal(eleventh, tenth)


def test_another_dtype_in_the_middle() -> None:
    model, ids = build(10_000, 2), torch.randint(200, (1, T))
    with torch.no_grad(), model.decoding(1, T):
        model(ids[:, :9])
        narrow = model(ids[:, 9:10])
        model.double()
        wide = model(ids[:, 10:11])
        whole = model.double()
        model.drop_kv_cache()
        want = whole(ids[:, :11])
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), want[:, 9:10], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(wide, want[:, 10:11], atol=2e-5, rtol=1e-4)
