"""A sharded gated delta net compiled, checkpointed, in half precision, and in a training hybrid."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from gloo_ranks import on_ranks
from nn.attention.parallel.test_gated_delta_net import build, error_of
from nn.attention.parallel.test_layers import (
    draw_input,
    int32,
    place,
    run_sharded,
    run_whole,
)
from nn.attention.parallel.test_modes import gradients, same
from olmo_core.data.documents import load_documents
from olmo_core.data.packing import IGNORE_INDEX, PackedDocuments
from olmo_core.data.vocabulary import ByteVocabulary
from olmo_core.distributed.collectives import count_traffic
from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

pytestmark = pytest.mark.distributed


def modes(rank: int, n: int, style: str) -> None:
    _, layer, _ = build("groups", style, n)
    weights = list(layer.parameters())

    def function(x: Tensor, cu: Tensor) -> Tensor:
        return x + layer(x, global_cu_doc_lens=cu)

    batches = []
    for i, lengths in enumerate(((3, 50, 20), (70, 7, 1), (1, 100, 9))):
        cu = int32([0, *(2 * n * c for c in accumulate(lengths))])
        generator = torch.Generator().manual_seed(i + 100 * rank)
        x = torch.randn(1, int(cu[-1]) // n, 12, generator=generator, dtype=torch.float64)
        batches.append((x, cu))
    order = (1, 2, 0)
    with count_traffic() as plain:
        want = gradients(function, weights, batches, order)
    assert same(gradients(function, weights, batches, order), want)

    def checkpointed(x: Tensor, cu: Tensor) -> Tensor:
        return checkpoint(function, x, cu, use_reentrant=False)

    with count_traffic() as repeated:
        assert same(gradients(checkpointed, weights, batches, order), want)
    assert repeated.messages > plain.messages

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(checkpointed, fullgraph=True, backend=counter)
    got = gradients(fast, weights, batches, order)
    assert error_of(got, want) < 1e-12
    assert counter.frame_count <= 2

    (x, cu), layer = batches[0], layer.float()
    x = x.float().requires_grad_()
    exact = layer(x, global_cu_doc_lens=cu)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, global_cu_doc_lens=cu)
    assert 1e-5 < float((out - exact).norm() / exact.norm()) < 2e-2
    out.float().square().sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in layer.parameters())
    with torch.inference_mode():
        assert torch.equal(layer(x.clone(), global_cu_doc_lens=cu.clone()), exact)


@pytest.mark.parametrize(
    "style",
    [
        "zig_zag",
        pytest.param("llama3", marks=pytest.mark.slow),
        pytest.param("ulysses", marks=pytest.mark.slow),
    ],
)
def test_compiled_checkpointed_and_under_autocast(style: str) -> None:
    on_ranks(2, modes, style, timeout=200)


def second_derivative(rank: int, n: int) -> None:
    _, layer, _ = build("groups", "llama3", n)
    x = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_a_second_derivative_raises() -> None:
    on_ranks(2, second_derivative)


def half_precision(rank: int, n: int, style: str) -> tuple[float, float]:
    """Errors of out and dx in bfloat16 against float64, on a shard and on one rank."""
    whole, sharded, balancer = build("groups", style, n)
    cu = [0, 40, 41, 96 * n]
    x, dout = draw_input(1, cu[-1], whole.d_model)
    for layer in (whole, sharded):
        layer.bfloat16().to(torch.float64)
    x, dout = (y.bfloat16().double() for y in (x, dout))
    want = run_whole(whole, x, dout, cu)[:2]
    for layer in (whole, sharded):
        layer.bfloat16()
    x, dout = x.bfloat16(), dout.bfloat16()
    errors = []
    for got in (
        run_sharded(sharded, balancer, x, dout, cu)[:2],
        run_whole(whole, x, dout, cu)[:2],
    ):
        errors.append(sum(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)))
    return errors[0], errors[1]


@pytest.mark.parametrize("style", ["zig_zag", "llama3", "ulysses"])
def test_bfloat16_is_as_near_to_float64_as_on_one_rank(style: str) -> None:
    for sharded, whole in on_ranks(2, half_precision, style):
        assert sharded <= 1.2 * whole


def trained(rank: int, n: int, style: str, steps: int) -> None:
    """Float64 losses of a hybrid over AdamW steps on packed scenes, sharded and on one rank."""
    attention = AttentionConfig(
        n_heads=4,
        n_kv_heads=2,
        dtype="float64",
        rope=RoPEConfig(theta=1000),
        qk_norm=LayerNormConfig(),
    )
    delta = GatedDeltaNetConfig(n_heads=2, n_v_heads=4, head_dim=4, dtype="float64")
    blocks = [TransformerBlockConfig(sequence_mixer=m) for m in (delta, delta, delta, attention)]
    config = TransformerConfig(
        d_model=16, n_layers=4, vocab_size=ByteVocabulary().size, dtype="float64", blocks=blocks
    )
    whole = config.build()
    whole.init_weights(seed=0)
    sharded = copy.deepcopy(whole)
    arguments, balancer = place(style, n)
    sharded.apply_cp(**arguments)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (whole, sharded)]
    packed = PackedDocuments(
        load_documents()[:12], batch_size=1, sequence_length=160, max_doc_len=100
    )
    losses: list[list[float]] = [[], []]
    for step in range(steps):
        batch = packed.batch(step)
        ids, labels, (cu, _) = batch.input_ids, batch.labels, batch.doc_lens
        n_labels = int((labels != IGNORE_INDEX).sum())
        assert len(set(cu.tolist())) > 2
        for i, model in enumerate((whole, sharded)):
            optimizers[i].zero_grad()
            keywords: dict[str, Any] = {"cu_doc_lens": cu}
            inputs = [ids, labels]
            if model is sharded:
                inputs, keywords = balancer.batch_shard_by_document(
                    inputs=inputs, seq_dims=[1, 1], cu_doc_lens=cu, pad_values=[0, IGNORE_INDEX]
                )
            loss = model(inputs[0], labels=inputs[1], loss_reduction="sum", **keywords) / n_labels
            loss.backward()
            total = loss.detach().clone()
            if model is sharded:
                dist.all_reduce(total)
                for p in model.parameters():
                    dist.all_reduce(p.grad)
            optimizers[i].step()
            losses[i].append(float(total))
    assert losses[0][-1] < losses[0][0]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    assert max(apart) < 1e-10, apart


@pytest.mark.parametrize("style", ["llama3", "zig_zag"])
def test_a_hybrid_trains_as_on_one_rank(style: str) -> None:
    on_ranks(2, trained, style, 6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("style", ["llama3", "zig_zag"])
def test_a_hybrid_trains_for_longer(n: int, style: str) -> None:
    on_ranks(n, trained, style, 20, timeout=200)
