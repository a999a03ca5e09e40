"""Decoding with a gated delta net: cached = full, left padding, rollback, reset, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet
from olmo_core.nn.attention.gated_delta_net.cache import RecurrentCache, replay
from olmo_core.nn.attention.kernels.triton_driver import triton_refusal

D_MODEL = 16
TOKENS = 50


def build(dtype: torch.dtype = torch.float64, **options: object) -> GatedDeltaNet:
    torch.manual_seed(0)
    options = {"n_heads": 2, "n_v_heads": 4, "head_dim": 4, "conv_bias": True, **options}
    layer = GatedDeltaNet(d_model=D_MODEL, dtype=dtype, **options)
    with torch.no_grad():
        layer.A_log.sub_(2)
    return layer.requires_grad_(False)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, D_MODEL, dtype=torch.float64)


def cache_of(layer: GatedDeltaNet) -> RecurrentCache:
    assert layer.kv_cache_manager is not None
    return layer.kv_cache_manager


@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    max_rollback=st.integers(0, 4),
    conv_size=st.integers(1, 4),
)
def test_cached_equals_full(chunks: list[int], max_rollback: int, conv_size: int) -> None:
    layer = build(conv_size=conv_size)
    chunks = [*chunks, 1, 1]
    x = torch.randn(2, sum(chunks), D_MODEL, dtype=torch.float64)
    want = layer(x)
    layer.init_kv_cache_manager(2, x.shape[1], max_rollback=max_rollback)
    got = torch.cat([layer(piece) for piece in x.split(chunks, 1)], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert cache_of(layer).current_position().item() == x.shape[1]


@pytest.mark.parametrize("max_rollback", [0, 3])
def test_left_padding(max_rollback: int) -> None:
    """Padding may end inside the first chunk or in a later one, or fill a row."""
    layer = build()
    x = tokens(3)
    leftpad = torch.tensor([0, 5, 13], dtype=torch.int32)
    layer.init_kv_cache_manager(3, TOKENS, max_rollback=max_rollback)
    first = layer(x[:, :10], cache_leftpad=leftpad)
    rest = [layer(x[:, 10:20]), *(layer(x[:, t : t + 1]) for t in range(20, TOKENS))]
    got = torch.cat([first, *rest], 1)
    layer.kv_cache_manager = None
    for row, pad in enumerate(leftpad.tolist()):
        want = layer(x[row : row + 1, pad:])[0]
        torch.testing.assert_close(got[row, pad:], want, rtol=0, atol=1e-12)
        assert not got[row, :pad].any()


@given(
    prompt=st.integers(1, 12),
    drafts=st.lists(
        st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=8
    ),
    one_by_one=st.booleans(),
)
def test_rollback(prompt: int, drafts: list[tuple[int, int]], one_by_one: bool) -> None:
    """Speculative decoding: drafts of which the last are rejected and replaced."""
    layer = build()
    x = tokens()
    want = layer(x)
    layer.init_kv_cache_manager(2, TOKENS + 10, max_rollback=5)
    cache = cache_of(layer)
    layer(x[:, :prompt])
    position = prompt
    for drafted, rejected in drafts:
        accepted = drafted - rejected
        draft = x[:, position : position + drafted].clone()
        draft[:, accepted:] = torch.randn_like(draft[:, accepted:])
        pieces = draft.split(1, 1) if one_by_one else [draft]
        got = torch.cat([layer(piece) for piece in pieces], 1)
        cache.rollback(rejected)
        kept = want[:, position : position + accepted]
        torch.testing.assert_close(got[:, :accepted], kept, rtol=0, atol=1e-12)
        position += accepted
        assert cache.current_position().item() == cache.host_seqlen == position
    got = layer(x[:, position : position + 1])
    torch.testing.assert_close(got, want[:, position : position + 1], rtol=0, atol=1e-12)


def test_rollback_in_several_goes_and_to_the_start() -> None:
    layer = build()
    x = tokens()
    want = layer(x)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=6)
    cache = cache_of(layer)
    layer(x[:, :4])
    cache.rollback(1)
    cache.rollback(0)
    cache.rollback(3)
    assert not any(buffer.any() for buffer in cache.buffers())
    torch.testing.assert_close(layer(x[:, :30]), want[:, :30], rtol=0, atol=1e-12)
    cache.rollback(2)
    cache.rollback(4)
    with pytest.raises(ValueError, match="can now restore 0"):
        cache.rollback(1)
    torch.testing.assert_close(layer(x[:, 24:]), want[:, 24:], rtol=0, atol=1e-12)


def test_rollback_with_strong_gates() -> None:
    """The state is rebuilt from sums of g that are never subtracted from each other."""
    layer = build(torch.float32)
    layer.A_log += 8
    x = tokens().float()
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=8)
    layer(x[:, :20])
    state = cache_of(layer).state.clone()
    layer(torch.randn(2, 8, D_MODEL))
    cache_of(layer).rollback(8)
    torch.testing.assert_close(cache_of(layer).state, state, rtol=1e-5, atol=1e-7)


def test_memory_does_not_grow_with_drafts_or_length() -> None:
    """One state, one base state, and k, U, g for each token that may be forgotten."""
    layer = build()
    layer.init_kv_cache_manager(2, 10**6, max_rollback=5)
    state = 2 * 4 * 4 * 8
    recent = 2 * 5 * (2 * 4 + 4 * 8 + 4)
    convolutions = 2 * (3 + 5) * (8 + 8 + 32)
    counters = 2 + 1
    sizes = sum(b.numel() for b in cache_of(layer).buffers())
    assert sizes == 2 * state + recent + convolutions + counters
    assert not any("cache" in name for name in layer.state_dict())


def test_reset() -> None:
    layer = build()
    x = tokens()
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=3)
    pad = torch.tensor([4, 0], dtype=torch.int32)
    first = layer(x, cache_leftpad=pad)
    cache_of(layer).reset()
    assert not cache_of(layer).has_leftpad
    second = layer(x)
    cache_of(layer).reset()
    assert torch.equal(layer(x, cache_leftpad=pad), first)
    layer.kv_cache_manager = None
    torch.testing.assert_close(second, layer(x), rtol=0, atol=1e-12)


def test_a_cache_made_in_inference_mode_serves_outside() -> None:
    layer = build()
    x = tokens()
    with torch.inference_mode():
        layer.init_kv_cache_manager(2, TOKENS, max_rollback=2)
        layer(x[:, :5])
    torch.testing.assert_close(layer(x[:, 5:9]), _uncached(layer, x)[:, 5:9], rtol=0, atol=1e-12)


def _uncached(layer: GatedDeltaNet, x: Tensor) -> Tensor:
    cache, layer.kv_cache_manager = layer.kv_cache_manager, None
    out = layer(x)
    layer.kv_cache_manager = cache
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    layer = build(torch.float32 if dtype == torch.bfloat16 else dtype)
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = layer(x)
        layer.init_kv_cache_manager(2, TOKENS, max_rollback=3)
        got = torch.cat([layer(piece) for piece in x.split([30, 5, *[1] * 15], 1)], 1)
    assert got.dtype == dtype and cache_of(layer).state.dtype == torch.float32
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("max_rollback", [0, 2])
def test_a_compiled_step_neither_breaks_nor_recompiles(max_rollback: int) -> None:
    layer = build()
    x = tokens()
    want = layer(x)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=max_rollback)
    layer(x[:, :10])
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(layer, fullgraph=True, backend=backend)
    outs = []
    for t in range(10, TOKENS):
        cache_of(layer).reserve(1)
        outs.append(step(x[:, t : t + 1]))
    torch.testing.assert_close(torch.cat(outs, 1), want[:, 10:], rtol=0, atol=1e-12)
    assert len(graphs) == 1


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
needs_kernels = pytest.mark.skipif(
    (reason := triton_refusal(torch.empty(1, device=DEVICE))) is not None, reason=str(reason)
)


class Launches(list[str]):
    """The names of the kernels that are launched for tokens, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from olmo_core.nn.attention.kernels.convolution import triton_walk
        from olmo_core.nn.attention.kernels.gated_delta_rule import triton_step, triton_token
        from olmo_core.nn.attention.kernels.gates import triton_gates

        def launched(kernel: Any, grid: tuple[int, ...]) -> Any:
            self.append(kernel.fn.__name__)
            return kernel[grid]

        for module in (triton_walk, triton_step, triton_token, triton_gates):
            monkeypatch.setattr(module, "launch", launched)


@needs_kernels
@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("dtype", "conv_size", "conv_bias"),
    [(torch.float32, 4, True), (LOW, 2, False), (LOW, 1, False)],
)
def test_a_token_takes_three_launches(
    dtype: torch.dtype, conv_size: int, conv_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached = full, with left padding that ends after the prompt, and the state as it would be."""
    layer = build(dtype, conv_size=conv_size, conv_bias=conv_bias, head_dim=12).to(DEVICE)
    for conv in layer._convolutions:  # with a bias, padding would write to the state
        if conv.bias is not None:
            conv.bias.normal_()
    x = torch.randn(2, 16, D_MODEL, device=DEVICE, dtype=dtype)
    leftpad = torch.tensor([0, 13], dtype=torch.int32, device=DEVICE)
    layer.init_kv_cache_manager(2, 16)
    outs = [layer(x[:, :12], cache_leftpad=leftpad)]
    launches = Launches(monkeypatch)
    for t in range(12, 16):
        launches.clear()
        outs.append(layer(x[:, t : t + 1]))
        assert launches == ["_convolve_token", "_step", "_norm_forward"]
    got, state = torch.cat(outs, 1), cache_of(layer).state.clone()
    history = cache_of(layer).conv_inputs.clone()
    layer.kv_cache_manager, layer = None, layer.double()
    bound = 4 * torch.finfo(dtype).eps
    for row, pad in enumerate(leftpad.tolist()):
        assert not got[row, :pad].any()
        want = layer(x[row : row + 1, pad:].double())[0]
        error = (got[row, pad:].double() - want).norm() / want.norm()
        assert error <= bound
    layer.init_kv_cache_manager(2, 16)
    layer(x.double(), cache_leftpad=leftpad)
    for mine, true in ((state, cache_of(layer).state), (history, cache_of(layer).conv_inputs)):
        assert (mine.double() - true).norm() <= bound * true.norm()


@needs_kernels
@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_what_the_tokens_kernels_leave_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(torch.float32).to(DEVICE)
    x = torch.randn(2, 3, D_MODEL, device=DEVICE)
    want = layer(x)

    def check() -> None:
        launches = Launches(monkeypatch)
        outs = [layer(x[:, t : t + 1]) for t in range(3)]
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-5, atol=1e-5)
        assert "_convolve_token" not in launches

    layer.init_kv_cache_manager(2, 8, max_rollback=1)
    check()
    layer.init_kv_cache_manager(2, 8)
    seen: list[Tensor] = []
    with layer.q_conv1d.register_forward_hook(lambda module, args, out: seen.append(out)):
        check()
    assert len(seen) == 3
    layer.init_kv_cache_manager(2, 8)
    cache_of(layer).state = cache_of(layer).state[:, :, :2]
    with pytest.raises(ValueError, match="cache was built for a state"):
        layer(x[:, :1])


def test_replay_is_the_recurrence() -> None:
    state = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    keys, updates = torch.randn(2, 7, 2, 3).double(), torch.randn(2, 7, 4, 5).double()
    g = -torch.rand(2, 7, 4, dtype=torch.float64)
    want = state
    for t in range(7):
        write = keys[:, t].repeat_interleave(2, 1).unsqueeze(-1) * updates[:, t].unsqueeze(-2)
        want = g[:, t].exp()[..., None, None] * want + write
    torch.testing.assert_close(replay(state, keys, updates, g), want, rtol=0, atol=1e-13)


def test_refusals() -> None:
    layer = build()
    x = tokens()
    pad = torch.tensor([1, 0], dtype=torch.int32)
    for sizes in ((0, 8), (2, 0)):
        with pytest.raises(ValueError, match="room for a row and a token"):
            layer.init_kv_cache_manager(*sizes)
    with pytest.raises(ValueError, match="must not be negative"):
        layer.init_kv_cache_manager(2, 8, max_rollback=-1)
    layer.init_kv_cache_manager(2, 8, max_rollback=2)
    with pytest.raises(ValueError, match="cu_doc_lens"):
        layer(x[:, :4], torch.tensor([0, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="batch of 2, got 1"):
        layer(x[:1, :4])
    with pytest.raises(RuntimeError, match="holds 0 of at most 8 tokens a row, and 9 more"):
        layer(x[:, :9])
    with pytest.raises(ValueError, match="Can't forget 1 of 0"):
        cache_of(layer).rollback(1)
    with pytest.raises(ValueError, match=r"must be in \[0, 8\]"):
        layer(x[:, :4], cache_leftpad=9 * pad)
    assert not any(buffer.any() for buffer in cache_of(layer).buffers())
    layer(x[:, :7])
    with pytest.raises(ValueError, match="already holds 7"):
        layer(x[:, :1], cache_leftpad=pad)
    with pytest.raises(ValueError, match="Raise max_rollback"):
        cache_of(layer).rollback(3)
    with pytest.raises(ValueError, match="Can't forget -1"):
        cache_of(layer).rollback(-1)
    with pytest.raises(RuntimeError, match="holds 7 of at most 8"):
        layer(x[:, :2])
    layer(x[:, 7:8])


def test_gradients_are_refused_rather_than_cut() -> None:
    """The cache stores no graph: a gradient through it would be wrong without a word."""
    layer = GatedDeltaNet(d_model=16, n_heads=2)
    layer.init_kv_cache_manager(1, 8)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(torch.randn(1, 3, 16, requires_grad=True))
    assert layer.kv_cache_manager is not None and layer.kv_cache_manager.host_seqlen == 0


@pytest.mark.parametrize("max_rollback", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_stay_float32_where_the_layer_does_not(
    dtype: torch.dtype, max_rollback: int
) -> None:
    """Rounded, the state would lose what a layer of that dtype keeps from its start."""
    layer = build(torch.float32)
    x = tokens().float()
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=max_rollback)
    layer(x[:, :30])
    cache = cache_of(layer)
    before = {name: buffer.clone() for name, buffer in cache.named_buffers()}
    layer.to(dtype)
    for name, buffer in cache.named_buffers():
        if name == "conv_inputs":
            assert buffer.dtype == dtype
        else:
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    got = torch.cat([layer(piece) for piece in x[:, 30:].to(dtype).split([5, *[1] * 15], 1)], 1)
    cache.rollback(max_rollback)
    if max_rollback:
        got = torch.cat([got[:, :-3], layer(x[:, -3:].to(dtype))], 1)
    want = _uncached(build(torch.float32).to(dtype).double(), x.double())[:, 30:]
    plain = _uncached(build(torch.float32).to(dtype), x.to(dtype))[:, 30:]
    error, bound = ((y.double() - want).norm() / want.norm() for y in (got, plain))
    assert error < 1.5 * bound
    layer.double()
    assert cache.state.dtype == cache.conv_inputs.dtype == torch.float64


def test_a_cache_built_by_hand_must_fit() -> None:
    layer = build()
    for sizes in ({"n_v_heads": 2}, {"head_v_dim": 4}):
        sizes = {
            "conv_channels": 48, "conv_size": 4, "n_heads": 2, "n_v_heads": 4, "head_k_dim": 4,
            "head_v_dim": 8, **sizes,
        }  # fmt: skip
        layer.kv_cache_manager = RecurrentCache(2, 8, dtype=torch.float64, **sizes)
        with pytest.raises(ValueError, match="built for a state"):
            layer(tokens()[:, :1])
        assert cache_of(layer).host_seqlen == 0
