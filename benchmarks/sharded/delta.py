"""The gated delta net: an exchange of states against Ulysses, the whole layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.sharded.clock import BothWays, Times, fastest, fits, slowest
from benchmarks.sharded.job import Job
from olmo_core.config import DType
from olmo_core.nn.attention.gated_delta_net import GatedDeltaNetConfig
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)

__all__ = ["delta"]


def delta(job: Job) -> None:
    width, heads, key_dim, value_dim = job.sizes.delta
    job.say(
        f"\ngated delta net, {heads} heads of {key_dim}/{value_dim}, width {width}, one document; "
        "ms, share of the ideal"
    )
    job.say(f"{'tokens a rank, way':39}{'forward':>16}{'both':>24}")
    for tokens in job.sizes.delta_tokens:
        if not fits(job, partial(_layer, job, tokens * job.n, None)):
            job.say(f"{tokens}: one device can't hold {tokens * job.n}")
            continue
        alone = fastest(job, *_layer(job, tokens * job.n, None))
        job.say(f"{f'{tokens}, one device':39}{alone.forward:9.2f}{'':15}{alone.both:9.2f}")
        for style in ("llama3", "zig_zag", "ulysses"):
            if style == "ulysses" and heads % job.n:
                continue
            name = "ulysses" if style == "ulysses" else f"states, {style}"
            times = slowest(job, *_layer(job, tokens, style))
            shares = Times(*(a / (job.n * b) for a, b in zip(alone, times, strict=True)))
            job.say(
                f"  {name:37}{times.forward:9.2f}{shares.forward:7.1%}{'':8}"
                f"{times.both:9.2f}{shares.both:7.1%}"
            )
            job.found(
                "delta", tokens=tokens, way=name, ranks=job.n, ms=times._asdict(),
                one_device_ms=alone._asdict(), share=shares._asdict(),
            )  # fmt: skip


def _layer(job: Job, tokens: int, style: str | None) -> BothWays:
    """Forward and backward of a layer on this rank's tokens, or on one device alone."""
    width, heads, key_dim, value_dim = job.sizes.delta
    config = GatedDeltaNetConfig(
        n_heads=heads,
        head_dim=key_dim,
        expand_v=value_dim / key_dim,
        dtype=DType.from_pt(job.dtype),
    )
    torch.manual_seed(0)
    layer = config.build(width, layer_idx=0, n_layers=1, init_device=str(job.device))
    x, dout = (torch.randn(1, tokens, width, device=job.device, dtype=job.dtype) for _ in range(2))
    keywords: dict[str, Any] = {}
    if style is not None:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(job.device.type, (job.n,), mesh_dim_names=("cp",))
        kind = RingAttentionLoadBalancerType(style)
        if style == "ulysses":
            layer.apply_cp(mesh, uly=UlyssesContextParallelStyle())
        else:
            layer.apply_cp(mesh, ring=RingContextParallelStyle(kind))
        ends = torch.tensor([0, tokens * job.n], dtype=torch.int32, device=job.device)
        nothing = torch.zeros(1, tokens * job.n, 1, device=job.device)
        _, keywords = kind.build(mesh).batch_shard_by_document(
            inputs=[nothing], seq_dims=[1], cu_doc_lens=ends, pad_values=[0.0]
        )
    x.requires_grad_()
    inputs = [x, *layer.parameters()]

    def forward() -> Tensor:
        return layer(x, **keywords)

    return forward, lambda out: torch.autograd.grad(out, inputs, dout)
