"""A gated delta net on a shard, with what each load balancer returned: shard = whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gloo_ranks import errors_on_ranks, on_ranks
from nn.attention.parallel.test_layers import (
    WITHOUT,
    draw_input,
    int32,
    place,
    run_sharded,
    run_whole,
)
from olmo_core.distributed.collectives import count_traffic
from olmo_core.nn.attention import GatedDeltaNet
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.attention.parallel.state_exchange import state_plan

pytestmark = pytest.mark.distributed

STYLES = (
    *("zig_zag", "llama3", "balanced", "ulysses"),
    *("zig_zag+ulysses", "llama3+ulysses", "balanced+ulysses"),
)
SIZES: dict[str, dict[str, Any]] = {
    "groups": {"n_heads": 2, "n_v_heads": 4},
    "one key head": {"n_heads": 1, "n_v_heads": 4, "conv_bias": True},
    "as many": {"n_heads": 4, "n_v_heads": 4},
    "three": {"n_heads": 3, "n_v_heads": 6, "conv_bias": True},
}


def make_gdn(sizes: str, **options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)  # the same weights on all ranks
    options = {"head_dim": 6, "expand_v": 1.5, "dtype": torch.float64, **SIZES[sizes], **options}
    layer = GatedDeltaNet(d_model=12, **options)
    with torch.no_grad():
        layer.A_log.copy_(torch.linspace(-3, 1, layer.n_v_heads))
        for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
            if conv.bias is not None:
                conv.bias.normal_()
    return layer


def documents(n: int) -> Iterator[list[int]]:
    """Cumulative lengths for ``n`` ranks."""
    m = 2 * n
    yield [0, 6 * m]
    yield [0, 3 * m, 3 * m, 4 * m, 9 * m, 12 * m]
    yield [m * i for i in range(7)]  # chunks of one token
    yield [0, 1, 2, 3, 17, 20, 21, 47]  # padded by some balancers
    yield [0, 20 * m, 28 * m]
    yield [0, m]  # shards shorter than the kernel
    yield [0, 3, 2 * n + 1]


def error_of(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def exact(rank: int, n: int, style: str, names: tuple[str, ...]) -> float:
    worst = 0.0
    for name in names:
        whole = make_gdn(name)
        sharded = copy.deepcopy(whole)
        arguments, balancer = place(style, n)
        sharded.apply_cp(**arguments)
        cases: list[tuple[int, list[int] | None]] = [(1, cu) for cu in documents(n)]
        if not style.startswith("llama3"):  # which shards by document alone
            cases.append((2, None))
        for batch, cu in cases:
            x, dout = draw_input(batch, 24 if cu is None else cu[-1], whole.d_model)
            want = run_whole(whole, x, dout, cu)
            got = run_sharded(sharded, balancer, x, dout, cu)
            worst = max(worst, error_of(got, want))
            assert worst < 1e-11, (name, cu, worst)
    return worst


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
def test_on_two_ranks(style: str) -> None:
    on_ranks(2, exact, style, ("one key head",))


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "ulysses"])
def test_on_three_ranks(style: str) -> None:
    on_ranks(3, exact, style, ("three",))


@pytest.mark.parametrize("style", ["zig_zag+ulysses", "llama3+ulysses"])
def test_on_a_ring_with_ulysses_inside(style: str) -> None:
    on_ranks(4, exact, style, ("groups",))


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_everything(n: int, style: str) -> None:
    if "+" in style and n != 4:
        return
    names = ("three",) if n == 3 else ("groups", "one key head", "as many")
    on_ranks(n, exact, style, names, timeout=200)


def build(name: str, style: str, n: int) -> tuple[GatedDeltaNet, GatedDeltaNet, Any]:
    """A layer, the same sharded, and the load balancer that shards for it."""
    whole = make_gdn(name)
    sharded = copy.deepcopy(whole)
    arguments, balancer = place(style, n)
    sharded.apply_cp(**arguments)
    return whole, sharded, balancer


def longer_chunks(rank: int, n: int) -> None:
    """Shards of several chunks of the rule, extreme decays and keys that are all alike."""
    whole, sharded, balancer = build("groups", "zig_zag", n)
    cu = [0, 160, 160 + 4 * n, 300 + 20 * n]
    x, dout = draw_input(1, cu[-1], whole.d_model)
    for case in ("ordinary", "decays", "alike"):
        for layer in (whole, sharded):
            with torch.no_grad():
                if case == "decays":  # log decays down to about -80
                    layer.A_log.fill_(4.0)
                    layer.dt_bias.fill_(1.0)
                elif case == "alike":
                    layer.A_log.fill_(-9.0)
                    layer.w_b.weight.zero_().add_(9.0)  # beta at 0 or 2
        inputs = x if case != "alike" else x[:, :1].abs().expand_as(x) + 1e-3 * x
        want = run_whole(whole, inputs, dout, cu)
        got = run_sharded(sharded, balancer, inputs, dout, cu)
        assert error_of(got[:2], want[:2]) < (1e-9 if case == "alike" else 1e-11), case


def test_several_chunks_extreme_decays_and_correlated_keys() -> None:
    on_ranks(3, longer_chunks)


def test_plans_of_states() -> None:
    reading = Reading([0, 4, 4, 17, 24, 32], torch.device("cpu"))
    plans = [state_plan(reading, 4, rank) for rank in range(4)]  # of 8 tokens each
    assert [list(p.before) for p in plans] == [[], [0], [0, 1], []]
    assert [list(p.after) for p in plans] == [[1, 2], [2], [], []]
    assert [p.first_stop for p in plans] == [4, 8, 1, 8]
    assert [p.last_start for p in plans] == [4, 0, 1, 0]
    lists = [None if p.documents is None else p.documents.tolist() for p in plans]
    assert lists == [[0, 4, 8], None, [0, 1, 8], None]
    assert all(p.moves for p in plans)
    assert state_plan(Reading([0, 8, 24, 32], torch.device("cpu")), 2, 0).moves
    assert not state_plan(Reading([0, 8, 16, 32], torch.device("cpu")), 2, 0).moves


def a_document_of_nan(rank: int, n: int) -> None:
    """It is cut by a boundary, and reaches no further than on one rank."""
    whole, sharded, balancer = build("groups", "llama3", n)
    cu = [0, 20, 64, 128]  # 32 tokens a rank: the rule's chunks are the same on one rank
    x, _ = draw_input(1, 128, whole.d_model)
    own = slice(32 * rank, 32 * rank + 32)
    for start, stop in ((20, 64), (64, 128)):
        bad = x.clone()
        bad[:, start:stop] = float("nan")
        want = run_whole(whole, bad, torch.ones_like(bad), cu)[:2]
        _, keywords = balancer.batch_shard_by_document(
            inputs=[x], seq_dims=[1], cu_doc_lens=int32(cu)
        )
        shard = bad[:, own].clone().requires_grad_()
        out = sharded(shard, **keywords)
        got = [out, *torch.autograd.grad(out, shard, torch.ones_like(out))]
        elsewhere = stop <= 32 * rank or start >= 32 * (rank + 1)
        for mine, theirs in zip(got, want, strict=True):
            good, may = (y[0].isfinite().all(-1) for y in (mine, theirs[:, own]))
            assert (good | ~may).all(), start
            assert good.all() == elsewhere, start


def test_a_document_of_nan_spreads_no_further_than_on_one_rank() -> None:
    on_ranks(4, a_document_of_nan, timeout=30)


def sent(rank: int, n: int) -> None:
    _, layer, balancer = build("groups", "zig_zag", n)
    heads, key_dim, value_dim = layer.n_v_heads, layer.head_k_dim, layer.head_v_dim
    maps = (n - 1) * heads * key_dim * (key_dim + value_dim) * 8
    halo = (layer.conv_size - 1) * layer._sizes.conv_channels * 8
    for total in (16 * n, 64 * n):
        x, dout = draw_input(1, total, layer.d_model)
        with count_traffic() as traffic:
            run_sharded(layer, balancer, x, dout, [0, total])
        relayouts = traffic.bytes - 2 * maps
        most = 4 * (total // n) * layer.d_model * 8
        assert 0 < relayouts <= most + 2 * halo
        assert relayouts > most // 2 - 1  # zig-zag moves at least half of its rows
    _, layer, balancer = build("groups", "llama3", n)
    for total in (16 * n, 64 * n):
        x, dout = draw_input(1, total, layer.d_model)
        with count_traffic() as traffic:
            run_sharded(layer, balancer, x, dout, [0, total])
        # Forward to the next rank, backward to the one before.
        assert traffic.bytes == 2 * maps + halo * ((rank < n - 1) + (rank > 0))
        with count_traffic() as traffic:
            run_sharded(layer, balancer, x, dout, [total // n * i for i in range(n + 1)])
        assert traffic.bytes == 0


@pytest.mark.parametrize("n", [2, 3])
def test_what_is_sent_does_not_grow_with_the_tokens(n: int) -> None:
    on_ranks(n, sent)


def keywords_and_refusals(rank: int, n: int) -> None:
    from torch.distributed.fsdp import fully_shard

    whole, sharded, balancer = build("groups", "llama3", n)
    cu = [0, 3, 3, 20, 21, 37, 50]
    x, dout = draw_input(1, 50, whole.d_model)
    want = run_whole(whole, x, dout, cu)
    for style, names in WITHOUT.items():
        if "+" in style:
            continue
        _, sharded, balancer = build("groups", style, n)
        for some in (names, ("global_cu_doc_lens",)):
            change = lambda k: {m: k[m] for m in some}  # noqa: B023, E731
            assert error_of(run_sharded(sharded, balancer, x, dout, cu, change), want) < 1e-11
        for other in (copy.deepcopy(sharded), pickle.loads(pickle.dumps(sharded))):
            got = run_sharded(other, balancer, x, dout, cu)
            assert error_of(got, want) < 1e-11

    arguments, _ = place("zig_zag", n)
    ulysses, _ = place("ulysses", n)
    with pytest.raises(RuntimeError, match="Generate from a model that is not sharded"):
        sharded.init_kv_cache_manager(1, 8)
    with pytest.raises(RuntimeError, match="apply_cp was called twice on one GatedDeltaNet"):
        sharded.apply_cp(**arguments)
    cached = make_gdn("groups")
    cached.init_kv_cache_manager(1, 8)
    with pytest.raises(RuntimeError, match="has a decoding cache, which holds whole sequences"):
        cached.apply_cp(**arguments)
    with pytest.raises(ValueError, match=r"can't deal 3 value heads .* load_balancer='llama3'"):
        GatedDeltaNet(d_model=6, n_heads=3).apply_cp(**ulysses)
    with pytest.raises(ValueError, match="cache_leftpad pads rows on the left"):
        sharded(x[:, :25], cache_leftpad=int32([1]))
    hooked = make_gdn("groups")
    hooked.q_conv1d.register_forward_hook(lambda *_: None)
    hooked.apply_cp(**arguments)
    with pytest.raises(RuntimeError, match="hooks of q_conv1d"):
        hooked(x[:, :24], global_cu_doc_lens=int32([0, 48]))
    alone = make_gdn("groups")  # FSDP2 would gather the weights when the convolution is called
    fully_shard(alone.q_conv1d, mesh=arguments["cp_mesh"])
    alone.apply_cp(**arguments)
    with pytest.raises(RuntimeError, match="hooks of q_conv1d"):
        alone(x[:, :24], global_cu_doc_lens=int32([0, 48]))


def test_keywords_copies_and_what_is_refused() -> None:
    on_ranks(2, keywords_and_refusals)


def other_documents(rank: int, n: int, style: str) -> None:
    _, sharded, _ = build("groups", style, n)
    cu = [0, 8, 24] if rank == 0 else [0, 16, 24]
    sharded(torch.zeros(1, 12, 12, dtype=torch.float64), global_cu_doc_lens=int32(cu))


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "ulysses"])
def test_ranks_with_other_documents_raise(style: str) -> None:
    errors = errors_on_ranks(2, other_documents, style, timeout=20)
    assert all(e is not None and e.startswith("DisagreementError") for e in errors)
