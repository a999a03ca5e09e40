"""Cached = full: every way to cut a sequence into prefill and decoding steps gives one result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nn.attention.reference import relative
from nn.attention.test_attention import LAYERS, each_layer
from olmo_core.nn.attention import TorchAttentionBackend
from olmo_core.nn.attention.kv_cache import KVCacheManager


@st.composite
def decodings(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(1, 14))
    cuts = draw(st.lists(st.integers(1, total), max_size=6))
    ends = sorted({*cuts, total})
    return {
        "layer": draw(st.sampled_from(list(LAYERS))),
        "window": draw(st.sampled_from([None, 1, 3, 6, 50])),
        "chunks": [b - a for a, b in zip([0, *ends], ends)],
        "leftpad": draw(st.none() | st.tuples(st.integers(0, total), st.integers(0, total))),
        "max_rollback": draw(st.sampled_from([0, 3])),
        "max_seq_len": total + draw(st.sampled_from([0, 5])),
    }


@settings(max_examples=150)
@given(decodings())
def test_any_chunks_equal_the_full_forward(c: dict[str, Any]) -> None:
    layer = LAYERS[c["layer"]](window_size=c["window"], dtype=torch.float64).double().eval()
    x = torch.randn(2, sum(c["chunks"]), 16, dtype=torch.float64)
    leftpad = None if c["leftpad"] is None else torch.tensor(c["leftpad"], dtype=torch.int32)
    with torch.no_grad():
        want = layer(x, cache_leftpad=leftpad)
        layer.init_kv_cache_manager(2, c["max_seq_len"], max_rollback=c["max_rollback"])
        for _ in range(2):  # the second time in the same memory
            out, at = [], 0
            for size in c["chunks"]:
                first = {"cache_leftpad": leftpad} if at == 0 else {}
                out.append(layer(x[:, at : at + size], **first))
                at += size
            torch.testing.assert_close(torch.cat(out, dim=1), want, atol=1e-12, rtol=1e-10)
            assert layer.kv_cache_manager.current_position() == at
            layer.kv_cache_manager.reset()


@each_layer
@pytest.mark.parametrize("window", [None, 1, 4])
def test_left_padding_equals_each_row_alone(make: Any, window: int | None) -> None:
    """Page 2, failures 7 and 10: left padding without a cache was ignored, ``[0]`` with one too."""
    layer = make(window_size=window, dtype=torch.float64).double().eval()
    x = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    leftpad = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = layer(x, cache_leftpad=leftpad)
    for row, pad in enumerate(leftpad.tolist()):
        assert (out[row, :pad] == 0).all()
        if pad < 9:
            assert relative(out[row, pad:], layer(x[row : row + 1, pad:])[0]) < 1e-12
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (grad[1, :4] == 0).all() and (grad[2] == 0).all() and (grad[0] != 0).any()


@each_layer
@pytest.mark.parametrize("window", [None, 4])
def test_rollback_forgets_drafts(make: Any, window: int | None) -> None:
    layer = make(window_size=window, dtype=torch.float64).double().eval()
    x, draft = (torch.randn(2, n, 16, dtype=torch.float64) for n in (12, 3))
    with torch.no_grad():
        want = layer(x)
        layer.init_kv_cache_manager(2, 16, max_rollback=3)
        out = [layer(x[:, :6])]
        for t in range(6, 12):
            layer(draft)
            layer.kv_cache_manager.rollback(3)
            out.append(layer(x[:, t : t + 1]))
    assert relative(torch.cat(out, dim=1), want) < 1e-12


@pytest.mark.parametrize("max_seq_len", [10, 11, 12])
def test_a_window_holds_where_the_cache_is_no_ring(max_seq_len: int) -> None:
    """With room for rollback a window's slots may be as many as there are tokens."""
    layer = LAYERS["attention"](window_size=6, dtype=torch.float64).double().eval()
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        layer.init_kv_cache_manager(2, max_seq_len, max_rollback=5)
        got = torch.cat([layer(x[:, t, None]) for t in range(10)], dim=1)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 4])
def test_a_step_reads_only_what_it_needs(window: int | None) -> None:
    """Slots beyond the tokens so far, and padding, hold NaN here: nothing may read them."""
    layer = LAYERS["attention"](window_size=window).eval()
    x = torch.randn(2, 10, 16)
    leftpad = torch.tensor([2, 0], dtype=torch.int32)
    with torch.no_grad():
        want = layer(x, cache_leftpad=leftpad)
        layer.init_kv_cache_manager(2, 64)
        out = [layer(x[:, :6], cache_leftpad=leftpad)]
        if window is None:
            layer.kv_cache_manager.k_cache[:, 10:] = float("nan")
        out += [layer(x[:, t : t + 1]) for t in range(6, 10)]
    torch.testing.assert_close(torch.cat(out, dim=1), want)


def test_buffers() -> None:
    layer = LAYERS["attention"](dtype=torch.bfloat16).eval()
    layer.init_kv_cache_manager(2, 16)
    cache = layer.kv_cache_manager
    assert isinstance(cache, KVCacheManager)
    assert cache.k_cache.shape == cache.v_cache.shape == (2, 16, 2, 4)
    assert cache.k_cache.dtype == torch.bfloat16  # the module's dtype, not always bf16
    assert LAYERS["attention"]().w_k.weight.dtype == torch.float32
    assert not [name for name in layer.state_dict() if "cache" in name]
    with torch.no_grad():
        leftpad = torch.tensor([3, 0], dtype=torch.int32)
        layer(torch.randn(2, 5, 16, dtype=torch.bfloat16), cache_leftpad=leftpad)
    assert (cache.k_cache[0, :3] == 0).all() and (cache.k_cache[0, 3:5] != 0).any()
    assert (cache.k_cache[:, 5:] == 0).all()
    assert cache.cache_seqlens == 5 and cache.cache_leftpad.tolist() == [3, 0]
    memory = cache.k_cache.data_ptr()
    assert cache.is_reusable(2, 12) and not cache.is_reusable(3, 12)
    cache.reset(2, 12)
    assert cache.k_cache.data_ptr() == memory and (cache.k_cache == 0).all()
    cache.reset(3, 12)
    assert cache.k_cache.shape == (3, 12, 2, 4)
    window = LAYERS["attention"](window_size=5).eval()
    window.init_kv_cache_manager(2, 16)
    assert window.kv_cache_manager.k_cache.shape == (2, 5, 2, 4)


def test_a_cache_made_in_inference_mode_serves_outside_it() -> None:
    layer = LAYERS["attention"]().eval()
    x = torch.randn(2, 6, 16)
    with torch.inference_mode():
        layer.init_kv_cache_manager(2, 8)
        first = layer(x[:, :3])
    with torch.no_grad():
        second = layer(x[:, 3:])
        layer.kv_cache_manager = None
        torch.testing.assert_close(torch.cat([first, second], 1), layer(x))
    layer(x).sum().backward()  # and RoPE's tables still serve training


@pytest.mark.parametrize("window", [None, 3])
def test_a_backend_alone_takes_room_itself(window: int | None) -> None:
    sizes = (-1, -1) if window is None else (window - 1, 0)
    backend = TorchAttentionBackend(head_dim=4, n_heads=2, window_size=sizes)
    q, k, v = (torch.randn(1, 7, 2, 4, dtype=torch.float64) for _ in range(3))
    cache = KVCacheManager(1, 7, 2, 4, dtype=torch.float64, window=window or -1)
    steps = [slice(0, 4), *(slice(t, t + 1) for t in range(4, 7))]
    out = [backend((q[:, at], k[:, at], v[:, at]), kv_cache_manager=cache) for at in steps]
    assert relative(torch.cat(out, dim=1), backend((q, k, v))) < 1e-12
    with pytest.raises(RuntimeError, match="7 of at most 7"):
        backend((q[:, :1], k[:, :1], v[:, :1]), kv_cache_manager=cache)


def test_a_refused_call_takes_no_room() -> None:
    layer = LAYERS["attention"]().eval()
    layer.init_kv_cache_manager(2, 8)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(torch.randn(2, 5, 16))
    assert layer.kv_cache_manager.host_seqlen == 0
    with torch.no_grad():
        assert layer(torch.randn(2, 8, 16)).shape == (2, 8, 16)


def test_eager_steps_after_steps_that_did_not_count() -> None:
    """A captured step that nobody reserved room for is missing on the host, not on the device."""
    layer = LAYERS["attention"]().eval()
    x = torch.randn(1, 6, 16)
    with torch.no_grad():
        want = layer(x)
        layer.init_kv_cache_manager(1, 8)
        out = [layer(x[:, :5])]
        layer.kv_cache_manager.host_seqlen = 2
        out.append(layer(x[:, 5:]))
    torch.testing.assert_close(torch.cat(out, dim=1), want)


def test_a_cache_moves_with_its_layer() -> None:
    layer = LAYERS["attention"]().eval()
    layer.init_kv_cache_manager(1, 8)
    layer.to(torch.bfloat16)
    assert layer.kv_cache_manager.dtype == torch.bfloat16
    layer.to("meta")
    assert layer.kv_cache_manager.device.type == "meta"


def refused(layer: Any, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    before = layer.kv_cache_manager.k_cache.clone()
    with torch.no_grad(), pytest.raises(error, match=match):
        layer(*args, **kwargs)
    assert torch.equal(before, layer.kv_cache_manager.k_cache)


def test_bad_calls() -> None:
    layer = LAYERS["attention"]().eval()
    layer.init_kv_cache_manager(2, 8)
    cache = layer.kv_cache_manager
    x = torch.randn(2, 5, 16)
    pad = torch.tensor([1, 0], dtype=torch.int32)
    cu = torch.tensor([0, 10], dtype=torch.int32)
    refused(layer, ValueError, "one document a row", x, cu_doc_lens=cu, max_doc_len=10)
    refused(layer, ValueError, "batch of 2", x[:1])
    refused(layer, ValueError, "in \\[0, 8\\]", x, cache_leftpad=pad + 8)
    refused(layer, ValueError, "shape \\(2,\\)", x, cache_leftpad=pad[:1])
    refused(layer, TypeError, "int32", x, cache_leftpad=pad.long())
    buffers = layer.rope.get_buffers(5, torch.device("cpu"))
    refused(
        layer, ValueError, "knows its positions", x,
        pos_sin=buffers.pos_sin, pos_cos=buffers.pos_cos,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="for inference"):
        layer(x)
    cache.reset()
    with torch.no_grad():
        layer(x, cache_leftpad=pad)
    refused(layer, ValueError, "first tokens after a reset", x[:, :1], cache_leftpad=pad)
    refused(layer, RuntimeError, "5 of at most 8", x[:, :4])
    with pytest.raises(ValueError, match="forget 6 of 5"):
        cache.rollback(6)
    with pytest.raises(ValueError, match="room for a row"):
        layer.init_kv_cache_manager(0, 8)
    with pytest.raises(ValueError, match="max_rollback"):
        layer.init_kv_cache_manager(1, 8, max_rollback=-1)
    windowed = LAYERS["attention"](window_size=2).eval()
    windowed.init_kv_cache_manager(2, 8)
    with torch.no_grad():
        windowed(x)
    with pytest.raises(ValueError, match="at most 0 tokens"):
        windowed.kv_cache_manager.rollback(1)
