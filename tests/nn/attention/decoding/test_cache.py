"""What every decoding cache promises: a call is stored wholly or not at all, and only in eval."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from nn.attention.test_attention import LAYERS
from olmo_core.nn.attention import GatedDeltaNet, SequenceMixer

TOKENS = 14
Sizes = dict[str, int]


def make(kind: str, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    """``kind`` is a mixer, or one with a window."""
    torch.manual_seed(1)
    if kind == "gated_delta_net":
        layer: SequenceMixer = GatedDeltaNet(
            d_model=16, n_heads=2, n_v_heads=4, head_dim=4, dtype=dtype
        )
    else:
        window = 4 if kind.endswith("window") else None
        layer = LAYERS[kind.removesuffix(" window")](window_size=window, dtype=dtype)
    return layer.requires_grad_(False).eval()


KINDS = ["attention", "attention window", "fused window", "gated_delta_net"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, 16, dtype=torch.float64)


def counts(layer: SequenceMixer) -> tuple[Any, ...]:
    cache = layer.kv_cache_manager
    assert cache is not None
    assert cache.host_seqlen == cache.cache_seqlens.item()
    return cache.host_seqlen, cache.restorable, cache.has_leftpad, cache.cache_leftpad.tolist()


class Fails(TorchDispatchMode):
    """The ``at``-th operation that allocates memory finds none."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable and not func.is_view:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("no memory, says the test")
        return func(*args, **(kwargs or {}))


@each_kind
@pytest.mark.parametrize("max_rollback", [0, 3])
@pytest.mark.parametrize("leftpad", [None, (3, 0)])
def test_a_call_that_fails_has_stored_all_or_nothing(
    kind: str, max_rollback: int, leftpad: tuple[int, ...] | None
) -> None:
    """Out of memory at every operation in turn, the same call again after each.

    Where it comes after the tokens are stored, in ``w_out``, the call is not made again.
    """
    layer, x = make(kind), tokens()
    pad = None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32)
    want = layer(x, cache_leftpad=pad)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=max_rollback)
    at = 0
    for n in (6, 1, 1, 4, 1):
        first = {} if at else {"cache_leftpad": pad}
        before, failures = counts(layer), 0
        while counts(layer) == before:
            with pytest.raises(torch.OutOfMemoryError), Fails(failures):
                layer(x[:, at : at + n], **first)
            failures += 1
        assert failures > 15
        at += n
        assert counts(layer)[0] == at
        assert counts(layer)[2:] == (pad is not None, [0, 0] if pad is None else pad.tolist())
    torch.testing.assert_close(layer(x[:, at:]), want[:, at:], atol=1e-12, rtol=1e-10)


@each_kind
def test_padding_of_a_prefill_that_was_refused_or_forgotten_is_not_kept(kind: str) -> None:
    layer, x = make(kind), tokens()
    want = layer(x)
    pad = torch.tensor([3, 0], dtype=torch.int32)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=5)
    cache = layer.kv_cache_manager
    assert cache is not None
    with pytest.raises(RuntimeError, match="15 more came"):
        layer(torch.cat([x, x[:, :1]], 1), cache_leftpad=pad)
    with pytest.raises(torch.OutOfMemoryError), Fails(30):
        layer(x, cache_leftpad=pad)
    assert not cache.has_leftpad and not cache.cache_leftpad.any()
    layer(x[:, :4], cache_leftpad=pad)
    cache.rollback(4)
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=1e-10)


@each_kind
def test_padding_that_was_forgotten_in_part_still_counts(kind: str) -> None:
    layer, x = make(kind), tokens()
    pad = torch.tensor([3, 0], dtype=torch.int32)
    want = layer(x, cache_leftpad=pad)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=5)
    cache = layer.kv_cache_manager
    assert cache is not None
    layer(x[:, :5].flip(1), cache_leftpad=pad)
    cache.rollback(5)
    layer(x[:, :5], cache_leftpad=pad)
    cache.rollback(3)
    got = layer(x[:, 2:])
    torch.testing.assert_close(got, want[:, 2:], atol=1e-12, rtol=1e-10)


@given(
    kind=st.sampled_from(KINDS),
    max_rollback=st.integers(0, 4),
    moves=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=10),
)
def test_rollbacks_are_right_or_refused(
    kind: str, max_rollback: int, moves: list[tuple[int, int]]
) -> None:
    """Several in a row too: a ring has overwritten what lies further back."""
    layer = make(kind)
    layer.init_kv_cache_manager(1, 60, max_rollback=max_rollback)
    cache = layer.kv_cache_manager
    assert cache is not None
    kept, most = torch.zeros(1, 0, 16, dtype=torch.float64), 0
    for stored, forgotten in moves:
        new = torch.randn(1, stored, 16, dtype=torch.float64)
        got, kept = layer(new), torch.cat([kept, new], 1)
        layer.kv_cache_manager = None
        want = layer(kept)[:, -stored:]
        layer.kv_cache_manager = cache
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
        most = min(max_rollback, most + stored)
        if kind == "attention":
            most = kept.shape[1]
        for _ in range(2):
            if forgotten > most:
                with pytest.raises(ValueError, match="Can't forget"):
                    cache.rollback(forgotten)
            else:
                cache.rollback(forgotten)
                kept, most = kept[:, : kept.shape[1] - forgotten], most - forgotten
    assert cache.host_seqlen == cache.cache_seqlens == kept.shape[1]


@each_kind
def test_any_wish_for_a_gradient_raises(kind: str) -> None:
    """Also where ``w_out``, or the input, wants none."""
    layer, x = make(kind), tokens()
    layer.init_kv_cache_manager(2, 30)
    for leaf in (*layer.parameters(), x):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match="for inference"):
            layer(x[:, :1])
        with torch.no_grad():
            layer(x[:, :1])
        leaf.requires_grad_(False)
    assert counts(layer)[0] == len(list(layer.parameters())) + 1
    layer(x[:, :1])


@each_kind
def test_transforms_are_refused(kind: str) -> None:
    layer, x = make(kind), tokens()
    layer.init_kv_cache_manager(2, TOKENS)
    for call in (
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.func.vmap(layer)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=r"torch.func's transforms"):
            call()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        layer(forward_ad.make_dual(x, x))
    assert counts(layer)[0] == 0


@each_kind
def test_copies_are_apart_and_go_on_alone(kind: str) -> None:
    layer, x = make(kind), tokens()
    want = layer(x)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=2)
    layer(x[:, :6])
    other = copy.deepcopy(layer)
    layer(x[:, 6:].flip(1))
    torch.testing.assert_close(other(x[:, 6:]), want[:, 6:], atol=1e-12, rtol=1e-10)
    assert not [name for name in layer.state_dict() if "cache" in name]
    layer.load_state_dict(make(kind).state_dict())


@each_kind
def test_reset_starts_anew(kind: str) -> None:
    layer, x = make(kind), tokens()
    want = layer(x)
    layer.init_kv_cache_manager(2, TOKENS, max_rollback=2)
    cache = layer.kv_cache_manager
    assert cache is not None
    layer(x[:, :6], cache_leftpad=torch.tensor([2, 0], dtype=torch.int32))
    cache.reset()
    assert counts(layer) == (0, 0, False, [0, 0])
    with pytest.raises(ValueError, match="forget 1 of 0"):
        cache.rollback(1)
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=1e-10)


@each_kind
def test_moves_in_inference_mode_and_through_meta(kind: str) -> None:
    layer, x = make(kind), tokens()
    layer.init_kv_cache_manager(2, TOKENS)
    cache = layer.kv_cache_manager
    assert cache is not None
    layer(x[:, :3])
    with torch.inference_mode():
        cache.double()
        cache.float()
    assert not any(buffer.is_inference() for buffer in cache.buffers())
    cache.to("meta").to_empty(device="cpu")
    assert counts(layer) == (0, 0, False, [0, 0])
    assert not any(buffer.any() for buffer in cache.buffers())


@each_kind
def test_padding_is_checked_when_it_is_recorded_by_hand(kind: str) -> None:
    layer, x = make(kind), tokens()
    pad = torch.tensor([2, 0], dtype=torch.int32)
    want = layer(x, cache_leftpad=pad)
    layer.init_kv_cache_manager(2, TOKENS)
    cache = layer.kv_cache_manager
    assert cache is not None
    for wrong in (pad[:1], pad[0], pad + TOKENS):
        with pytest.raises(ValueError, match="cache_leftpad must"):
            cache.record_leftpad(wrong)
    with pytest.raises(TypeError, match="int32"):
        cache.record_leftpad(pad.double())
    cache.record_leftpad(pad)
    torch.testing.assert_close(layer(x[:, :5]), want[:, :5], atol=1e-12, rtol=1e-10)
    with pytest.raises(ValueError, match="first tokens after a reset"):
        cache.record_leftpad(pad)


@pytest.mark.parametrize("kind", ["attention window", "gated_delta_net"])
def test_a_compiled_call_refuses_late_padding(kind: str) -> None:
    layer, x = make(kind), tokens()
    pad = torch.tensor([2, 0], dtype=torch.int32)
    layer.init_kv_cache_manager(2, TOKENS)
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer(x[:, :2])
    with pytest.raises(RuntimeError, match="first tokens after a reset"):
        step(x[:, 2:4], cache_leftpad=pad)
