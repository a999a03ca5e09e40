"""What a table depends on is in its name; nothing done behind its back changes a rotation."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nn.test_rope import assert_equals_reference, inputs, turn
from olmo_core.nn import rope_table
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope import (
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    RoPEType,
    RotaryEmbedding,
    YaRNRoPEScalingConfig,
)
from olmo_core.nn.rope_scaling import inverse_frequencies

AT = torch.arange(6)


@pytest.mark.parametrize("name", RoPEType)
def test_a_config_that_changes_after_build_changes_nothing(name: RoPEType) -> None:
    scaling = YaRNRoPEScalingConfig(factor=4)
    config = RoPEConfig(name=name, theta=100, scaling=scaling)
    rope, cache = config.build(16), BufferCache()
    q, k = inputs()
    want = turn(config.build(16), q, k)
    scaling.factor, scaling.old_context_len, config.theta = 99.0, 1, 5
    got = turn(rope, q, k)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    changed = rope.scaling
    assert isinstance(changed, YaRNRoPEScalingConfig) and changed.factor == 4
    changed.factor = 7.0  # a copy
    rope.warmup_cache(5000, "cpu")  # a new table, by the old scaling
    assert torch.equal(turn(rope, q, k)[0], want[0])
    for attribute in ("theta", "scaling", "rotary_dim", "head_size"):
        with pytest.raises(AttributeError):
            setattr(RotaryEmbedding(head_size=8, cache=cache), attribute, 4)


def test_precision_may_change_after_build() -> None:
    rope = RoPEConfig().build(16)
    q, k = inputs(dtype=torch.bfloat16)
    precise = turn(rope, q, k)[0]
    rope.full_precision = False
    want = turn(RoPEConfig(full_precision=False).build(16), q, k)[0]
    assert torch.equal(turn(rope, q, k)[0], want) and not torch.equal(want, precise)


def test_scalings_that_look_alike_share_nothing() -> None:
    """A table is named by its frequencies, not by the repr of what made them."""

    def make(exponent: float) -> RoPEScalingConfig:
        @dataclass(repr=False)
        class Scaling(RoPEScalingConfig):
            def compute_inv_freqs(self, theta: float, dim: int) -> Tensor:
                return inverse_frequencies(theta, dim) ** exponent

            def __repr__(self) -> str:
                return "Scaling()"

        return Scaling()

    cache = BufferCache()
    for exponent in (1.0, 1.5):
        rope = RotaryEmbedding(head_size=16, scaling=make(exponent), cache=cache)
        assert_equals_reference(rope, *inputs(), AT, 1e-6)
    assert len(cache.with_namespace("rope")) == 2


class Layers(nn.Module):
    """Attention layers built one by one: each has a table of its own."""

    def __init__(self, *ropes: RoPEConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AttentionConfig(n_heads=2, rope=rope).build(16, layer_idx=0, n_layers=1)
            for rope in ropes
        )

    def forward(self, x: Tensor, cu: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, cu_doc_lens=cu)
        return x


@pytest.fixture
def counter() -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_several_tables_in_one_compiled_model(counter: Any) -> None:
    model = Layers(RoPEConfig(), RoPEConfig(), RoPEConfig(theta=100))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 9, 16, requires_grad=True)
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want)
    dx, want_dx = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(dx, want_dx)


def test_all_kinds_of_tables_in_one_graph(counter: Any) -> None:
    ropes = [
        RoPEConfig(theta=100),
        RoPEConfig(scaling=PIRoPEScalingConfig()),
        RoPEConfig(name=RoPEType.complex, partial_rotary_factor=0.5),
        RoPEConfig(),
        RoPEConfig(),
    ]
    model = nn.ModuleList(rope.build(16) for rope in ropes)

    def rotate(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        for rope in model:
            q, k = turn(rope, q, k)  # type: ignore[arg-type]
            q, k = turn(rope, q, k, positions=positions, max_position=3000)  # type: ignore[arg-type]
        return q, k

    q, k = inputs(dtype=torch.float64)
    got = torch.compile(rotate, backend=counter, fullgraph=True)(q, k, AT)
    torch.testing.assert_close(got, rotate(q, k, AT))
    for strict in (False, True):
        rope = model[0]
        exported = torch.export.export(rope, (q, k, False), strict=strict).module()
        torch.testing.assert_close(exported(q, k, False), rope(q, k, False))


@pytest.mark.slow
def test_several_tables_by_inductor() -> None:
    model, x = Layers(RoPEConfig(theta=100), RoPEConfig(), RoPEConfig()), torch.randn(2, 9, 16)
    got = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_layers_of_equal_frequencies_share_one_compiled_layer(counter: Any) -> None:
    model = Layers(*[RoPEConfig()] * 12)  # more than the recompile limit
    q, k = inputs(head_dim=8)
    for layer in model.layers:
        rope: Any = layer.rope  # type: ignore[union-attr]
        got = torch.compile(rope, backend=counter, fullgraph=True)(q, k, False)
        torch.testing.assert_close(got, turn(rope, q, k))
    assert counter.frame_count == 1


def test_compiled_tables_go_with_the_last_layer_that_reads_them(counter: Any) -> None:
    def names() -> set[str]:
        gc.collect()
        return set(vars(rope_table._COMPILED))

    before = names()
    q, k = inputs()
    first, second = (RotaryEmbedding(head_size=16, theta=123) for _ in range(2))
    compiled = torch.compile(lambda rope: rope(q, k, False), backend=counter, fullgraph=True)
    compiled(first)
    compiled(second)
    assert len(names() - before) == 1 and counter.frame_count == 1
    want = turn(second, q, k)
    del first  # the one that the code was compiled for
    torch.testing.assert_close(compiled(second), want)
    copies = [copy.deepcopy(second), pickle.loads(pickle.dumps(second))]
    for other in copies:
        torch.testing.assert_close(compiled(other), want)
    del second
    for other in copies:
        torch.testing.assert_close(compiled(other), want)
    del copies, other
    torch._dynamo.reset()
    assert names() == before
