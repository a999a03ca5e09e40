"""Compiled, checkpointed, under autocast, microbatches in flight: the bits of plain eager code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gloo_ranks import on_ranks
from nn.attention.parallel.schedules import SCALE, context_of, int32
from olmo_core.distributed.collectives import count_traffic
from olmo_core.nn.attention.parallel.positions import shard_positions
from olmo_core.nn.attention.parallel.schedule import attend_sharded

pytestmark = pytest.mark.distributed

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 32
SCHEDULES: dict[str, tuple[str | None, int, int]] = {
    "ring": ("zig_zag", -1, 1),
    "gather": ("zig_zag", 7, 1),
    "balanced": ("balanced", -1, 1),
    "ulysses": (None, -1, 1),
    "hybrid": ("zig_zag", -1, 2),
}
"""Layout, window, and the Ulysses degree inside the ring."""
Layer = Callable[[Tensor, Tensor], Tensor]


def make_layer(schedule: str, n: int, weights: Sequence[Tensor]) -> Layer:
    """Projections around attention, with positions added to the values."""
    layout, window, ulysses = SCHEDULES[schedule]
    context = context_of(n, layout, ulysses=ulysses)
    w_q, w_k, w_v, w_out = weights

    def layer(x: Tensor, cu: Tensor) -> Tensor:
        position = shard_positions(
            x, cu, context.layout, False,
            context.ring_degree, context.ring_rank, context.ulysses_degree, context.ulysses_rank,
        )  # fmt: skip
        x = x + position[..., None].to(x.dtype) / 100
        q, k, v = (
            (x @ w).unflatten(-1, (heads, DIM))
            for w, heads in ((w_q, HEADS), (w_k, KV_HEADS), (w_v, KV_HEADS))
        )
        out = attend_sharded(q, k, v, context, cu, window=window, scale=SCALE, kernel="torch")
        return x + out.flatten(2) @ w_out

    return layer


def make_weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, HEADS * DIM), (WIDTH, KV_HEADS * DIM), (WIDTH, KV_HEADS * DIM)]
    shapes.append((HEADS * DIM, WIDTH))
    return [
        (torch.randn(shape, generator=generator, dtype=dtype) * 0.2).requires_grad_()
        for shape in shapes
    ]


def batch(rank: int, n: int, lengths: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """This rank's hidden states and all documents, of multiples of ``2 * n`` tokens."""
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + 2 * n * length)
    generator = torch.Generator().manual_seed(seed + 100 * rank)
    x = torch.randn(1, cu[-1] // n, WIDTH, generator=generator, dtype=torch.float64)
    return x, int32(cu)


MICROBATCHES = ((3, 5, 1), (2, 7, 4, 1), (1, 1, 1, 1, 1))


def gradients(
    layer: Layer, weights: list[Tensor], batches: list[tuple[Tensor, Tensor]], order: Sequence[int]
) -> list[Tensor]:
    """Of three microbatches through two layers that share weights; backward in ``order``."""
    for w in weights:
        w.grad = None
    inputs = [x.clone().requires_grad_() for x, _ in batches]
    losses = []
    for x, (_, cu) in zip(inputs, batches, strict=True):
        losses.append((layer(layer(x, cu), cu) ** 2).sum())
    for i in order:
        losses[i].backward()
    grads = [*(w.grad for w in weights), *(x.grad for x in inputs)]
    assert all(g is not None for g in grads)
    return [g.clone() for g in grads if g is not None]


def saved(*names: str) -> Any:
    """A policy that saves the outputs of these ops and recomputes everything else."""
    ops = {getattr(torch.ops.olmo_core, name).default for name in names}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def checkpoints(rank: int, n: int, schedule: str) -> None:
    weights = make_weights()
    layer = make_layer(schedule, n, weights)
    batches = [batch(rank, n, lengths, i) for i, lengths in enumerate(MICROBATCHES)]
    order = (1, 2, 0)  # sums of weights' gradients depend on it
    with count_traffic() as plain:
        want = gradients(layer, weights, batches, order)

    def checkpointed(x: Tensor, cu: Tensor) -> Tensor:
        return checkpoint(layer, x, cu, use_reentrant=False)

    with count_traffic() as repeated:
        assert same(gradients(checkpointed, weights, batches, order), want)
    assert repeated.messages > plain.messages

    ops = ("gather", "ring", "swap_heads", "shard_positions", "attend")

    def selective(x: Tensor, cu: Tensor) -> Tensor:
        return checkpoint(layer, x, cu, use_reentrant=False, context_fn=saved(*ops))

    with count_traffic() as traffic:
        assert same(gradients(selective, weights, batches, order), want)
    assert traffic == plain


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "hybrid"])
def test_checkpointing_keeps_the_bits(schedule: str) -> None:
    on_ranks(2, checkpoints, schedule)


def test_checkpointing_keeps_the_bits_of_a_hybrid() -> None:
    on_ranks(4, checkpoints, "hybrid")


def compiled(rank: int, n: int, schedule: str, backend: str) -> None:
    weights = make_weights()
    layer = make_layer(schedule, n, weights)
    batches = [batch(rank, n, lengths, i) for i, lengths in enumerate(MICROBATCHES)]
    order = (1, 2, 0)
    want = gradients(layer, weights, batches, order)

    def checkpointed(x: Tensor, cu: Tensor) -> Tensor:
        return checkpoint(layer, x, cu, use_reentrant=False)

    for function in (layer, checkpointed) if backend == "aot_eager" else (checkpointed,):
        torch._dynamo.reset()
        fast = torch.compile(function, fullgraph=True, backend=backend)
        got = gradients(fast, weights, batches, order)
        if backend == "aot_eager":
            assert same(got, want)
        else:  # its matrix products sum in another order
            assert max(float((a - b).abs().max()) for a, b in zip(got, want)) < 1e-11


@pytest.mark.parametrize(
    "schedule",
    [
        "ring",
        pytest.param("gather", marks=pytest.mark.slow),  # by Inductor below
        pytest.param("balanced", marks=pytest.mark.slow),  # gather in another layout
        "ulysses",
    ],
)
def test_compiled_with_aot_eager(schedule: str) -> None:
    on_ranks(2, compiled, schedule, "aot_eager", timeout=120)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("ring", marks=pytest.mark.slow),
        "gather",
        pytest.param("ulysses", marks=pytest.mark.slow),
    ],
)
def test_compiled_with_inductor(schedule: str) -> None:
    on_ranks(2, compiled, schedule, "inductor", timeout=280)


@pytest.mark.slow
def test_a_compiled_hybrid() -> None:
    on_ranks(4, compiled, "hybrid", "aot_eager", timeout=280)


def graphs(rank: int, n: int, schedule: str) -> int:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weights = make_weights()
    layer = make_layer(schedule, n, weights)
    fast = torch.compile(layer, fullgraph=True, backend=counter)
    lengths = ((3, 5, 1), (2, 7, 4, 1), (1, 1, 1, 1, 1), (9,), (4, 4, 4), (20, 1, 1, 1, 1, 1, 1))
    for i, each in enumerate(lengths):
        x, cu = batch(rank, n, each, i)
        assert torch.equal(fast(x, cu), layer(x, cu))
    return counter.frame_count


@pytest.mark.parametrize("schedule", ["ring", "gather", "ulysses"])
def test_two_graphs_serve_all_lengths(schedule: str) -> None:
    assert max(on_ranks(2, graphs, schedule)) <= 2


def autocast(rank: int, n: int, schedule: str) -> None:
    weights = make_weights(torch.float32)
    layer = make_layer(schedule, n, weights)
    x, cu = batch(rank, n, (3, 5, 1), 0)
    x = x.float().requires_grad_()
    want = layer(x, cu)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, cu)
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 2e-2
    got.float().square().sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in weights)


@pytest.mark.parametrize("schedule", ["ring", "gather", "ulysses"])
def test_autocast_computes_in_bf16(schedule: str) -> None:
    on_ranks(2, autocast, schedule)


def inference(rank: int, n: int, schedule: str) -> None:
    layer = make_layer(schedule, n, make_weights())
    x, cu = batch(rank, n, (3, 5, 1), 0)
    want = layer(x, cu)
    with torch.inference_mode():
        assert torch.equal(layer(x, cu), want)
        assert torch.equal(layer(x.clone(), cu.clone()), want)  # has no version
    x.requires_grad_()
    layer(x, cu).sum().backward()  # what inference mode left behind serves training


@pytest.mark.parametrize("schedule", ["ring", "gather", "ulysses"])
def test_inference_mode(schedule: str) -> None:
    on_ranks(2, inference, schedule)


def second_derivative(rank: int, n: int) -> None:
    context = context_of(n, "zig_zag")
    q = torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True)
    for window in (-1, 3):
        out = attend_sharded(q, q, q, context, window=window, scale=SCALE, kernel="torch")
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


def test_a_second_derivative_raises() -> None:
    on_ranks(2, second_derivative)
