"""Heads dealt to one dimension of a mesh, and something else to the other."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import int32
from nn.attention.parallel.sharing import Block, D, check_gradients, error, make, mesh_of, whole
from olmo_core.nn.attention import Attention, GatedDeltaNet, NormalizedAttention
from olmo_core.nn.attention.ring import (
    RingAttentionLoadBalancerType,
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)
from olmo_core.nn.layer_norm import LayerNormConfig

pytestmark = pytest.mark.distributed

CU = int32([0, 5, 5, 16])


def with_fsdp(rank: int, n: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2, 2, names=("dp", "tp"))
    mine = mesh["dp"].get_local_rank()
    x = torch.randn(2, 1, 16, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in ("full norm, clip", "ngpt", "fused", "gva"):
        reference, block = Block(make(name)), Block(make(name))
        block.mixer.apply_tp(mesh["tp"])
        fully_shard(block, mesh=mesh["dp"])
        for (path, p), q in zip(block.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(whole(p), q), (name, path)
        want = [reference(one, cu_doc_lens=CU) for one in x]
        (sum(y.square().sum() for y in want) / 2).backward()
        out = block(x[mine], cu_doc_lens=CU)
        assert block.seen["cu_doc_lens"] is CU  # so that all layers share one reading of it
        out.square().sum().backward()
        assert error(out, want[mine]) < 1e-12, name
        check_gradients(block, reference)
        if name == "ngpt":
            block.mixer.normalize_matrices()
            reference.mixer.normalize_matrices()
            for p, q in zip(block.parameters(), reference.parameters(), strict=True):
                assert error(p, q) < 1e-12


def test_fsdp_around_it() -> None:
    on_ranks(4, with_fsdp, timeout=120)


def with_context(
    rank: int, n: int, style: str, names: list[str], ring: int = 0, ulysses: int = 0
) -> None:
    """:param ring: The ring's degree where Ulysses groups of ``ulysses`` ranks are inside it; the
    rest of the ranks share heads."""
    kind = RingAttentionLoadBalancerType(style)
    uly, rings = UlyssesContextParallelStyle(), RingContextParallelStyle
    if ring:
        mesh = mesh_of(ring, ulysses, n // (ring * ulysses), names=("ring", "ulysses", "tp"))
        cp, tp = mesh["ring", "ulysses"], mesh["tp"]
        arguments: dict[str, Any] = {"ring": rings(kind), "uly": uly}
    else:
        mesh = mesh_of(2, 2, names=("cp", "tp"))
        cp, tp = mesh["cp"], mesh["tp"]
        arguments = {"uly": uly} if style == "ulysses" else {"ring": rings(kind, head_stride=2)}
    balancer = kind.build(cp)
    groups = [cp.get_group(name) for name in cp.mesh_dim_names]
    x, dout = torch.randn(
        2, 1, 16, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for name in names:
        reference = make(name)
        x_whole = x.clone().requires_grad_()
        want = reference(x_whole, cu_doc_lens=CU)
        want.backward(dout)
        for tp_first in (True, False):
            layer = make(name)
            if tp_first:
                layer.apply_tp(tp)
                layer.apply_cp(cp, **arguments)
            else:
                layer.apply_cp(cp, **arguments)
                layer.apply_tp(tp)
            leaf = x.clone().requires_grad_()
            (x_mine, dout_mine, want_mine), keywords = balancer.batch_shard_by_document(
                inputs=[leaf, dout, want.detach()], seq_dims=[1, 1, 1],
                cu_doc_lens=CU, pad_values=[0.0, 0.0, 0.0],
            )  # fmt: skip
            out = layer(x_mine, **keywords)
            out.backward(dout_mine)
            real = out.shape[1] if style == "llama3" else None  # no row of padding has a target
            assert error(out[:, :real] * (want_mine != 0), want_mine) < 1e-12, (name, tp_first)
            for group in groups:
                dist.all_reduce(leaf.grad, group=group)
            assert error(leaf.grad, x_whole.grad) < 1e-12, (name, tp_first)
            for p in layer.parameters():
                for group in groups:
                    dist.all_reduce(p.grad.to_local(), group=group)
            check_gradients(layer, reference)


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "ulysses"])
def test_context_parallelism_beside_it(style: str) -> None:
    on_ranks(4, with_context, style, ["full norm, clip", "ngpt", "gva"])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
def test_every_layer_with_context_parallelism(style: str) -> None:
    names = ["head norm, headwise gate, window", "layer norm", "ngpt, full norm", "fused"]
    on_ranks(4, with_context, style, names, timeout=200)


@pytest.mark.parametrize(
    ("style", "ring", "ulysses"), [("zig_zag", 2, 1), ("balanced", 1, 2), ("llama3", 2, 2)]
)
def test_a_hybrid_beside_it_on_four_ranks(style: str, ring: int, ulysses: int) -> None:
    on_ranks(4, with_context, style, ["full norm, clip", "gva"], ring, ulysses)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced"])
def test_a_hybrid_beside_it_on_eight_ranks(style: str) -> None:
    names = ["full norm, clip", "head norm, headwise gate, window", "ngpt", "gva"]
    on_ranks(8, with_context, style, names, 2, 2, timeout=400)


def heads_for_both(rank: int, n: int) -> None:
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    for tp_first in (True, False):
        layer = Attention(d_model=8, n_heads=2)
        first, second = (
            lambda: layer.apply_tp(mesh["tp"]),  # noqa: B023
            lambda: layer.apply_cp(mesh["cp"], uly=UlyssesContextParallelStyle()),  # noqa: B023
        )
        if not tp_first:
            first, second = second, first
        first()
        with pytest.raises(ValueError, match="Ulysses can't deal 1 query heads"):
            second()


def test_ulysses_deals_the_heads_of_one_rank() -> None:
    on_ranks(4, heads_for_both)


def moved_rows(rank: int, n: int) -> None:
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    layer = GatedDeltaNet(d_model=8, n_heads=2)
    layer.apply_cp(mesh["cp"], ring=RingContextParallelStyle())
    with pytest.raises(RuntimeError, match="moves its output's rows"):
        layer.apply_tp(mesh["tp"], use_local_output=False)
    layer.apply_tp(mesh["tp"])


def test_a_delta_net_that_shares_both_has_whole_outputs() -> None:
    on_ranks(4, moved_rows)


def policies(rank: int, n: int) -> None:
    """bfloat16 matrices, float32 norms and gates: what FSDP2 refuses in one group."""
    from torch.distributed.fsdp import fully_shard

    bf16 = {"d_model": 16, "n_heads": 4, "dtype": torch.bfloat16}
    norm = LayerNormConfig(name="rms", bias=False)
    builds = (
        lambda: Attention(**bf16, qk_norm=norm),
        lambda: NormalizedAttention(**bf16, qk_norm=norm),
        lambda: GatedDeltaNet(**bf16),
        lambda: Attention(d_model=16, n_heads=4, qk_norm=norm),
    )
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    cu = int32([0, 3, 8])
    for build in builds:
        for with_tp in (False, True):
            torch.manual_seed(0)
            reference, block = Block(build()), Block(build())
            block.load_state_dict(reference.state_dict())
            if with_tp:
                block.mixer.apply_tp(mesh["tp"])
            policy = block.mixer.fsdp_policy()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for group in policy.groups:
                    fully_shard(group, mesh=mesh["dp"], mp_policy=policy.mp_policy)
                fully_shard(block, mesh=mesh["dp"], mp_policy=policy.mp_policy)
                x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(2))
                x = x.to(block.mixer.w_out.weight.dtype)
                for _ in range(2):  # the second gathers what the first has let go
                    block.zero_grad()
                    reference.zero_grad()
                    want, out = reference(x, cu_doc_lens=cu), block(x, cu_doc_lens=cu)
                    want.float().square().mean().backward()
                    out.float().square().mean().backward()
            bound = 0.05 if x.dtype == torch.bfloat16 else 1e-5
            assert error(out.float(), want.float()) < bound
            for p, q in zip(block.parameters(), reference.parameters(), strict=True):
                assert p.dtype == q.dtype == p.grad.dtype
                assert error(p.grad.float(), q.grad.float()) < bound


def test_fsdp_policies_keep_dtypes_apart() -> None:
    on_ranks(4, policies)
