"""Layers and a model on a shard, with what each load balancer returned: shard = whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gloo_ranks import errors_on_ranks, on_ranks
from nn.attention.parallel.schedules import int32
from nn.attention.test_attention import build
from olmo_core.nn.attention import (
    Attention,
    AttentionConfig,
    NormalizedAttention,
    SequenceMixer,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.backend import AutoAttentionBackend, TorchAttentionBackend
from olmo_core.nn.attention.ring import (
    RingAttentionLoadBalancer,
    RingAttentionLoadBalancerType,
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

pytestmark = pytest.mark.distributed

PLAIN: dict[str, Any] = {
    "kind": "default", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "window": None, "rope": None,
    "partial": 1.0, "norm": None, "gate": None, "clip": None, "bias": False,
}  # fmt: skip
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "rope": "default", "norm": "full", "gate": "headwise", "clip": 0.5, "bias": True,
    },
    "window": {"n_kv_heads": 1, "rope": "complex", "norm": "head", "gate": "elementwise",
               "window": 5},
    "fused": {"kind": "fused", "n_kv_heads": 4, "rope": "fused", "clip": 0.5, "bias": True},
    "fused window": {"kind": "fused", "n_kv_heads": 4, "window": 3, "bias": True},
    "ngpt": {"kind": "normalized", "rope": "default", "norm": "full"},
    "ngpt window": {"kind": "normalized", "rope": "default", "partial": 0.5, "window": 4},
}  # fmt: skip
STYLES = ("zig_zag", "llama3", "balanced", "ulysses", "zig_zag+ulysses", "balanced+ulysses")
_MESHES: dict[Any, DeviceMesh] = {}


def make_layer(name: str) -> SequenceMixer:
    torch.manual_seed(0)  # the same weights on all ranks
    return build({**PLAIN, **LAYERS[name]})[0]


def place(
    style: str, n: int, head_stride: int = 1
) -> tuple[dict[str, Any], RingAttentionLoadBalancer]:
    """The arguments of ``apply_cp`` for a style over ``n`` ranks, and its load balancer."""
    shape = (n // 2, 2) if "+" in style else (n,)
    if shape not in _MESHES:
        names = ("ring", "ulysses") if "+" in style else ("cp",)
        _MESHES[shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    kind, _, _ = style.partition("+")
    arguments: dict[str, Any] = {"cp_mesh": _MESHES[shape]}
    if kind != "ulysses":
        arguments["ring"] = RingContextParallelStyle(kind, head_stride=head_stride)
    if "ulysses" in style:
        arguments["uly"] = UlyssesContextParallelStyle()
    return arguments, RingAttentionLoadBalancerType(kind).build(_MESHES[shape])


def run_sharded(
    module: nn.Module,
    balancer: RingAttentionLoadBalancer,
    x: Tensor,
    dout: Tensor,
    cu: list[int] | None,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda keywords: keywords,
    buffers: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """``[out, dx, *parameter gradients]`` of all ranks together, as the whole module has them."""
    x = x.clone().requires_grad_()
    buffers = buffers or {}
    tokens = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    inputs = [x, dout, tokens, *buffers.values()]
    dims = [1, 1, 1, *[0] * len(buffers)]
    common: dict[str, Any] = {
        "inputs": inputs, "seq_dims": dims, "pad_values": [0.0, 0.0, -1, *[0.0] * len(buffers)],
    }  # fmt: skip
    keywords: dict[str, Any] = {}
    if cu is None:
        shards = balancer.batch_shard(**common)
    else:
        shards, keywords = balancer.batch_shard_by_document(cu_doc_lens=int32(cu), **common)
    x_shard, dout_shard, index, *tables = shards
    out = module(x_shard, **change(keywords), **dict(zip(buffers, tables, strict=True)))
    assert out.shape == x_shard.shape
    parameters = list(module.parameters())
    dx, *grads = torch.autograd.grad(out, [x, *parameters], dout_shard)
    whole = torch.zeros_like(x)
    for row in range(x.shape[0]):
        real = index[row] >= 0
        whole[row, index[row][real]] = out.detach()[row][real]
    together = [whole, dx, *grads]
    for each in together:
        dist.all_reduce(each)
    return together


def run_whole(
    module: nn.Module, x: Tensor, dout: Tensor, cu: list[int] | None, **keywords: Any
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    if cu is not None:
        keywords["cu_doc_lens"] = int32(cu)
    out = module(x, **keywords)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], dout)]


def draw_input(batch: int, total: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dout = torch.randn(2, batch, total, width, generator=generator, dtype=torch.float64)
    return x, dout


def error_of(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value where that is over 1."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
        for a, b in zip(got, want, strict=True)
    )


DOCUMENTS = [0, 3, 3, 20, 21, 37, 50]


def exact(rank: int, n: int, style: str) -> None:
    for name in LAYERS:
        whole = make_layer(name)
        sharded = copy.deepcopy(whole)
        arguments, balancer = place(style, n)
        sharded.apply_cp(**arguments)
        x, dout = draw_input(1, DOCUMENTS[-1], whole.d_model)
        want = run_whole(whole, x, dout, DOCUMENTS)
        got = run_sharded(sharded, balancer, x, dout, DOCUMENTS)
        assert error_of(got, want) < 1e-12, (name, error_of(got, want))

        if whole.rope is not None:  # the tables' rows, sharded like the input
            tables = whole.rope.get_buffers(DOCUMENTS[-1], "cpu", dtype=torch.float64)
            buffers = {k: b for k, b in tables._asdict().items() if b is not None}
            got = run_sharded(sharded, balancer, x, dout, DOCUMENTS, buffers=buffers)
            assert error_of(got, want) < 1e-12, (name, error_of(got, want))

        if style != "llama3":  # which shards by document alone
            x, dout = draw_input(2, 24, whole.d_model)
            want = run_whole(whole, x, dout, None)
            got = run_sharded(sharded, balancer, x, dout, None)
            assert error_of(got, want) < 1e-12, (name, error_of(got, want))


@pytest.mark.parametrize("style", [s for s in STYLES if "+" not in s])
def test_layers_on_two_ranks(style: str) -> None:
    on_ranks(2, exact, style)


@pytest.mark.parametrize("style", [s for s in STYLES if "+" in s])
def test_layers_on_a_ring_with_ulysses_inside(style: str) -> None:
    on_ranks(4, exact, style)


@pytest.mark.slow
@pytest.mark.parametrize("style", [s for s in STYLES if "+" not in s])
def test_layers_on_four_ranks(style: str) -> None:
    on_ranks(4, exact, style)


WITHOUT = {
    "zig_zag": ("cu_doc_lens",),
    "ulysses": ("cu_doc_lens",),
    "llama3": ("cu_doc_lens_q", "cu_doc_lens_k", "max_doc_len_q", "max_doc_len_k", "local_k_slice"),
    "zig_zag+ulysses": ("cu_doc_lens", "max_doc_len"),
    "llama3+ulysses": ("cu_doc_lens_q", "cu_doc_lens_k"),
}


def incomplete(rank: int, n: int, style: str) -> None:
    """The keywords of the interface alone, as a caller who knows no more passes them."""
    whole = make_layer("everything")
    sharded = copy.deepcopy(whole)
    arguments, balancer = place(style, n)
    sharded.apply_cp(**arguments)
    for cu in (DOCUMENTS, [0, 50], list(range(51))):
        x, dout = draw_input(1, 50, whole.d_model)
        want = run_whole(whole, x, dout, cu)
        for names in (WITHOUT[style], ("global_cu_doc_lens",)):
            got = run_sharded(
                sharded,
                balancer,
                x,
                dout,
                cu,
                lambda k: {m: k[m] for m in names},  # noqa: B023
            )
            assert error_of(got, want) < 1e-12


@pytest.mark.parametrize("style", [s for s in WITHOUT if "+" not in s])
def test_what_is_missing_is_derived(style: str) -> None:
    on_ranks(2, incomplete, style)


@pytest.mark.parametrize("style", [s for s in WITHOUT if "+" in s])
def test_what_is_missing_is_derived_with_ulysses_inside(style: str) -> None:
    on_ranks(4, incomplete, style)


OTHER_KEYWORDS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "zig-zag's own lengths": (
        "zig_zag",
        lambda k: {**k, "cu_doc_lens": k["cu_doc_lens"].flip(0).neg() + k["cu_doc_lens"][-1]},
        "ValueError: cu_doc_lens and global_cu_doc_lens describe different documents",
    ),
    "zig-zag's longest": ("zig_zag", lambda k: {**k, "max_doc_len": 1}, "ValueError: The longest"),
    "ulysses' longest": ("ulysses", lambda k: {**k, "max_doc_len": 1}, "ValueError: The longest"),
    "ulysses' longest of the global ones": (
        "ulysses",
        lambda k: {"global_cu_doc_lens": k["global_cu_doc_lens"], "max_doc_len": 1},
        "ValueError: The longest",
    ),
    "ulysses' lengths": (
        "ulysses",
        lambda k: {**k, "cu_doc_lens": int32([0, 16, 32, 48, 50])},
        "ValueError: cu_doc_lens and global_cu_doc_lens describe different documents",
    ),
    "llama3's queries": (
        "llama3",
        lambda k: {**k, "cu_doc_lens_q": k["cu_doc_lens_q"].index_fill(0, torch.tensor([1]), 9)},
        "ValueError: cu_doc_lens_q, cu_doc_lens_k or local_k_slice do not describe",
    ),
    "llama3's slice": (
        "llama3",
        lambda k: {**k, "local_k_slice": slice(k["local_k_slice"].start + 1,
                                               k["local_k_slice"].stop + 1)},
        "ValueError: cu_doc_lens_q, cu_doc_lens_k or local_k_slice do not describe",
    ),
    "llama3's keys missing": (
        "llama3",
        lambda k: {"cu_doc_lens_q": k["cu_doc_lens_q"]},
        "ValueError: cu_doc_lens_q were given without cu_doc_lens_q and cu_doc_lens_k",
    ),
    "another balancer's": (
        "balanced",
        lambda k: {**k, "cu_doc_lens": int32([0, 25])},
        "ValueError: cu_doc_lens do not describe a shard of the balanced load balancer",
    ),
    "a bound alone": ("zig_zag", lambda k: {"max_doc_len": 9}, "ValueError: max_doc_len=9 was"),
    "int64": (
        "balanced",
        lambda k: {"global_cu_doc_lens": k["global_cu_doc_lens"].long()},
        "TypeError: global_cu_doc_lens must be a torch.int32",
    ),
    "a list": (
        "zig_zag",
        lambda k: {"global_cu_doc_lens": k["global_cu_doc_lens"].tolist()},
        "TypeError: global_cu_doc_lens must be a torch.int32",
    ),
    "left padding": (
        "zig_zag",
        lambda k: {**k, "cache_leftpad": int32([1])},
        "ValueError: cache_leftpad pads rows on the left",
    ),
    "tables without RoPE": (
        "zig_zag",
        lambda k: {**k, "pos_sin": torch.zeros(26, 4), "pos_cos": torch.zeros(26, 4)},
        "ValueError: pos_sin, pos_cos given to a layer without RoPE",
    ),
}  # fmt: skip


def with_other_keywords(rank: int, n: int, case: str) -> None:
    style, change, _ = OTHER_KEYWORDS[case]
    layer = make_layer("plain")
    arguments, balancer = place(style, n)
    layer.apply_cp(**arguments)
    x, dout = draw_input(1, 50, layer.d_model)
    cu = [0, 5, 20, 33, 50]
    run_sharded(layer, balancer, x, dout, cu, change if rank == 1 else lambda k: k)


@pytest.mark.parametrize("case", OTHER_KEYWORDS)
def test_keywords_that_contradict_the_lengths(case: str) -> None:
    first, second = errors_on_ranks(2, with_other_keywords, case, timeout=20)
    assert second is not None and second.startswith(OTHER_KEYWORDS[case][2])
    assert first is not None and first.startswith("DisagreementError: Rank 1 of this")


def llama3_incomplete_on_one_rank(rank: int, n: int, case: str) -> None:
    layer = make_layer("plain")
    arguments, balancer = place("llama3", n)
    layer.apply_cp(**arguments)
    x, dout = draw_input(1, 50, layer.d_model)
    five = WITHOUT["llama3"]

    def change(keywords: dict[str, Any]) -> dict[str, Any]:
        if rank == 1 and case == "bad":
            return {**{m: keywords[m] for m in five}, "max_doc_len_q": 1}
        return {m: keywords[m] for m in five}

    if rank == 1 and case == "rows":
        x, dout = x[:, :46], dout[:, :46]
    run_sharded(layer, balancer, x, dout, [0, 5, 20, 33, x.shape[1]], change)


@pytest.mark.parametrize("case", ["bad", "rows"])
def test_completing_llama3s_keywords_agrees_first(case: str) -> None:
    first, second = errors_on_ranks(2, llama3_incomplete_on_one_rank, case, timeout=20)
    assert first is not None and first.startswith("DisagreementError")
    assert second is not None and second.startswith(
        "ValueError: The longest" if case == "bad" else "DisagreementError"
    )


def refusals(rank: int, n: int) -> None:
    arguments, _ = place("zig_zag", n)
    ulysses, _ = place("ulysses", n)

    layer = make_layer("plain")
    layer.apply_cp(**arguments)
    with pytest.raises(RuntimeError, match="apply_cp was called twice on one Attention"):
        layer.apply_cp(**arguments)
    with pytest.raises(RuntimeError, match="Generate from a model that is not sharded"):
        layer.init_kv_cache_manager(1, 8)
    cached = make_layer("plain")
    cached.init_kv_cache_manager(1, 8)
    with pytest.raises(RuntimeError, match="has a decoding cache, which holds whole sequences"):
        cached.apply_cp(**arguments)
    cache, cached.kv_cache_manager = cached.kv_cache_manager, None
    cached.apply_cp(**arguments)
    cached.kv_cache_manager = cache
    with pytest.raises(RuntimeError, match="A decoding cache holds whole sequences"):
        cached(torch.zeros(1, 4, cached.d_model, dtype=torch.float64))

    with pytest.raises(RuntimeError, match="Attention dropout and a ring style"):
        Attention(d_model=8, n_heads=2, dropout=0.1).apply_cp(**arguments)
    Attention(d_model=8, n_heads=2, dropout=0.1).apply_cp(**ulysses)
    with pytest.raises(ValueError, match=r"can't deal 3 .* load_balancer='llama3'"):
        NormalizedAttention(d_model=6, n_heads=3).apply_cp(**ulysses)
    with pytest.raises(TypeError, match="cp_mesh must be a DeviceMesh, got NoneType"):
        layer.apply_cp(None, ring=RingContextParallelStyle())

    backend = TorchAttentionBackend(head_dim=4, n_heads=2)
    backend.apply_cp(**arguments)
    with pytest.raises(RuntimeError, match="called twice on one TorchAttentionBackend"):
        backend.apply_cp(**arguments)
    q = torch.zeros(1, 4, 2, 4)
    with pytest.raises(RuntimeError, match="A KV cache holds whole sequences"):
        backend((q, q, q), kv_cache_manager=cache)
    for cls in (TorchAttentionBackend, AutoAttentionBackend):
        cls.assert_supports_ring_cp()
        cls.assert_supports_ulysses_cp()


def test_what_is_refused() -> None:
    on_ranks(2, refusals)


def documents_in_a_batch(rank: int, n: int) -> None:
    layer = make_layer("plain")
    layer.apply_cp(**place("zig_zag", n)[0])
    layer(torch.zeros(2, 8, layer.d_model).double(), global_cu_doc_lens=int32([0, 32]))


def test_a_ring_takes_documents_of_one_row_alone() -> None:
    errors = errors_on_ranks(2, documents_in_a_batch)
    for error in errors:
        assert error is not None and error.startswith("ValueError: A ring shards documents of one")


def a_backend_alone(rank: int, n: int) -> None:
    """Queries, keys and values; packed too; under lengths from the balancer."""
    q, k, v = torch.randn(
        3, 1, 50, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    whole = TorchAttentionBackend(head_dim=8, n_heads=2, window_size=(6, 0))
    want = whole((q, k, v), cu_doc_lens=int32(DOCUMENTS))
    for style in ("zig_zag", "llama3", "balanced", "ulysses"):
        backend = TorchAttentionBackend(head_dim=8, n_heads=2, window_size=(6, 0))
        arguments, balancer = place(style, n)
        backend.apply_cp(**arguments)
        (*qkv, expected), keywords = balancer.batch_shard_by_document(
            inputs=[q, k, v, want], seq_dims=[1] * 4, cu_doc_lens=int32(DOCUMENTS),
            pad_values=[0.0] * 4,
        )  # fmt: skip
        real = expected.abs().sum((2, 3)) > 0
        for given in (tuple(qkv), torch.stack(qkv, 2)):
            got = backend(given, **keywords)
            assert float((got - expected)[real].abs().max()) < 1e-12
    with pytest.raises(ValueError, match="global_cu_doc_lens describes the whole sequence"):
        whole((q, k, v), global_cu_doc_lens=int32(DOCUMENTS))


def test_a_backend_takes_the_keywords_too() -> None:
    on_ranks(2, a_backend_alone)


def dropout(rank: int, n: int) -> Tensor:
    """Which weights rank drops: keys and values of one-hots show them."""
    torch.manual_seed(7)  # the same on all ranks
    layer = TorchAttentionBackend(head_dim=16, n_heads=2, dropout_p=0.5)
    layer.apply_cp(**place("ulysses", n)[0])
    q = torch.zeros(1, 8, 2, 16)
    v = torch.eye(16)[None, :, None].expand(1, 16, 2, 16)[:, 8 * rank : 8 * rank + 8]
    out = layer((q, q, v))
    after = torch.rand(4)
    dist.all_reduce(out_sum := torch.zeros(1))
    assert out_sum == 0
    kept = torch.cat([out > 0])  # (1, 8 own queries, 2 heads, 16 keys)
    everyone = [torch.empty_like(kept, dtype=torch.uint8) for _ in range(n)]
    dist.all_gather(everyone, kept.to(torch.uint8))
    kept = torch.cat(everyone, 1)[0]  # (16, 2, 16)
    assert not torch.equal(kept[:, 0], kept[:, 1])  # each head was another rank's
    layer.eval()
    assert torch.equal(layer((q, q, v)), layer((q, q, v)))
    return after


def test_ulysses_ranks_draw_different_dropout_with_equal_seeds() -> None:
    first, second = on_ranks(2, dropout)
    assert torch.equal(first, second)  # and their generators go on alike


def copies(rank: int, n: int) -> None:
    layer = make_layer("everything")
    arguments, balancer = place("balanced", n)
    layer.apply_cp(**arguments)
    x, dout = draw_input(1, 50, layer.d_model)
    want = run_sharded(layer, balancer, x, dout, DOCUMENTS)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        got = run_sharded(other, balancer, x, dout, DOCUMENTS)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert layer.state_dict().keys() == make_layer("everything").state_dict().keys()


def test_a_sharded_layer_copies_and_pickles() -> None:
    on_ranks(2, copies)


def compiled(rank: int, n: int, style: str) -> None:
    layer = make_layer("everything")
    arguments, balancer = place(style, n)
    layer.apply_cp(**arguments)
    x, dout = draw_input(1, 50, layer.d_model)
    want = run_sharded(layer, balancer, x, dout, DOCUMENTS)
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert error_of(run_sharded(fast, balancer, x, dout, DOCUMENTS), want) < 1e-12
    if style == "llama3":
        torch._dynamo.reset()
        with pytest.raises(Exception, match="needs global_cu_doc_lens too"):
            run_sharded(
                fast, balancer, x, dout, DOCUMENTS, lambda k: {m: k[m] for m in WITHOUT[style]}
            )


@pytest.mark.parametrize("style", ["zig_zag", "llama3"])
def test_a_sharded_layer_compiles_whole(style: str) -> None:
    on_ranks(2, compiled, style, timeout=120)


def model(rank: int, n: int, style: str) -> None:
    """A model of window and full layers: its loss and every gradient, over shards of labels too."""
    mixer = AttentionConfig(
        n_heads=4,
        n_kv_heads=2,
        dtype="float64",
        rope=RoPEConfig(theta=1000),
        sliding_window=SlidingWindowAttentionConfig(
            pattern=[4, -1],
            force_full_attention_on_first_layer=False,
            force_full_attention_on_last_layer=False,
        ),
    )
    config = TransformerConfig(
        d_model=16,
        n_layers=3,
        vocab_size=11,
        dtype="float64",
        blocks=[TransformerBlockConfig(sequence_mixer=mixer)],
    )
    whole = config.build()
    whole.init_weights(seed=0)
    sharded = copy.deepcopy(whole)
    arguments, balancer = place(style, n)
    sharded.apply_cp(**arguments)
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(11, (2, 1, 50), generator=generator)
    cu = int32(DOCUMENTS)
    loss = whole(ids, labels=labels, cu_doc_lens=cu, loss_reduction="sum")
    want = [loss.detach(), *torch.autograd.grad(loss, list(whole.parameters()))]
    (ids, labels), keywords = balancer.batch_shard_by_document(
        inputs=[ids, labels], seq_dims=[1, 1], cu_doc_lens=cu, pad_values=[0, -100]
    )
    loss = sharded(ids, labels=labels, loss_reduction="sum", **keywords)
    got = [loss.detach().clone(), *torch.autograd.grad(loss, list(sharded.parameters()))]
    for each in got:
        dist.all_reduce(each)
    assert error_of(got, want) < 1e-12


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
def test_a_model_of_window_and_full_layers(style: str) -> None:
    on_ranks(2, model, style)
