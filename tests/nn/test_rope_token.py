"""RoPE of one token: a row that is kept with its table, and fewer ops, but the bits of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope import RoPEConfig, RotaryEmbeddingBase, YaRNRoPEScalingConfig

LENGTH = 24
CONFIGS = {
    "default": RoPEConfig(),
    "theta": RoPEConfig(theta=100),
    "partial": RoPEConfig(partial_rotary_factor=0.5),
    "scaled": RoPEConfig(scaling=YaRNRoPEScalingConfig()),
    "narrow": RoPEConfig(full_precision=False),
    "pairs": RoPEConfig(name="complex"),  # type: ignore[arg-type]
}


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(2, LENGTH, heads, 16, generator=generator).to(dtype) for heads in (6, 2)
    )  # type: ignore[return-value]


def token(rope: RotaryEmbeddingBase, q: Any, k: Any, p: int, first: bool = False) -> Any:
    q, k = q[:, p : p + 1], k[:, p : p + 1]
    if not first:
        return rope(q, k, False, start_pos=p)
    return tuple(x.transpose(1, 2) for x in rope(q.transpose(1, 2), k.transpose(1, 2), start_pos=p))


def check(rope: RotaryEmbeddingBase, dtype: torch.dtype, p: int, first: bool = False) -> None:
    q, k = inputs(dtype)
    with torch.no_grad():
        whole = rope(q, k, False)
        for got, want in zip(token(rope, q, k, p, first), whole, strict=True):
            assert got.dtype == dtype and torch.equal(got, want[:, p : p + 1])


@settings(deadline=None, max_examples=30)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(sorted(CONFIGS)),
            st.integers(0, LENGTH - 1),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
            st.booleans(),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_any_steps_of_interleaved_layers_give_the_bits_of_all_rows(steps: list[Any]) -> None:
    cache = BufferCache()
    ropes = {name: config.build(16, cache=cache) for name, config in CONFIGS.items()}
    for name, position, dtype, head_first in steps:
        check(ropes[name], dtype, position, head_first)


def test_a_row_goes_with_its_table() -> None:
    cache = BufferCache()
    rope = RoPEConfig().build(16, cache=cache)
    q, k = inputs(torch.float32)
    with torch.no_grad():
        before = token(rope, q, k, 5)
        (key,) = cache.with_namespace("rope")
        cache.with_namespace("rope")[key] = torch.zeros(2048, 16)
        replaced = token(rope, q, k, 5)
        del cache.with_namespace("rope")[key]
        rope.warmup_cache(5000, "cpu")  # another table, which is longer
        after = token(rope, q, k, 5)
    assert not replaced[0].any() and not replaced[1].any()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_precision_that_changes_counts_at_once() -> None:
    rope = RoPEConfig().build(16)
    check(rope, torch.bfloat16, 7)
    rope.full_precision = False
    check(rope, torch.bfloat16, 7)


def test_a_row_that_was_made_in_inference_mode_serves_training() -> None:
    rope = RoPEConfig().build(16)
    q, k = (x.requires_grad_() for x in inputs(torch.float64))
    with torch.inference_mode():
        want = token(rope, q, k, 3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = token(rope, q, k, 3)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    (got[0].sum() + got[1].sum()).backward()
    assert q.grad is not None and q.grad[:, 3].any() and not q.grad[:, 4].any()


@pytest.mark.parametrize("start", [-1, 1.0, True])
def test_a_bad_start_is_refused_as_for_many_tokens(start: Any) -> None:
    rope, (q, k) = RoPEConfig().build(16), inputs(torch.float32)
    for n in (1, 2):
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match="start_pos"):
            rope(q[:, :n], k[:, :n], False, start_pos=start)


def test_outputs_are_apart() -> None:
    rope, (q, k) = RoPEConfig().build(16), inputs(torch.float32)
    with torch.no_grad():
        q_out, k_out = token(rope, q, k, 2)
        kept = k_out.clone()
        q_out.zero_()
    assert torch.equal(k_out, kept)
