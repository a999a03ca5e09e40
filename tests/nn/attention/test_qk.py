"""The layer's modules and the kernel in their place give the same.

The kernel runs on a GPU, or on a CPU under ``TRITON_INTERPRET=1`` where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from olmo_core.nn.attention import Attention, AttentionConfig, FusedAttention, qk
from olmo_core.nn.attention.kernels.rope_qk_norm import unsupported
from olmo_core.nn.attention.qk import normalize_and_rotate, rotate_packed
from olmo_core.nn.layer_norm import LayerNorm, LayerNormConfig, LayerNormType, RMSNorm
from olmo_core.nn.rope import (
    FusedRotaryEmbedding,
    RoPEConfig,
    RoPEType,
    RotaryEmbedding,
    YaRNRoPEScalingConfig,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unsupported(*(torch.empty(1, 1, 1, 2, device=DEVICE),) * 2)
DIM = 16
ROPES = {
    "plain": RoPEConfig(),
    "partial": RoPEConfig(partial_rotary_factor=0.5),
    "yarn": RoPEConfig(scaling=YaRNRoPEScalingConfig()),
}


def kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs them."""
    for mark in (
        pytest.mark.triton,
        pytest.mark.skipif(REASON is not None, reason=str(REASON)),
        pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    ):
        test = mark(test)
    return test


def modules(rope: RoPEConfig | None, norm: str | None, per_head: bool) -> dict[str, Any]:
    norms: list[Any] = [None, None]
    if norm is not None:
        config = LayerNormConfig(name=LayerNormType(norm), bias=False)
        norms = [config.build(DIM if per_head else h * DIM, init_device=DEVICE) for h in (4, 2)]
        for n in norms:
            if n.weight is not None:
                nn.init.normal_(n.weight)
    built = None if rope is None else rope.build(DIM)
    return {"q_norm": norms[0], "k_norm": norms[1], "per_head": per_head, "rope": built}


def queries_and_keys(tokens: int = 5) -> list[Tensor]:
    return [torch.randn(2, tokens, h, DIM, device=DEVICE).requires_grad_() for h in (4, 2)]


def by_modules(
    q: Tensor, k: Tensor, m: dict[str, Any], scales: Any, where: dict[str, Any]
) -> tuple[Tensor, ...]:
    if m["q_norm"] is not None and m["per_head"]:
        q, k = m["q_norm"](q), m["k_norm"](k)
    elif m["q_norm"] is not None:
        q, k = (m[n](x.flatten(2)).view(x.shape) for n, x in (("q_norm", q), ("k_norm", k)))
    if scales is not None:
        q, k = (x * s.view(x.shape[2:]) for x, s in zip((q, k), scales, strict=True))
    return (q, k) if m["rope"] is None else m["rope"](q, k, head_first=False, **where)


@contextmanager
def ops_recorded() -> Iterator[list[str]]:
    """The names of the ops that were called."""
    called: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        f = getattr(qk, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return f(*args, **kwargs)

        return record

    ops = {name: recorded(name) for name in ("qk_norm_rope", "rope_only")}
    with mock.patch.multiple(qk, **ops):
        yield called


@pytest.fixture
def fused_calls() -> Iterator[list[str]]:
    with ops_recorded() as called:
        yield called


@kernels
@settings(max_examples=16, phases=[Phase.explicit, Phase.generate])
@given(
    rope=st.sampled_from([None, *ROPES]),
    norm=st.sampled_from([None, "rms", "fused_rms"]),
    per_head=st.booleans(),
    scaled=st.booleans(),
    where=st.sampled_from(["none", "documents", "shard"]),
    seed=st.integers(0, 99),
)
def test_kernel_and_modules_agree(
    rope: str | None, norm: str | None, per_head: bool, scaled: bool, where: str, seed: int
) -> None:
    assume(rope is not None or (norm is not None and where == "none"))
    assume(not (scaled and per_head))
    torch.manual_seed(seed)
    m = modules(None if rope is None else ROPES[rope], norm, per_head)
    leaves = queries_and_keys() + [n.weight for n in (m["q_norm"], m["k_norm"]) if n is not None]
    scales = None
    if scaled:
        scales = [torch.randn(h * DIM, device=DEVICE, requires_grad=True) for h in (4, 2)]
        leaves += scales
    keywords: dict[str, Any] = {}
    if where == "documents":
        keywords = {"positions": torch.randint(40, (2, 5), device=DEVICE), "max_position": 40}
    if where == "shard":
        buffers = m["rope"].get_buffers(30, DEVICE)
        keywords = {"pos_sin": buffers.pos_sin[5:10], "pos_cos": buffers.pos_cos[5:10]}
    with ops_recorded() as called:
        got = normalize_and_rotate(leaves[0], leaves[1], **m, scales=scales, **keywords)
    assert len(called) == 1
    want = by_modules(leaves[0], leaves[1], m, scales, keywords)
    dout = [torch.randn_like(x) for x in want]
    got_all = [*got, *torch.autograd.grad(got, leaves, dout)]
    want_all = [*want, *torch.autograd.grad(want, leaves, dout)]
    for a, b in zip(got_all, want_all, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@kernels
@pytest.mark.parametrize("where", ["none", "documents"])
def test_packed_kernel_and_module_agree(where: str, fused_calls: list[str]) -> None:
    qkv = torch.randn(2, 5, 3, 2, DIM, device=DEVICE, requires_grad=True)
    rope = FusedRotaryEmbedding(head_size=DIM)
    keywords: dict[str, Any] = {}
    if where == "documents":
        keywords = {"positions": torch.randint(40, (2, 5), device=DEVICE), "max_position": 40}
    got = torch.stack(rotate_packed(qkv, rope, **keywords), 2)
    assert fused_calls == ["rope_only"]
    want = rope(qkv, **keywords)
    torch.testing.assert_close(got, want)
    dx, want_dx = (torch.autograd.grad(y.square().sum(), qkv)[0] for y in (got, want))
    torch.testing.assert_close(dx, want_dx)


@kernels
def test_what_the_kernel_lacks_is_left_to_the_modules(fused_calls: list[str]) -> None:
    q, k = queries_and_keys()
    m = modules(ROPES["plain"], "rms", False)
    float64 = [x.double() for x in (q, k)]
    normalize_and_rotate(*float64, **m)
    for norm in ("default", "qwen_rms"):
        normalize_and_rotate(q, k, **modules(None, norm, False))
    for config in (RoPEConfig(name=RoPEType.complex), RoPEConfig(full_precision=False)):
        normalize_and_rotate(q, k, **modules(config, "rms", False))
    other = modules(ROPES["plain"], "rms", False)
    other["k_norm"].eps = 0.1
    normalize_and_rotate(q, k, **other)
    assert fused_calls == []
    for length in (4, 6):  # a shard's buffers have a row for each of its tokens
        buffers = torch.ones(length, DIM, device=DEVICE)
        with pytest.raises(ValueError, match="for each of the input's 5 positions"):
            normalize_and_rotate(q, k, **m, pos_sin=buffers, pos_cos=buffers)
    normalize_and_rotate(q, k, **m)
    assert fused_calls == ["qk_norm_rope"]


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
    "global forward": lambda m, f: nn.modules.module.register_module_forward_hook(f),
    "global forward pre": lambda m, f: nn.modules.module.register_module_forward_pre_hook(f),
    "global backward": lambda m, f: nn.modules.module.register_module_full_backward_hook(f),
    "global backward pre": lambda m, f: nn.modules.module.register_module_full_backward_pre_hook(f),
}


@kernels
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of the backend
@pytest.mark.parametrize(
    ("kind", "which"),
    [
        *((kind, "q_norm") for kind in HOOKS),
        *(("backward", which) for which in ("k_norm", "rope", "packed rope")),
    ],
)
def test_every_hook_fires(kind: str, which: str) -> None:
    layer: Attention | FusedAttention
    if which == "packed rope":
        rope = RoPEConfig(name=RoPEType.fused)
        layer = FusedAttention(d_model=32, n_heads=2, rope=rope, init_device=DEVICE)
        module: Any = layer.rope
    else:
        norm = LayerNormConfig(name=LayerNormType.rms, bias=False)
        layer = Attention(
            d_model=32, n_heads=2, rope=RoPEConfig(), qk_norm=norm, init_device=DEVICE
        )
        module = getattr(layer, which)
    x = torch.randn(1, 4, 32, device=DEVICE, requires_grad=True)
    want = layer(x)
    (want_dx,) = torch.autograd.grad(want.square().sum(), x)
    seen = []
    handle = HOOKS[kind](module, lambda m, *_: seen.append(m))
    try:
        got = layer(x)
        (dx,) = torch.autograd.grad(got.square().sum(), x)
    finally:
        handle.remove()
    assert module in seen
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(dx, want_dx)


@kernels
def test_a_forward_of_its_own_is_called() -> None:
    q, k = queries_and_keys()
    m = modules(ROPES["plain"], "rms", False)
    m["q_norm"].forward = lambda x: torch.zeros_like(x)
    assert not normalize_and_rotate(q, k, **m)[0].any()


@kernels
def test_the_kernel_compiles_in_a_layer(fused_calls: list[str]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    m = modules(ROPES["plain"], "rms", True)
    q, k = queries_and_keys()
    counter = CompileCounterWithBackend("aot_eager")
    got = torch.compile(lambda q, k: normalize_and_rotate(q, k, **m), backend=counter,
                        fullgraph=True)(q, k)  # fmt: skip
    assert counter.frame_count == 1 and "qk_norm_rope" in counter.graphs[0].code
    torch.testing.assert_close(got, normalize_and_rotate(q, k, **m))
    torch._dynamo.reset()


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("rope", "scaled", "double"),
    [(None, True, True), ("plain", False, False), ("complex", True, False), ("yarn", True, True)],
)
def test_a_width_that_ranks_share(rope: str | None, scaled: bool, double: bool) -> None:
    """Half of the heads on each of two ranks, the statistic summed between the two phases."""
    dtype = torch.float64 if double else torch.float32
    config = RoPEConfig(name=RoPEType(rope)) if rope == "complex" else ROPES.get(rope or "")
    m = modules(config, "rms", False)
    for norm in (m["q_norm"], m["k_norm"]):
        norm.to(dtype)
    q, k = (x.detach().to(dtype).requires_grad_() for x in queries_and_keys())
    scales = None
    if scaled:
        scales = [torch.randn(h * DIM, device=DEVICE, dtype=dtype) for h in (4, 2)]
    whole = normalize_and_rotate(q, k, **m, scales=scales)
    dout = [torch.randn_like(x) for x in whole]
    weights = [m["q_norm"].weight, m["k_norm"].weight]
    want = [*whole, *torch.autograd.grad(whole, [q, k, *weights], dout)]

    statistics: list[Tensor] = []

    def run(rank: int, share: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        half, norms = slice(rank, None, 2), []
        for norm in (m["q_norm"], m["k_norm"]):
            shard = RMSNorm(size=norm.size, bias=False, init_device="meta")
            del shard.weight
            part = norm.weight.view(-1, DIM)[half].flatten()
            shard.weight = part  # its gradient reaches the whole weight
            norms.append(shard)
        parts = None if scales is None else [s.view(-1, DIM)[half].flatten() for s in scales]
        return normalize_and_rotate(
            q[:, :, half], k[:, :, half], q_norm=norms[0], k_norm=norms[1], rope=m["rope"],
            scales=parts, share=share,
        )  # fmt: skip

    for rank in range(2):
        run(rank, lambda s: statistics.append(s) or s)  # type: ignore[func-returns-value]
    total = statistics[0] + statistics[1]
    assert total.shape == (2, 5, 2)
    halves = [run(rank, lambda s: total) for rank in range(2)]
    got = [torch.stack(pair, 3).flatten(2, 3) for pair in zip(*halves, strict=True)]
    got += torch.autograd.grad(got, [q, k, *weights], dout)
    tolerance = 1e-11 if double else 2e-5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_norms_of_single_heads_share_nothing() -> None:
    q, k = queries_and_keys()
    per_head = modules(None, "default", True)
    got = normalize_and_rotate(q, k, **per_head, share=lambda s: s)  # nothing to share
    torch.testing.assert_close(got, normalize_and_rotate(q, k, **per_head))


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_of_packed_rope_fire_on_a_cpu_too(kind: str) -> None:
    rope = RoPEConfig(name=RoPEType.fused)
    layer = FusedAttention(d_model=32, n_heads=2, rope=rope)
    x, seen = torch.randn(1, 4, 32, requires_grad=True), []
    want = layer(x)
    handle = HOOKS[kind](layer.rope, lambda m, *_: seen.append(m))
    try:
        got = layer(x)
        got.sum().backward()
    finally:
        handle.remove()
    assert layer.rope in seen and torch.equal(got, want)


def test_projections_that_are_apart_take_the_default_rope() -> None:
    fused, default = (
        AttentionConfig(n_heads=2, rope=RoPEConfig(name=name, theta=77)).build(
            16, layer_idx=0, n_layers=1
        )
        for name in (RoPEType.fused, RoPEType.default)
    )
    assert type(fused.rope) is RotaryEmbedding and fused.rope.theta == 77
    fused.load_state_dict(default.state_dict())
    x = torch.randn(1, 5, 16)
    assert torch.equal(fused(x), default(x))


def test_the_norms_are_called_as_modules() -> None:
    """Any norm at all, as long as it is a module."""

    class Doubled(LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    q, k = queries_and_keys()
    norms = [Doubled(size=h * DIM, init_device=DEVICE) for h in (4, 2)]
    got = normalize_and_rotate(q, k, q_norm=norms[0], k_norm=norms[1])
    assert torch.equal(got[0], 2 * q) and torch.equal(got[1], 2 * k)
