"""Each layer compiles without a break, and lengths that change do not compile it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from nn.attention.test_attention import LAYERS, each_layer
from olmo_core.nn.attention import GatedDeltaNet


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@each_layer
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_fullgraph(make: Any, window: int | None) -> None:
    layer = make(window_size=window)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 24, 16, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def compare(cu: list[int] | None = None, **kwargs: Any) -> int:
        if cu is not None:
            kwargs["cu_doc_lens"] = torch.tensor(cu, dtype=torch.int32)
        got, want = compiled(x, **kwargs), layer(x, **kwargs)
        dout = torch.randn_like(want)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(o, inputs, dout) for o in (got, want))):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        return graphs()

    assert compare() == compare() == 1
    padded = ([0, 5, 30, 48, 48], [0, 1, 2, 3, 48], [0, 48, 48, 48, 48])
    assert {compare(cu, max_doc_len=48) for cu in padded} == {2}
    assert {compare(cu) for cu in padded} == {3}
    first = compare([0, 5, 30, 44, 45, 48], max_doc_len=40)  # another size and bound
    assert first == 4
    assert compare([0, 20, 30, 44, 46, 48], max_doc_len=30) <= 5
    assert compare([0, 20, 30, 44, 46, 48], max_doc_len=25) <= 5
    with pytest.raises(RuntimeError, match="does not describe"):
        compiled(x, cu_doc_lens=torch.tensor([0, 5, 30, 44, 47, 40], dtype=torch.int32))


def test_global_lengths_are_checked_in_a_graph_too() -> None:
    layer = LAYERS["attention"]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, cu = torch.randn(1, 8, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    torch.testing.assert_close(
        compiled(x, cu_doc_lens=cu, global_cu_doc_lens=cu.clone()), layer(x, cu_doc_lens=cu)
    )
    other = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="not sharded"):
        compiled(x, cu_doc_lens=cu, global_cu_doc_lens=other)
    with pytest.raises(ValueError, match="not sharded"):
        layer(x, cu_doc_lens=cu, global_cu_doc_lens=other)


@pytest.mark.slow
@each_layer
def test_inductor(make: Any) -> None:
    layer = make(window_size=5)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 24, 16, requires_grad=True)
    cu = torch.tensor([0, 5, 30, 48], dtype=torch.int32)
    got, want = (f(x, cu_doc_lens=cu) for f in (compiled, layer))
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(o.square().sum(), x)[0] for o in (got, want))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_compiled_dropout_under_checkpointing() -> None:
    """Dropout has an op of its own, tagged as seeded: recomputed, it drops the same weights."""
    layer = LAYERS["attention"](dropout=0.5)
    x = torch.randn(1, 8, 16, requires_grad=True)

    def step(y: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.manual_seed(1)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, want)


@each_layer
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_decoding_compiles_once(make: Any, window: int | None) -> None:
    layer = make(window_size=window).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 24, 16)
    with torch.no_grad():
        want = layer(x)
        layer.init_kv_cache_manager(2, 32)
        out = [layer(x[:, :4])]
        for t in range(4, 24):
            layer.kv_cache_manager.reserve(1)
            out.append(compiled(x[:, t : t + 1]))
    torch.testing.assert_close(torch.cat(out, dim=1), want)
    assert graphs() == 1


@pytest.mark.parametrize("kind", [*LAYERS, "delta"])
def test_lengths_are_asserted_once_a_layer(kind: str) -> None:
    layer = GatedDeltaNet(d_model=16, n_heads=2) if kind == "delta" else LAYERS[kind]()
    asserted: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        asserted.append(sum(node.target is torch._assert_async for node in graph.graph.nodes))
        return graph

    x, cu = torch.randn(1, 8, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    torch.compile(layer, fullgraph=True, backend=counting)(x, cu_doc_lens=cu)
    assert asserted == [1]
