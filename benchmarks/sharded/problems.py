"""What is timed: masks, and attention under them by each way of sharding, or on one device."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.sharded.clock import BothWays
from benchmarks.sharded.job import Job
from olmo_core.nn.attention.attend import attend
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.context import ContextParallel
from olmo_core.nn.attention.parallel.plan import gather_plan
from olmo_core.nn.attention.parallel.readings import Reading
from olmo_core.nn.attention.parallel.schedule import attend_sharded
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)
from olmo_core.nn.attention.segments import Segments

__all__ = ["Attention", "Mask", "context_of", "log_normal", "masks", "padded", "ways"]


class Mask(NamedTuple):
    """Documents of a whole sequence, and a window."""

    name: str
    ends: list[int]
    """Cumulative lengths; every layout takes them without padding."""
    window: int
    """-1 for none."""

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        total = 0
        for length in (b - a for a, b in pairwise(self.ends)):
            seen = min(length, self.window) if self.window > 0 else length
            total += seen * (seen + 1) // 2 + (length - seen) * seen
        return total


class Way(NamedTuple):
    """How ranks share a sequence."""

    name: str
    style: str
    """A load balancer's name, or ``hybrid``: zig-zag over pairs of Ulysses."""
    head_stride: int = 1


def log_normal(total: int, median: float, longest: float = math.inf) -> list[int]:
    """Ends of documents as text has them: sigma 1.2 about a median."""
    rng, ends = random.Random(0), [0]
    while ends[-1] < total:
        length = int(rng.lognormvariate(math.log(median), 1.2)) + 1
        ends.append(int(min(total, ends[-1] + min(length, longest))))
    return ends


def padded(ends: list[int], multiple: int, total: int) -> list[int]:
    """Documents of a multiple of ``multiple``, as zig-zag needs them, of as many tokens in all."""
    lengths = [(b - a) // multiple * multiple for a, b in pairwise(ends)]
    lengths = [length for length in lengths if length]
    lengths.append(total - sum(lengths))
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def masks(job: Job, tokens: int) -> Iterator[Mask]:
    """Of ``job.n`` shards of ``tokens``."""
    sizes, total = job.sizes, job.n * tokens
    rng, even = random.Random(0), [0]
    while even[-1] < total:
        even.append(min(total, even[-1] + rng.randint(*sizes.document)))
    yield Mask("one document", [0, total], -1)
    if len(even) > 2:
        shortest, longest = sizes.document
        name = f"{shortest}-{longest}" if shortest < 1024 else f"{shortest >> 10}-{longest >> 10}K"
        yield Mask(f"documents {name}", padded(even, 2 * job.n, total), -1)
    documents = log_normal(total, sizes.median_document)
    yield Mask("log-normal", padded(documents, 2 * job.n, total), -1)
    yield Mask(f"window {sizes.window}", [0, total], sizes.window)


def ways(job: Job, mask: Mask) -> Iterator[Way]:
    """All that differ under a mask: with a window nothing goes round a ring."""
    strides = {1: "1", 2: "2", job.sizes.kv_heads: "all"}
    if mask.window < 0:
        yield Way("ring", "zig_zag")
    for style in ("llama3", "balanced") if mask.window < 0 else ("llama3", "balanced", "zig_zag"):
        name = {"llama3": "gather", "zig_zag": "zig-zag gather"}.get(style, style)
        for stride, each in strides.items():
            yield Way(f"{name}/{each}", style, stride)
    if job.sizes.heads % job.n == 0:
        yield Way("ulysses", "ulysses")
    if job.n >= 4 and job.n % 2 == 0:
        yield Way("ring x ulysses", "hybrid", job.sizes.kv_heads)


class Attention:
    """One attention problem, this rank's shard of it, and the whole of it.

    :param tokens: A rank's.
    """

    def __init__(self, job: Job, mask: Mask, kernel: str, tokens: int) -> None:
        self.job, self.mask, self.kernel, self.tokens = job, mask, kernel, tokens
        self.lengths = torch.tensor(mask.ends, dtype=torch.int32, device=job.device)
        self.scale = job.sizes.head_dim**-0.5

    def draw(self, queries: int, keys: int) -> tuple[list[Tensor], Tensor]:
        """q, k and v that want gradients, and a gradient of the output."""
        sizes, generator = self.job.sizes, torch.Generator(self.job.device).manual_seed(0)

        def randn(rows: int, heads: int) -> Tensor:
            shape = (1, rows, heads, sizes.head_dim)
            return torch.randn(
                shape, generator=generator, device=self.job.device, dtype=self.job.dtype
            )

        qkv = [
            randn(queries, sizes.heads),
            randn(keys, sizes.kv_heads),
            randn(keys, sizes.kv_heads),
        ]
        return [x.requires_grad_() for x in qkv], randn(queries, sizes.heads)

    @cached_property
    def shard(self) -> tuple[list[Tensor], Tensor]:
        return self.draw(self.tokens, self.tokens)

    def sharded(
        self, style: str, head_stride: int = 1, lengths: Tensor | None = None
    ) -> Callable[[], Tensor]:
        """This rank's part of the forward pass, which all ranks call together.

        :param lengths: In place of those that every call of this problem shares.
        """
        context = context_of(self.job, style, head_stride)
        (q, k, v), _ = self.shard
        ends = self.lengths if lengths is None else lengths

        def forward() -> Tensor:
            return attend_sharded(
                q, k, v, context, ends, longest=_longest(self.mask.ends),
                window=self.mask.window, scale=self.scale, kernel=self.kernel,
            )  # fmt: skip

        return forward

    def backward(self, out: Tensor) -> None:
        qkv, dout = self.shard
        torch.autograd.grad(out, qkv, dout)

    def whole(self) -> BothWays:
        """Forward and backward over all ranks' tokens on this device."""
        total = self.mask.ends[-1]
        segments = Segments.documents(
            self.lengths, _longest(self.mask.ends), window=self.mask.window
        )
        return self._alone(segments, total, total)

    def part(self, i: int) -> BothWays:
        """One of as many parts of the same as there are ranks: queries of a rank's number, and all
        that they see. For what one device can't hold at once."""
        reading = Reading(self.mask.ends, self.job.device)
        plan = gather_plan(reading, "contiguous", self.job.n, i, self.mask.window, 1)
        return self._alone(plan.segments, self.tokens, plan.exchange.wanted)

    def _alone(self, segments: Segments, queries: int, keys: int) -> BothWays:
        (q, k, v), dout = self.draw(queries, keys)

        def forward() -> Tensor:
            return attend(q, k, v, segments, scale=self.scale, kernel=self.kernel)

        def backward(out: Tensor) -> None:
            torch.autograd.grad(out, (q, k, v), dout)

        return forward, backward


_CONTEXTS: dict[tuple[str, int], ContextParallel] = {}


def context_of(job: Job, style: str, head_stride: int) -> ContextParallel:
    """Made once: a mesh makes process groups."""
    if (style, head_stride) not in _CONTEXTS:
        from torch.distributed.device_mesh import init_device_mesh

        hybrid = style == "hybrid"
        names = ("ring", "ulysses") if hybrid else ("cp",)
        shape = (job.n // 2, 2) if hybrid else (job.n,)
        mesh = init_device_mesh(job.device.type, shape, mesh_dim_names=names)
        uly = UlyssesContextParallelStyle() if style in ("ulysses", "hybrid") else None
        ring = None
        if style != "ulysses":
            kind = RingAttentionLoadBalancerType("zig_zag" if hybrid else style)
            ring = RingContextParallelStyle(kind, head_stride)
        _CONTEXTS[style, head_stride] = ContextParallel.from_mesh(mesh, ring, uly)
    return _CONTEXTS[style, head_stride]


def _longest(ends: list[int]) -> int:
    return max(b - a for a, b in pairwise(ends))
