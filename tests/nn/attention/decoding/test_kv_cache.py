"""Cached = full: every way to cut a sequence into prefill and decoding steps gives one result."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nn.attention.reference import relative
from nn.attention.test_attention import LAYERS, each_layer
from olmo_core.nn.attention import TorchAttentionBackend, sdpa, selection
from olmo_core.nn.attention.capabilities import CAPABILITIES
from olmo_core.nn.attention.kernels import softmax as kernels
from olmo_core.nn.attention.kernels.softmax import Feature
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


def by_hand(layer: Any, **options: Any) -> KVCacheManager:
    """A cache that does not know the layer's window, or another one."""
    return KVCacheManager(2, 14, 2, 4, dtype=torch.float64, **options)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("of_cache", [-1, 4, 6, 40])
def test_the_window_that_counts_is_the_layers(window: int | None, of_cache: int) -> None:
    layer = LAYERS["attention"](window_size=window, dtype=torch.float64).eval()
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        layer.kv_cache_manager = by_hand(layer, window=of_cache)
        if window is None and 0 < of_cache < 14:
            for n in (1, 3):
                with pytest.raises(ValueError, match="see all keys, and this KV cache was built"):
                    layer(x[:, :n])
            return
        got = [layer(x[:, :5]), *(layer(x[:, t, None]) for t in range(5, 9)), layer(x[:, 9:])]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-12, rtol=1e-10)


def test_a_ring_that_is_too_short_for_the_window_and_its_rollback_raises() -> None:
    layer = LAYERS["attention"](window_size=5, dtype=torch.float64).eval()
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    layer.kv_cache_manager = by_hand(layer, window=3, max_rollback=2)  # 5 slots
    for n in (1, 3):
        with torch.no_grad(), pytest.raises(ValueError, match=r"see 5 keys.*window of 3"):
            layer(x[:, :n])
    assert layer.kv_cache_manager.host_seqlen == 0


def test_a_window_set_after_build_counts_with_a_cache_too() -> None:
    layer = LAYERS["attention"](window_size=6, dtype=torch.float64).eval()
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.init_kv_cache_manager(2, 14)
        layer.window_size = 2
        want = LAYERS["attention"](window_size=2, dtype=torch.float64)
        want.load_state_dict(layer.state_dict())
        got = [layer(x[:, :5]), *(layer(x[:, t, None]) for t in range(5, 14))]
        torch.testing.assert_close(torch.cat(got, 1), want.eval()(x), atol=1e-12, rtol=1e-10)
        for window in (7, None):
            layer.window_size = window
            layer.kv_cache_manager.reset()
            with pytest.raises(ValueError, match="was built for a window of 6"):
                layer(x[:, :1])


def test_a_cache_built_by_hand_must_fit() -> None:
    layer = LAYERS["attention"](dtype=torch.float64).eval()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    for heads, dim in ((1, 4), (2, 8)):
        layer.kv_cache_manager = KVCacheManager(2, 8, heads, dim, dtype=torch.float64)
        with torch.no_grad(), pytest.raises(ValueError, match=f"keys of {heads} heads x {dim}"):
            layer(x)
    for sizes in ((True, 8), (2, 1.0)):
        with pytest.raises(ValueError, match="room for a row"):
            KVCacheManager(*sizes, 2, 4)
    with pytest.raises(ValueError, match="positive number of keys, or -1, got 0"):
        KVCacheManager(2, 8, 2, 4, window=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cache_of_another_dtype_gives_the_layers(dtype: torch.dtype) -> None:
    layer = LAYERS["attention"]().eval()
    layer.kv_cache_manager = KVCacheManager(2, 8, 2, 4, dtype=dtype)
    x = torch.randn(2, 8, 16)
    with torch.no_grad():
        got = [layer(x[:, :5]), *(layer(x[:, t, None]) for t in range(5, 8))]
        layer.kv_cache_manager = None
        assert relative(torch.cat(got, 1), layer(x)) < 1e-2
    assert got[0].dtype == got[-1].dtype == torch.float32


class Spy:
    """The torch kernel, under another name's eyes."""

    name = "torch"

    def __init__(self, kernel: Any):
        self.kernel, self.dtypes = kernel, []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.dtypes.append({x.dtype for x in (q, k, v)})
        return self.kernel.forward(q, k, v, *args, **kwargs)


@pytest.mark.parametrize("of_cache", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_picks_a_kernel_for_what_it_is_handed(
    of_cache: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 kernel was chosen and given float32, which flash-attention refuses."""
    layer = LAYERS["attention"]().eval()
    x = torch.randn(2, 12, 16)
    asked: list[torch.dtype] = []
    spy = Spy(kernels.get_kernel("torch"))
    choose = sdpa.kernel_for

    def kernel_for(name: Any, device: str, dtype: torch.dtype, *args: Any) -> str:
        asked.append(dtype)
        return choose(name, device, dtype, *args)

    monkeypatch.setattr(sdpa, "kernel_for", kernel_for)
    monkeypatch.setitem(kernels._KERNELS, "torch", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        layer.kv_cache_manager = KVCacheManager(2, 12, 2, 4, dtype=of_cache)
        out = [layer(x[:, :5]), layer(x[:, 5:8]), *(layer(x[:, t, None]) for t in range(8, 12))]
    wide = torch.float64 if of_cache == torch.float64 else torch.bfloat16
    assert asked == [torch.bfloat16, wide, wide] and spy.dtypes == [{d} for d in asked]
    assert {y.dtype for y in out} == {torch.bfloat16}
    assert relative(torch.cat(out, 1).double(), want.double()) < 1e-2


def test_asking_for_the_problem_changes_nothing() -> None:
    cache = KVCacheManager(2, 12, 1, 4, window=3)
    k, v = torch.randn(2, 2, 4, 1, 4)
    for store in (False, True, False):
        before = [buffer.clone() for buffer in cache.buffers()]
        keys, _, segments = cache.problem(k, v, 3)
        assert keys.shape[1] == 2 * (2 + 4) and segments.window == 3
        assert all(torch.equal(a, b) for a, b in zip(before, cache.buffers()))
        if store:
            cache.append(k, v)
            cache.update_seqlen(4)
    assert cache.host_seqlen == cache.cache_seqlens == 4


@pytest.mark.parametrize("feature", ["kv_cache", "left_padding", "window"])
@pytest.mark.parametrize("n", [1, 3])
def test_what_the_row_lacks_is_refused(
    feature: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = CAPABILITIES["torch"]
    row = dataclasses.replace(row, missing={**row.missing, Feature(feature): "says the test"})
    for module in (sdpa, selection):
        monkeypatch.setattr(module, "CAPABILITIES", {**CAPABILITIES, "torch": row})
    monkeypatch.setattr(selection, "_CHOSEN", {})
    monkeypatch.setattr(sdpa, "_SERVED_STEPS", set())
    layer = LAYERS["attention"](backend="torch", window_size=8).eval()
    layer.backend.fallback = False
    layer.kv_cache_manager = KVCacheManager(1, 8, 2, 4, dtype=torch.float32)
    pad = torch.tensor([1], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"no {feature}: says the test"):
        layer(torch.randn(1, n, 16), cache_leftpad=pad)
    assert not layer.kv_cache_manager.k_cache.any()


def test_padding_of_a_backend_alone() -> None:
    alone = TorchAttentionBackend(head_dim=4, n_heads=2)
    q, k, v = (torch.randn(2, 7, 2, 4, dtype=torch.float64) for _ in range(3))
    cache = KVCacheManager(2, 7, 2, 4, dtype=torch.float64)
    pad = torch.tensor([0, 3], dtype=torch.int32)
    first = tuple(x[:, :4] for x in (q, k, v))
    out = [alone(first, kv_cache_manager=cache, cache_leftpad=pad)]
    out += [
        alone(tuple(x[:, t, None] for x in (q, k, v)), kv_cache_manager=cache) for t in range(4, 7)
    ]
    want = alone(tuple(x[1:, 3:] for x in (q, k, v)))
    assert relative(torch.cat(out, 1)[1:, 3:], want) < 1e-12
    with pytest.raises(ValueError, match="with a KV cache alone"):
        alone((q, k, v), cache_leftpad=pad)
    with pytest.raises(ValueError, match="first tokens after a reset"):
        alone(first, kv_cache_manager=cache, cache_leftpad=pad)


def test_memory_that_can_not_be_had_leaves_the_old() -> None:
    cache = KVCacheManager(2, 8, 2, 4, dtype=torch.float32)
    cache.append(*torch.ones(2, 2, 3, 2, 4))
    cache.update_seqlen(3)
    with pytest.raises(ValueError, match="room for a row"):
        cache.reallocate(0, 8)
    assert cache.host_seqlen == cache.cache_seqlens == 3 and cache.k_cache[:, :3].all()
    cache.reset(3, 9)
    assert cache.host_seqlen == cache.cache_seqlens == cache.restorable == 0
    assert cache.slots == 9 and not cache.is_ring
    with pytest.raises(RuntimeError, match="0 of at most 9"):
        cache.update_seqlen(10)
