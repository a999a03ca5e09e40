"""A model cut into two pipeline stages whose ranks share each sequence: stages = whole.

Activations and their gradients are handed on by hand, with several microbatches of other lengths
in flight: what a layer keeps for a microbatch's backward pass must be that microbatch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import int32
from nn.attention.parallel.sharing import error, mesh_of
from olmo_core.nn.attention import (
    AttentionConfig,
    GatedDeltaNetConfig,
    SlidingWindowAttentionConfig,
)
from olmo_core.nn.attention.ring import (
    RingAttentionLoadBalancerType,
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import Transformer, TransformerBlockConfig, TransformerConfig

pytestmark = pytest.mark.distributed

D, V = 16, 11
MICROBATCHES = ([0, 5, 5, 16], [0, 1, 2, 20, 28], [0, 8])
"""Cumulative lengths of each one's documents."""
SCHEDULES = {
    "all forward, then backward": "F0 F1 B0 B1",
    "last in, first out": "F0 F1 B1 B0",
    "one forward, one backward": "F0 F1 B0 F2 B1 B2",
}


def build() -> Transformer:
    """The same on all ranks. In each stage an attention with a window and a delta net."""
    full = AttentionConfig(n_heads=4, n_kv_heads=2)
    sliding = SlidingWindowAttentionConfig([6], force_full_attention_on_first_layer=False)
    window = dataclasses.replace(full, rope=RoPEConfig(), sliding_window=sliding)
    delta = GatedDeltaNetConfig(n_heads=2)
    config = TransformerConfig(
        d_model=D,
        n_layers=4,
        vocab_size=V,
        dtype="float64",
        blocks=[TransformerBlockConfig(sequence_mixer=m) for m in (window, delta, full)],
        pattern=[0, 1, 2, 1],
    )
    model = config.build()
    model.init_weights(seed=0)
    return model


def draw(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """A microbatch's tokens, labels and documents: the same on all ranks."""
    cu = MICROBATCHES[index]
    generator = torch.Generator().manual_seed(index)
    ids, labels = torch.randint(V, (2, 1, cu[-1]), generator=generator)
    return ids, labels, int32(cu)


class Stage:
    """Half of a model on the ranks of one stage, and what its microbatches in flight hold."""

    def __init__(self, model: Transformer, place: int, balancer: Any, other: int, recompute: bool):
        half = len(model.blocks) // 2
        self.model, self.first, self.balancer, self.other = model, place == 0, balancer, other
        self.blocks = model.blocks[:half] if self.first else model.blocks[half:]
        self.recompute = recompute
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.losses: dict[int, Tensor] = {}

    def forward(self, index: int) -> None:
        ids, labels, cu = draw(index)
        (ids, labels), lengths = self.balancer.batch_shard_by_document(
            inputs=[ids, labels], seq_dims=[1, 1], cu_doc_lens=cu, pad_values=[0, -100]
        )
        if self.first:
            x = start = self.model.embeddings(ids)
        else:
            start = torch.empty(*ids.shape, D, dtype=torch.float64)
            dist.recv(start, self.other)
            x = start.requires_grad_()
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=False, **lengths)
            else:
                x = block(x, **lengths)
        if self.first:
            dist.send(x.detach().contiguous(), self.other)
        else:
            head = self.model.lm_head
            x = head.loss(x, self.model.embeddings.weight, labels, -100)
            self.losses[index] = x.detach().clone()
        self.held[index] = start, x

    def backward(self, index: int) -> None:
        start, out = self.held.pop(index)
        if self.first:
            dout = torch.empty_like(out)
            dist.recv(dout, self.other)
            out.backward(dout)
        else:
            out.backward()
            assert start.grad is not None
            dist.send(start.grad, self.other)


def staged(rank: int, n: int, style: str, recompute: bool) -> None:
    mesh = mesh_of(2, 2, names=("pp", "cp"))
    cp, place = mesh["cp"], mesh["pp"].get_local_rank()
    kind = RingAttentionLoadBalancerType(style)
    if style == "ulysses":
        arguments: dict[str, Any] = {"uly": UlyssesContextParallelStyle()}
    else:
        arguments = {"ring": RingContextParallelStyle(kind)}
    whole = build()
    for schedule in SCHEDULES.values():
        steps = schedule.split()
        indices = sorted({int(step[1:]) for step in steps})
        whole.zero_grad()
        losses = {}
        for i in indices:
            ids, labels, cu = draw(i)
            loss = whole(ids, labels=labels, cu_doc_lens=cu, loss_reduction="sum")
            loss.backward()
            losses[i] = loss.detach()

        model = build()
        model.apply_cp(cp, **arguments)
        stage = Stage(model, place, kind.build(cp), (rank + 2) % 4, recompute)
        run: dict[str, Callable[[int], None]] = {"F": stage.forward, "B": stage.backward}
        for step in steps:
            run[step[0]](int(step[1:]))
        for i, loss in stage.losses.items():
            dist.all_reduce(loss, group=cp.get_group())
            assert error(loss, losses[i]) < 1e-12, (schedule, i)
        used = [
            (p, q) for p, q in zip(model.parameters(), whole.parameters()) if p.grad is not None
        ]
        assert len(used) >= sum(1 for b in stage.blocks for _ in b.parameters())
        for p, q in used:
            assert p.grad is not None and q.grad is not None
            dist.all_reduce(p.grad, group=cp.get_group())
            assert error(p.grad, q.grad) < 1e-12, schedule


@pytest.mark.parametrize("style", ["zig_zag", "llama3"])
def test_two_stages_of_two_ranks(style: str) -> None:
    on_ranks(4, staged, style, False)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("style", ["zig_zag", "llama3", "balanced", "ulysses"])
def test_every_style_checkpointed_too(style: str, recompute: bool) -> None:
    on_ranks(4, staged, style, recompute, timeout=200)
