"""Layers whose heads or columns are dealt to ranks: dealt = whole, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gloo_ranks import on_ranks
from nn.attention.parallel.sharing import (
    FEED_FORWARD,
    LAYERS,
    MIXERS,
    RECURRENT,
    SOFTMAX,
    Block,
    D,
    check_gradients,
    error,
    make,
    mesh_of,
)
from olmo_core.nn.attention import Attention, GatedDeltaNet
from olmo_core.nn.feed_forward import FeedForward
from olmo_core.nn.init import InitMethod
from olmo_core.nn.sharded import is_sharded
from olmo_core.nn.tensor_parallel import SharesWidth

pytestmark = pytest.mark.distributed


def exact(rank: int, n: int, names: list[str]) -> None:
    from torch.distributed.tensor import Shard

    mesh, tokens = mesh_of(n), 12
    cu = torch.tensor([0, 5, 5, 19, 2 * tokens], dtype=torch.int32)
    for name in names:
        whole = make(name)
        keywords = {"cu_doc_lens": cu} if name in MIXERS else {}
        x, dout = torch.randn(2, 2, tokens, D, dtype=torch.float64)
        x_whole = x.clone().requires_grad_()
        want = whole(x_whole, **keywords)
        want.backward(dout)
        for layout in (None, Shard(1)):
            layer = make(name)
            layer.apply_tp(mesh, layout, layout)

            def part(t: torch.Tensor, cut: bool = layout is not None) -> torch.Tensor:
                return t.chunk(n, 1)[rank].contiguous() if cut else t

            mine = part(x).clone().requires_grad_()
            if layout is None:
                out = layer(mine, **keywords)
            else:
                out = layer(x=mine, **keywords)
            assert not is_sharded(out)
            out.backward(part(dout))
            assert error(out, part(want)) < 1e-12, name
            assert mine.grad is not None and x_whole.grad is not None
            assert error(mine.grad, part(x_whole.grad)) < 1e-12, name
            check_gradients(layer, whole)


@pytest.mark.parametrize(
    "names", [list(SOFTMAX), [*RECURRENT, *FEED_FORWARD]], ids=["softmax", "other"]
)
def test_on_two_ranks(names: list[str]) -> None:
    on_ranks(2, exact, names)


def test_on_four_ranks() -> None:
    on_ranks(4, exact, list(LAYERS))


def decode(rank: int, n: int) -> None:
    x = torch.randn(2, 9, D, dtype=torch.float64)
    leftpad = torch.tensor([0, 2], dtype=torch.int32)
    with torch.no_grad():
        for name in ("full norm, clip", "head norm, headwise gate, window", "fused", "gva"):
            layer = make(name).eval()
            want = layer(x, cache_leftpad=leftpad)
            layer.apply_tp(mesh_of(n))
            assert error(layer(x, cache_leftpad=leftpad), want) < 1e-12, name
            layer.init_kv_cache_manager(2, 9)
            cache = layer.kv_cache_manager
            if name in SOFTMAX:
                assert cache.k_cache.shape[2] == layer.n_kv_heads // n
            outs = [layer(x[:, :5], cache_leftpad=leftpad)]
            outs += [layer(x[:, t : t + 1]) for t in range(5, 9)]
            assert error(torch.cat(outs, 1), want) < 1e-12, name
            assert layer.num_flops_per_token(9) == make(name).num_flops_per_token(9)


def test_decoding_with_a_cache_of_this_ranks_heads() -> None:
    on_ranks(2, decode)


def built_on_meta(rank: int, n: int) -> None:
    options = {
        "init_method": InitMethod.llama, "d_model": D, "block_idx": 1, "num_blocks": 4,
    }  # fmt: skip
    for name, build in LAYERS.items():
        torch.manual_seed(0)
        whole = build()
        whole.init_weights(**options, generator=torch.Generator().manual_seed(5))
        layer = build(init_device="meta")
        layer.apply_tp(mesh_of(n))
        layer.to_empty(device="cpu")
        layer.init_weights(**options, generator=torch.Generator().manual_seed(5))
        for (path, p), (other, q) in zip(
            layer.named_parameters(), whole.named_parameters(), strict=True
        ):
            assert path == other and torch.equal(p.full_tensor(), q), (name, path)


def test_a_meta_build_starts_at_the_whole_layers_weights() -> None:
    on_ranks(2, built_on_meta)


def refusals(rank: int, n: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    mesh = mesh_of(n)
    layer = Attention(d_model=9, n_heads=3)
    with pytest.raises(ValueError, match="can't deal n_heads=3 to 2 ranks"):
        layer.apply_tp(mesh)
    assert type(layer.w_q.weight) is torch.nn.Parameter  # as it was
    with pytest.raises(ValueError, match="n_kv_heads=1"):
        Attention(d_model=8, n_heads=4, n_kv_heads=1).apply_tp(mesh)
    with pytest.raises(ValueError, match="n_heads=3"):
        GatedDeltaNet(d_model=9, n_heads=3, n_v_heads=6).apply_tp(mesh)
    with pytest.raises(ValueError, match="hidden_size=5"):
        FeedForward(d_model=4, hidden_size=5).apply_tp(mesh)
    with pytest.raises(TypeError, match="must be a DeviceMesh, got int"):
        layer.apply_tp(2)
    with pytest.raises(ValueError, match="one dimension, got 2"):
        layer.apply_tp(mesh_of(1, n, names=("dp", "tp")))
    on_one_gpu = DeviceMesh("cuda", list(range(n)))  # over gloo: nothing else is built in
    for name in ("input_layout", "output_layout"):
        with pytest.raises(RuntimeError, match=rf"{name}=S.*\(1\).* needs a GPU for each rank"):
            layer.apply_tp(on_one_gpu, **{name: Shard(1)})
    for name in ("ngpt", "gva", "swiglu"):
        layer = make(name)
        with pytest.raises(RuntimeError, match="float8_enabled=True"):
            layer.apply_tp(mesh, float8_enabled=True)  # torchao is missing, or nothing is float8
        layer.apply_tp(mesh)
        with pytest.raises(RuntimeError, match="apply_tp was called twice on one"):
            layer.apply_tp(mesh)
    with pytest.raises(RuntimeError, match="FusedAttention has no float8"):
        make("fused").apply_tp(mesh, float8_enabled=True)
    for name in ("fused", "gva"):
        layer = make(name)
        layer.init_kv_cache_manager(1, 4)
        with pytest.raises(RuntimeError, match="apply_tp first, then init_kv_cache_manager"):
            layer.apply_tp(mesh)
        x, leftpad = torch.randn(1, 4, D, dtype=torch.float64), torch.ones(1, dtype=torch.int32)
        for options in ({"output_layout": Shard(1)}, {"use_local_output": False}):
            layer = make(name)
            layer.apply_tp(mesh, **options)
            with pytest.raises(ValueError, match="sharded or DTensor output"):
                layer(x, cache_leftpad=leftpad)
    layer = make("l2 norm")
    layer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"does not know how to deal: extra\.weight"):
        layer.apply_tp(mesh)
    layer = make("l2 norm")
    layer.apply_tp(mesh, use_local_output=False)
    assert is_sharded(layer(torch.randn(1, 4, D, dtype=torch.float64)))
    with pytest.raises(TypeError, match="Expected a floating tensor"):
        layer([1, 2])


def test_what_can_not_be_dealt() -> None:
    on_ranks(2, refusals)


def dropped(rank: int, n: int) -> torch.Tensor:
    """What is left of the value 1 in each of this rank's heads."""
    layer = Attention(d_model=8, n_heads=4, dropout=0.5, dtype=torch.float64)
    layer.apply_tp(mesh_of(n))
    torch.manual_seed(7)
    q = torch.zeros(1, 6, 2, 2, dtype=torch.float64)
    return layer.backend((q, q, torch.ones_like(q)))


def test_ranks_with_equal_seeds_drop_other_weights() -> None:
    first, second = on_ranks(2, dropped)
    assert (first == 0).any() and not torch.equal(first, second)


def compiled(rank: int, n: int, backend: str, names: list[str]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    cu = torch.tensor([0, 5, 16], dtype=torch.int32)
    for name in names:
        torch._dynamo.reset()
        whole, layer = Block(make(name)), Block(make(name))
        layer.mixer.apply_tp(mesh_of(n))
        counter = CompileCounterWithBackend(backend)
        fast = torch.compile(layer, fullgraph=True, backend=counter)
        x, dout = torch.randn(2, 1, 16, D, dtype=torch.float64)
        want = whole(x, cu_doc_lens=cu)
        want.backward(dout)
        out = fast(x, cu_doc_lens=cu)
        out.backward(dout)
        assert counter.frame_count == 1, (name, counter.frame_count)
        assert error(out, want) < 1e-12, (name, error(out, want))
        check_gradients(layer, whole)


@pytest.mark.parametrize("name", ["full norm, clip", "fused"])
def test_compiles_to_one_graph(name: str) -> None:
    on_ranks(2, compiled, "aot_eager", [name], timeout=300)


@pytest.mark.slow
def test_every_mixer_compiles() -> None:
    on_ranks(2, compiled, "aot_eager", list(MIXERS), timeout=500)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    on_ranks(2, compiled, "inductor", ["full norm, clip", "gva"], timeout=500)


def in_other_modes(rank: int, n: int) -> None:
    """The tables' rows of the gathered sequence; activation checkpointing; autocast."""
    from torch.distributed.tensor import Shard

    x, dout = torch.randn(2, 2, 12, D, dtype=torch.float64)
    half = slice(6 * rank, 6 * rank + 6)
    for name in ("full norm, clip", "fused", "gva"):
        whole, layer = make(name), make(name)
        layer.apply_tp(mesh_of(n), Shard(1), Shard(1))
        keywords = {}
        if name in SOFTMAX:
            sin, cos, _ = whole.rope.get_buffers(24, "cpu", dtype=torch.float64)
            keywords = {"pos_sin": sin[1::2], "pos_cos": cos[1::2]}
        want = whole(x, **keywords)
        want.backward(dout)
        out = checkpoint(layer, x[:, half], use_reentrant=False, **keywords)
        out.backward(dout[:, half])
        assert error(out, want[:, half]) < 1e-12, name
        check_gradients(layer, whole)

        whole, layer = make(name).float(), make(name).float()
        layer.apply_tp(mesh_of(n))
        with torch.autocast("cpu", torch.bfloat16):
            want, out = whole(x.float()), layer(x.float())
        assert out.dtype == want.dtype == torch.bfloat16
        assert error(out.double(), want.double()) < 0.05, name


def test_tables_checkpointing_and_autocast() -> None:
    on_ranks(2, in_other_modes)


def test_a_layer_without_a_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="does not support tensor parallelism"):
        SharesWidth().tensor_parallel_table()
