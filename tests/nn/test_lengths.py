"""Lengths are checked at each use, and nothing that is made from them is remembered."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from olmo_core.nn import lengths as lengths_module
from olmo_core.nn.attention import Attention, FusedAttention, GatedDeltaNet, NormalizedAttention
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.functional import largest_row_error, row_error
from olmo_core.nn.lengths import (
    check_cu_doc_lens,
    check_leftpad,
    document_positions,
    host_lengths,
    leftpad_to_cu_doc_lens,
)
from olmo_core.nn.rope import RoPEConfig

LAYERS: dict[str, Any] = {
    "attention": lambda: Attention(d_model=16, n_heads=2, rope=RoPEConfig(), window_size=3),
    "normalized": lambda: NormalizedAttention(d_model=16, n_heads=2, rope=RoPEConfig()),
    "fused": lambda: FusedAttention(d_model=16, n_heads=2),
    "delta": lambda: GatedDeltaNet(d_model=16, n_heads=2),
}


def cu(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_host_lengths_follow_changes_in_place() -> None:
    lengths = cu(0, 3, 8)
    assert host_lengths(lengths) == [0, 3, 8]
    lengths[1] = 5
    assert host_lengths(lengths) == [0, 5, 8]
    with torch.inference_mode():
        inference = cu(0, 3, 8)
    assert host_lengths(inference) == [0, 3, 8]
    with torch.inference_mode():
        inference[1] = 5
    assert host_lengths(inference) == [0, 5, 8]


def test_an_answer_holds_for_its_question_alone() -> None:
    lengths = cu(0, 1, 2)
    for _ in range(2):
        check_cu_doc_lens(lengths, 2, 1)
    with pytest.raises(TypeError, match="must be an int"):
        check_cu_doc_lens(lengths, 2, True)
    with pytest.raises(ValueError, match="must end at"):
        check_cu_doc_lens(lengths, 3, 1)
    with pytest.raises(ValueError, match="must not decrease"):
        check_cu_doc_lens(cu(0, 3, 2), 2, 1)
    check_cu_doc_lens(lengths, 2, 1)
    lengths[1] = 0
    with pytest.raises(ValueError, match="max_doc_len=1"):
        check_cu_doc_lens(lengths, 2, 1)
    with torch.inference_mode():  # without versions, each call asks again
        inference = cu(0, 1, 2)
        check_cu_doc_lens(inference, 2, 1)
        inference[2] = 3
        with pytest.raises(ValueError, match="must end at"):
            check_cu_doc_lens(inference, 2, 1)


def change_data(lengths: Tensor, to: Tensor) -> None:
    lengths.data.copy_(to)


def change_numpy(lengths: Tensor, to: Tensor) -> None:
    lengths.numpy()[:] = to.numpy()


def change_dlpack(lengths: Tensor, to: Tensor) -> None:
    torch.from_dlpack(lengths.__dlpack__()).copy_(to)


def change_view_under_inference(lengths: Tensor, to: Tensor) -> None:
    with torch.inference_mode():
        lengths.copy_(to)


@pytest.mark.parametrize(
    "change", [change_data, change_numpy, change_dlpack, change_view_under_inference]
)
@pytest.mark.parametrize("kind", [*LAYERS])
def test_bytes_that_change_behind_identity_and_version(change: Any, kind: str) -> None:
    """Positions, masks, convolutions and gradients are those of the bytes at each use."""
    layer = LAYERS[kind]().double()
    x = torch.randn(1, 10, 16, dtype=torch.float64, requires_grad=True)
    first, second, bad = cu(0, 4, 10), cu(0, 7, 10), cu(0, 7, 11)

    def run(lengths: Tensor) -> list[Tensor]:
        out = layer(x, cu_doc_lens=lengths)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    static = first.clone()
    for want in (first, second, first):
        change(static, want)
        for a, b in zip(run(static), run(want.clone()), strict=True):
            assert torch.equal(a, b)
    change(static, bad)
    with pytest.raises(ValueError, match="must end at"):
        layer(x, cu_doc_lens=static)


@pytest.mark.parametrize("kind", [*LAYERS])
def test_where_reading_waits_a_tensor_is_read_once_and_asserted_always(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What the door does on a GPU, done here: no reading is taken for the bytes of now."""
    monkeypatch.setattr(lengths_module, "_waits", lambda lengths: True)
    reads: list[int] = []
    host_lengths = lengths_module.host_lengths
    monkeypatch.setattr(
        lengths_module, "host_lengths", lambda cu: reads.append(1) or host_lengths(cu)
    )
    layer, x = LAYERS[kind](), torch.randn(1, 10, 16)
    static = cu(0, 4, 10)
    for want in (cu(0, 4, 10), cu(0, 7, 10), cu(0, 1, 10)):
        static.data.copy_(want)
        got, reads_before = layer(x, cu_doc_lens=static), len(reads)
        assert torch.equal(got, layer(x, cu_doc_lens=want.clone()))
        assert reads_before == 1
        reads.clear()
        reads.append(1)  # the static buffer's own
    for bad in (cu(0, 7, 11), cu(1, 7, 10), cu(0, 11, 10)):
        static.data.copy_(bad)
        with pytest.raises(RuntimeError, match="does not describe"):
            layer(x, cu_doc_lens=static)
        with pytest.raises(ValueError, match="must"):
            layer(x, cu_doc_lens=bad)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*LAYERS])
def test_a_static_buffer_on_a_gpu(kind: str) -> None:
    layer, x = LAYERS[kind]().cuda(), torch.randn(1, 10, 16, device="cuda")
    static = cu(0, 4, 10).cuda()
    for want in (cu(0, 4, 10), cu(0, 7, 10)):
        static.data.copy_(want)
        assert torch.equal(layer(x, cu_doc_lens=static), layer(x, cu_doc_lens=want.cuda()))
    strided = torch.stack([static, static + 9], dim=1)[:, 0]
    assert torch.equal(layer(x, cu_doc_lens=strided), layer(x, cu_doc_lens=static))


@pytest.mark.gpu
def test_bad_lengths_in_a_static_buffer_end_a_gpu_process() -> None:
    script = """
import torch
from olmo_core.nn.attention import Attention
layer, x = Attention(d_model=16, n_heads=2, init_device="cuda"), torch.randn(1, 10, 16).cuda()
static = torch.tensor([0, 4, 10], dtype=torch.int32, device="cuda")
layer(x, cu_doc_lens=static)
static.data[2] = 11
layer(x, cu_doc_lens=static)
torch.cuda.synchronize()
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode != 0 and "does not describe" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", [*LAYERS])
def test_left_padding_that_changes_behind_its_version(kind: str) -> None:
    layer, x = LAYERS[kind](), torch.randn(2, 10, 16)
    static = cu(3, 0)
    for want in (cu(3, 0), cu(1, 5)):
        static.data.copy_(want)
        assert torch.equal(layer(x, cache_leftpad=static), layer(x, cache_leftpad=want.clone()))
    static.data.copy_(cu(1, 11))
    with pytest.raises(ValueError, match=r"in \[0, 10\]"):
        layer(x, cache_leftpad=static)


@pytest.mark.parametrize("kind", ["attention", "delta"])
def test_a_compiler_searches_in_no_view(kind: str) -> None:
    """Inductor's search on a GPU may forget where in its base a view begins: what it is given has
    memory of its own, made by a cast, which is not optimized away as a copy is."""
    searched = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        searched.extend(
            node.args[0].target  # type: ignore[union-attr]
            for node in graph.graph.nodes
            if node.target is torch.ops.aten.searchsorted.Tensor
        )
        return graph.forward

    torch._dynamo.reset()
    layer, x = LAYERS[kind](), torch.randn(1, 10, 16)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    with torch.no_grad():
        got = compiled(x, cu_doc_lens=cu(0, 4, 4, 10))
        torch.testing.assert_close(got, layer(x, cu_doc_lens=cu(0, 4, 4, 10)))
    assert searched and set(searched) == {torch.ops.aten._to_copy.default}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("kind", [*LAYERS])
def test_a_compiled_layer_on_a_gpu(kind: str) -> None:
    """Output and gradients, documents included, are the eager layer's."""
    torch._dynamo.reset()
    layer = LAYERS[kind]().cuda()
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
        layer = layer.to(dtype)
        x = torch.randn(2, 40, 16, device="cuda", dtype=dtype, requires_grad=True)
        lengths, inputs = cu(0, 3, 4, 4, 50, 80).cuda(), [x, *layer.parameters()]
        got, want = (f(x, cu_doc_lens=lengths) for f in (torch.compile(layer), layer))
        assert row_error(got, want) < bound
        grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)]
        assert largest_row_error(*grads) < 3 * bound


@pytest.mark.parametrize("kind", ["attention", "delta"])
def test_two_compiled_layers_on_one_buffer(kind: str) -> None:
    """Inductor may give two lengths tensors one buffer: each layer sees its own lengths."""
    shared = BufferCache()
    layers: list[Any] = [
        Attention(d_model=16, n_heads=2, rope=RoPEConfig(), cache=shared)
        if kind == "attention"
        else LAYERS[kind]()
        for _ in range(2)
    ]

    def stack(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        for layer, lengths in zip(layers, (a, b)):
            x = layer(x, cu_doc_lens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()]))
        return x

    x, a, b = torch.randn(1, 10, 16), cu(4, 6), cu(7, 3)
    with torch.no_grad():
        want = stack(x, a, b)
        got = torch.compile(stack, fullgraph=True)(x, a, b)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_traced_graph_serves_other_lengths() -> None:
    layer = Attention(d_model=16, n_heads=2, rope=RoPEConfig())
    x, lengths = torch.randn(1, 10, 16), cu(0, 4, 10)
    layer(x, cu_doc_lens=lengths)
    with torch.no_grad():
        traced = make_fx(lambda x, c: layer(x, cu_doc_lens=c))(x, lengths)
        for other in (cu(0, 7, 10), cu(0, 1, 10)):
            torch.testing.assert_close(traced(x, other), layer(x, cu_doc_lens=other))
        with pytest.raises(RuntimeError, match="does not describe"):
            traced(x, cu(0, 7, 9))


def test_strided_lengths() -> None:
    layer, x = Attention(d_model=16, n_heads=2, rope=RoPEConfig()), torch.randn(1, 10, 16)
    lengths = cu(0, 4, 10)
    strided = torch.stack([lengths, lengths + 9], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(layer(x, cu_doc_lens=strided), layer(x, cu_doc_lens=lengths))


def test_what_inference_mode_derives_serves_training() -> None:
    lengths = cu(0, 4, 10)
    layer = Attention(d_model=8, n_heads=2, rope=RoPEConfig())
    x = torch.randn(1, 10, 8)
    with torch.inference_mode():
        layer(x, cu_doc_lens=lengths)
    layer(x, cu_doc_lens=lengths).sum().backward()


def test_document_positions() -> None:
    assert document_positions(cu(0, 3, 3, 4, 6, 6), 6).tolist() == [0, 1, 2, 0, 0, 1]


def test_left_padding_is_documents() -> None:
    assert leftpad_to_cu_doc_lens(cu(2, 0, 5), 5).tolist() == [0, 2, 5, 5, 10, 15, 15]


@pytest.mark.parametrize(
    ("lengths", "longest", "error", "match"),
    [
        (cu(1, 10), None, ValueError, "start at 0"),
        (cu(0, 7, 5, 10), None, ValueError, "not decrease"),
        (cu(0, 5), None, ValueError, "must end at .* 10"),
        (cu(0, 5, 12), None, ValueError, "must end at .* 10"),
        (cu(0, 4, 10), 5, ValueError, "max_doc_len=5"),
        (cu(0), None, ValueError, "one element more"),
        (cu(0, 10)[None], None, ValueError, "1-D"),
        (cu(0, 10).long(), None, TypeError, "int32"),
        (cu(0, 10).float(), None, TypeError, "int32"),
        ([0, 10], None, TypeError, "int32"),
        (cu(0, 10), torch.tensor(10), TypeError, "an int"),
        (cu(0, 10), True, TypeError, "an int"),
        (cu(0, 10), 10.0, TypeError, "an int"),
    ],
)
def test_bad_lengths(lengths: Any, longest: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_cu_doc_lens(lengths, 10, longest)


@pytest.mark.parametrize(
    ("leftpad", "error", "match"),
    [
        (cu(0, 11), ValueError, r"in \[0, 10\]"),
        (cu(-1, 0), ValueError, r"in \[0, 10\]"),
        (cu(0), ValueError, r"shape \(2,\)"),
        (cu(0, 1).long(), TypeError, "int32"),
        (3, TypeError, "int32"),
    ],
)
def test_bad_left_padding(leftpad: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_leftpad(leftpad, 2, 10)


def test_lengths_of_a_vmap_are_refused() -> None:
    ends, leftpad = torch.stack([cu(0, 4), cu(0, 4)]), torch.stack([cu(1, 2), cu(0, 0)])
    with pytest.raises(ValueError, match="cu_doc_lens differs between the rows"):
        torch.vmap(lambda x: check_cu_doc_lens(x, 4, None))(ends)
    with pytest.raises(ValueError, match="cache_leftpad differs between"):
        torch.vmap(lambda x: check_leftpad(x, 2, 4))(leftpad)
