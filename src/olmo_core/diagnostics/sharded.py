"""sharded = whole: a layer's answer on ranks that share each sequence, its heads, or both.

The ranks are processes of their own, over gloo, on the device that is checked, which start when the
first of these cells is checked; or those that torchrun has started.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.ranks import Failure, Ranks
from olmo_core.diagnostics.subject import BATCH, TOKENS, Answer, Subject
from olmo_core.diagnostics.torchrun import StartedRanks
from olmo_core.distributed.utils import get_full_tensor
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.parallel.styles import (
    RingContextParallelStyle,
    UlyssesContextParallelStyle,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["TP", "TP_CP", "end_ranks", "sharded_answer", "use_ranks"]

TP, TP_CP = "tp", "tp_cp"
"""Heads dealt to all ranks; heads to pairs of ranks, and sequences in zig-zag over the pairs."""
_PATIENCE = 120.0
_STARTED: dict[int, Ranks | StartedRanks] = {}


def use_ranks(ranks: Ranks | StartedRanks, n: int) -> None:
    """Ask these ``n`` ranks, not processes of our own."""
    _STARTED[n] = ranks


def end_ranks() -> None:
    """End the processes of our own; those of a later question start anew."""
    for ranks in _STARTED.values():
        if isinstance(ranks, Ranks):
            ranks.end()


def sharded_answer(
    mixer: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    style: str,
    problem: str,
    *,
    ranks: int,
) -> Answer:
    """What the whole layer answers, from shards: see :class:`Subject`.

    :param style: A load balancer's name, :data:`TP` or :data:`TP_CP`.
    :param problem: ``whole`` or ``documents``.
    :param ranks: How many.
    :raises RuntimeError: With what a rank raised.
    """
    if ranks not in _STARTED or not _STARTED[ranks].alive:
        _STARTED[ranks] = Ranks(ranks, patience=_PATIENCE)
    arguments = (mixer, backend, dtype, str(device), style, problem)
    answers = _STARTED[ranks].run(_on_a_rank, *arguments, timeout=_PATIENCE)
    for rank, answer in enumerate(answers):
        if isinstance(answer, Failure):
            raise RuntimeError(f"rank {rank} of {ranks}: {answer.message}")
    answered: Any = answers[0]  # of all ranks together
    return answered


@cache
def _subject(mixer: str, device: torch.device) -> Subject:
    return Subject(MIXERS[mixer], probe_head_dim(device), device)


@cache
def _meshes(n: int, style: str, device_type: str) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """Those that share sequences, and those that share heads."""
    from torch.distributed.device_mesh import init_device_mesh

    if style == TP:
        return None, init_device_mesh(device_type, (n,), mesh_dim_names=("tp",))
    if style == TP_CP:
        both = init_device_mesh(device_type, (n // 2, 2), mesh_dim_names=("cp", "tp"))
        return both["cp"], both["tp"]
    # gloo takes tensors of any device; the mesh is of the processes.
    return init_device_mesh("cpu", (n,), mesh_dim_names=("cp",)), None


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
    cp, tp = _meshes(n, style, device.type)
    if tp is not None:
        layer.apply_tp(tp)
    kind = RingAttentionLoadBalancerType("zig_zag" if tp is not None else style)
    if cp is not None and kind == RingAttentionLoadBalancerType.ulysses:
        layer.apply_cp(cp, uly=UlyssesContextParallelStyle())
    elif cp is not None:
        layer.apply_cp(cp, ring=RingContextParallelStyle(kind))

    x, dout = (y.to(device, dtype) for y in (subject.x, subject.dout))
    tokens = torch.arange(BATCH * TOKENS, device=device).view(BATCH, TOKENS)
    cu = subject.cu_doc_lens() if problem == "documents" else None
    if cu is None and style == "llama3":  # which shards by document alone
        cu = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * TOKENS
    keywords: dict[str, Any] = {}
    shards = [x, dout, tokens]
    if cu is not None:
        shards = [y.flatten(0, 1)[None] for y in shards]
        keywords = {"cu_doc_lens": cu}
    if cp is not None and cu is None:
        shards = kind.build(cp).batch_shard(
            inputs=shards, seq_dims=[1, 1, 1], pad_values=[0.0, 0.0, -1]
        )
    elif cp is not None and cu is not None:
        shards, keywords = kind.build(cp).batch_shard_by_document(
            inputs=shards, seq_dims=[1, 1, 1], cu_doc_lens=cu, pad_values=[0.0, 0.0, -1]
        )
    x_shard, dout_shard, held = shards
    x_shard = x_shard.detach().requires_grad_()
    with torch.enable_grad():
        out = layer(x_shard, **keywords)
        params = dict(layer.named_parameters())
        dx, *grads = torch.autograd.grad(out, [x_shard, *params.values()], dout_shard)

    answer = {n: _put_together(y, held, x, cp) for n, y in (("out", out.detach()), ("dx", dx))}
    for (name, _), grad in zip(params.items(), grads, strict=True):
        total = get_full_tensor(grad).cpu().double()  # so that adding up costs nothing
        if cp is not None:
            dist.all_reduce(total, group=cp.get_group())
        answer[f"d {name}"] = total.to(grad.dtype)
    return answer if rank == 0 else None


def _put_together(rows: Tensor, held: Tensor, like: Tensor, cp: DeviceMesh | None) -> Tensor:
    """The rows of all ranks that share a sequence where they belong, on the CPU."""
    whole = torch.zeros(BATCH * TOKENS, like.shape[-1], dtype=torch.float64)
    real = held.flatten().cpu() >= 0
    whole[held.flatten().cpu()[real]] = rows.flatten(0, 1).cpu().double()[real]
    if cp is not None:
        dist.all_reduce(whole, group=cp.get_group())
    return whole.to(like.dtype).view(like.shape)
