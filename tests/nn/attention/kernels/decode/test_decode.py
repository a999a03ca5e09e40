"""The table of decode kernels: each is the definition, and the fastest that can is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nn.attention.kernels.decode.test_triton_split_kv import cache_before, definition
from olmo_core.nn.attention.kernels.decode import DECODE_KERNELS, choose_decode, triton_split_kv


@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    position=st.integers(0, 20),
    window=st.sampled_from([-1, 1, 4, 30]),
    is_ring=st.booleans(),
    padded=st.booleans(),
    traced=st.booleans(),
)
def test_torch_is_the_definition(
    batch: int, heads: tuple[int, int], position: int, window: int, is_ring: bool, padded: bool,
    traced: bool,
) -> None:  # fmt: skip
    """Slots that a token must not see hold NaN, but where they are only masked out."""
    is_ring = is_ring and window > 0
    slots = window if is_ring else 24
    leftpad = torch.randint(0, position + 2, (batch,), dtype=torch.int32)
    if not padded:
        leftpad.zero_()
    q = torch.randn(batch, 1, heads[0], 6, dtype=torch.float64)
    keys, values = torch.randn(2, batch, position + 1, heads[1], 6, dtype=torch.float64)
    caches = [cache_before(x, position, leftpad, slots, is_ring) for x in (keys, values)]
    if padded or traced:
        caches = [x.nan_to_num(0.0) for x in caches]
    k_cache, v_cache = caches
    seqlen = torch.tensor(position, dtype=torch.int32)
    call = DECODE_KERNELS["torch"].decode
    if traced:  # as a compiler or another mode sees it: no position on the host
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
    got = call(
        q, keys[:, -1:], values[:, -1:], k_cache, v_cache, seqlen, leftpad,
        padded=padded, scale=0.3, window=-1 if is_ring else window, is_ring=is_ring,
    )  # fmt: skip
    want = definition(q, keys, values, position, leftpad, 0.3, window)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    assert seqlen.item() == position
    for cache, new in ((k_cache, keys[:, -1]), (v_cache, values[:, -1])):
        for b, pad in enumerate(leftpad.tolist()):
            slot = (position - pad) % slots if is_ring else position
            stored = new[b] if position >= pad else torch.zeros_like(new[b])
            assert torch.equal(cache[b, slot], stored)


def test_the_fastest_that_can_is_chosen_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = torch.ones(1, 1, 4, 32), torch.ones(1, 9, 2, 32)
    assert list(DECODE_KERNELS) == ["triton", "torch"]
    monkeypatch.setattr(triton_split_kv, "triton_refusal", lambda x: "no GPU here")
    choice = choose_decode(q, cache)
    assert choice.name == "torch" and choice.refused == {"triton": "no GPU here"}
    assert "SDPA over the cache" in choice.reason
    monkeypatch.setattr(triton_split_kv, "triton_refusal", lambda x: None)
    choice = choose_decode(q, cache)
    assert choice.name == "triton" and not choice.refused
    assert (
        "at most 256, not 512" in choose_decode(q.new_ones(1, 1, 4, 512), cache).refused["triton"]
    )
