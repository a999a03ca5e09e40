"""sharded = whole: a layer's answer on two ranks that share each sequence.

The ranks are processes of their own, over gloo, on the device that is checked. They start when the
first of these cells is checked.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.ranks import Failure, Ranks
from olmo_core.diagnostics.subject import BATCH, TOKENS, Answer, Subject
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)

__all__ = ["RANKS", "sharded_answer"]

RANKS = 2
_PATIENCE = 120.0
_STARTED: list[Ranks] = []


def sharded_answer(
    mixer: str, backend: str, dtype: torch.dtype, device: torch.device, style: str, problem: str
) -> Answer:
    """What the whole layer answers, from shards: see :class:`Subject`.

    :param style: A load balancer's name.
    :param problem: ``whole`` or ``documents``.
    :raises RuntimeError: With what a rank raised.
    """
    if not _STARTED or not _STARTED[-1].alive:
        _STARTED.append(Ranks(RANKS, patience=_PATIENCE))
    arguments = (mixer, backend, dtype, str(device), style, problem)
    answers = _STARTED[-1].run(_on_a_rank, *arguments, timeout=_PATIENCE)
    for rank, answer in enumerate(answers):
        if isinstance(answer, Failure):
            raise RuntimeError(f"rank {rank} of {RANKS}: {answer.message}")
    answered: Any = answers[0]  # of all ranks together
    return answered


@cache
def _subject(mixer: str, device: torch.device) -> Subject:
    return Subject(MIXERS[mixer], probe_head_dim(device), device)


@cache
def _mesh(n: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    # gloo takes tensors of any device; the mesh is of the processes.
    return init_device_mesh("cpu", (n,), mesh_dim_names=("cp",))


def _on_a_rank(
    rank: int,
    n: int,
    mixer: str,
    backend: str,
    dtype: torch.dtype,
    device_name: str,
    style: str,
    problem: str,
) -> Answer | None:
    device = torch.device(device_name)
    subject = _subject(mixer, device)
    layer = subject.layer(backend, dtype)
    kind = RingAttentionLoadBalancerType(style)
    if kind == RingAttentionLoadBalancerType.ulysses:
        layer.apply_cp(_mesh(n), uly=UlyssesContextParallelStyle())
    else:
        layer.apply_cp(_mesh(n), ring=RingContextParallelStyle(kind))
    balancer = kind.build(_mesh(n))

    x, dout = (y.to(device, dtype) for y in (subject.x, subject.dout))
    tokens = torch.arange(BATCH * TOKENS, device=device).view(BATCH, TOKENS)
    cu = subject.cu_doc_lens() if problem == "documents" else None
    if cu is None and style == "llama3":  # which shards by document alone
        cu = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * TOKENS
    keywords: dict[str, Any] = {}
    if cu is None:
        shards = balancer.batch_shard(
            inputs=[x, dout, tokens], seq_dims=[1, 1, 1], pad_values=[0.0, 0.0, -1]
        )
    else:
        flat = [y.flatten(0, 1)[None] for y in (x, dout, tokens)]
        shards, keywords = balancer.batch_shard_by_document(
            inputs=flat, seq_dims=[1, 1, 1], cu_doc_lens=cu, pad_values=[0.0, 0.0, -1]
        )
    x_shard, dout_shard, held = shards
    x_shard = x_shard.detach().requires_grad_()
    with torch.enable_grad():
        out = layer(x_shard, **keywords)
        params = dict(layer.named_parameters())
        dx, *grads = torch.autograd.grad(out, [x_shard, *params.values()], dout_shard)

    answer = {"out": _put_together(out.detach(), held, x), "dx": _put_together(dx, held, x)}
    for (name, _), grad in zip(params.items(), grads, strict=True):
        total = grad.cpu().double()  # so that adding up costs nothing
        dist.all_reduce(total)
        answer[f"d {name}"] = total.to(grad.dtype)
    return answer if rank == 0 else None


def _put_together(rows: Tensor, held: Tensor, like: Tensor) -> Tensor:
    """The rows of all ranks where they belong, on the CPU."""
    whole = torch.zeros(BATCH * TOKENS, like.shape[-1], dtype=torch.float64)
    real = held.flatten().cpu() >= 0
    whole[held.flatten().cpu()[real]] = rows.flatten(0, 1).cpu().double()[real]
    dist.all_reduce(whole)
    return whole.to(like.dtype).view(like.shape)
