"""RoPE compiles to one graph, which reads the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nn.test_rope import CPU, inputs, turn
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope import (
    RoPEConfig,
    RoPEType,
    RotaryEmbeddingBase,
    YaRNRoPEScalingConfig,
)
from olmo_core.nn.rope_table import RoPETable


class Block(nn.Module):
    """A projection and RoPE, as an attention layer calls it, optionally checkpointed."""

    def __init__(self, rope: RotaryEmbeddingBase, checkpointed: bool) -> None:
        super().__init__()
        self.rope = rope
        self.proj = nn.Linear(16, 16)
        self.checkpointed = checkpointed

    def body(self, x: Tensor, positions: Tensor | None) -> Tensor:
        q = self.proj(x)
        bound = None if positions is None else x.shape[1]
        q, k = turn(self.rope, q, q[:, :, :2], positions=positions, max_position=bound)
        return q.sum(2) * k.sum(2)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.checkpointed:
            out = checkpoint(self.body, x, positions, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return self.body(x, positions)


@pytest.fixture
def counter() -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "checkpointed", "indexed"),
    [
        (RoPEType.default, True, False),
        (RoPEType.complex, False, True),
    ],
)
def test_compiles_to_one_graph_that_reads_the_table(
    counter: Any, name: RoPEType, checkpointed: bool, indexed: bool
) -> None:
    block = Block(RoPEConfig(name=name).build(16), checkpointed)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    frames = []
    for length in (8, 8, 9, 13, 300):
        x = torch.randn(2, length, 4, 16, requires_grad=True)
        positions = torch.arange(length) % 5 if indexed else None
        actual, expected = compiled(x, positions), block(x, positions)
        torch.testing.assert_close(actual, expected)
        (dx,) = torch.autograd.grad(actual.square().sum(), x)
        (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(dx, expected_dx)
        frames.append(counter.frame_count)
    # One static graph and one with a dynamic length.
    assert frames == [1, 1, 2, 2, 2]
    code = "\n".join(graph.code for graph in counter.graphs)
    assert "rows_2048_cpu_torch_float32" in code  # one input, as it is in memory
    for recomputed in ("arange", ".cos(", ".sin(", "float64"):
        assert recomputed not in code


def test_compiled_code_recompiles_once_when_the_table_grows(counter: Any) -> None:
    rope = RoPEConfig().build(4)
    compiled = torch.compile(rope, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for length in (2048, 2049, 5000, 2048, 5):
        q, k = inputs(1, length, 4, heads=(1, 1))
        torch.testing.assert_close(compiled(q, k, False), turn(rope, q, k))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 3, 3]
    warm = RoPEConfig(theta=10_000).build(4)
    warm.warmup_cache(8192, CPU)
    compiled = torch.compile(warm, backend=counter, fullgraph=True, dynamic=True)
    for length in (3, 2049, 5000, 8192):
        compiled(*inputs(1, length, 4, heads=(1, 1)), False)
    assert counter.frame_count == 4


def test_layers_that_share_compiled_code_keep_their_own_tables(counter: Any) -> None:
    """Compiled code is cached for a code object, which all layers share: only guards tell them
    apart, and a constant carries none by itself."""
    cache = BufferCache()
    ropes = [
        RoPEConfig().build(16, cache=cache),
        RoPEConfig(theta=10_000).build(16, cache=cache),
        RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=4)).build(16, cache=cache),
        RoPEConfig(scaling=YaRNRoPEScalingConfig(factor=16)).build(16, cache=cache),
        RoPEConfig().build(16),
    ]
    q, k = inputs()
    for rope in ropes:
        compiled = torch.compile(rope, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, False), turn(rope, q, k))
    assert counter.frame_count == 4  # the first and the last have the same table

    def through_a_function(rope: RotaryEmbeddingBase) -> tuple[Tensor, Tensor]:
        q_out, k_out = turn(rope, q, k)
        return q_out, k_out

    function = torch.compile(through_a_function, backend=counter, fullgraph=True)
    for rope in ropes:
        torch.testing.assert_close(function(rope), turn(rope, q, k))


def test_compile_under_inference_then_train(counter: Any) -> None:
    block = Block(RoPEConfig().build(16), checkpointed=False)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = torch.randn(2, 8, 4, 16, requires_grad=True)
    with torch.inference_mode():
        compiled(x)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(compiled(x), block(x))


def test_the_constant_mark_is_torch_s_own() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    for method in (RoPETable._publish, RoPETable._num_rows):
        assert method.__dict__ == marked.__dict__ == {"_dynamo_marked_constant": True}
