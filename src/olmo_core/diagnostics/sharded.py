"""sharded = whole: a layer's answer on ranks that share each sequence, its heads, or both.

The ranks are processes of their own, over gloo, on the device that is checked, which start when the
first of these cells is checked; or those that torchrun has started.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.ranks import Ranks, first_failure
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

__all__ = ["HYBRID", "TP", "TP_CP", "RankPart", "end_ranks", "sharded_answer", "use_ranks"]

TP, TP_CP, HYBRID = "tp", "tp_cp", "hybrid"
"""Heads dealt to all ranks; heads to pairs of ranks, and sequences in zig-zag over the pairs;
sequences in zig-zag over pairs that swap heads for tokens (Ulysses) inside."""
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

    :param style: See :class:`RankPart`; ``problem`` too.
    :param ranks: How many.
    :raises RuntimeError: With what a rank raised.
    """
    if ranks not in _STARTED or not _STARTED[ranks].alive:
        _STARTED[ranks] = Ranks(ranks, patience=_PATIENCE)
    arguments = (mixer, backend, dtype, str(device), style, problem)
    answers = _STARTED[ranks].run(_on_a_rank, *arguments, timeout=_PATIENCE)
    if (failed := first_failure(answers)) is not None:
        rank, failure = failed
        raise RuntimeError(f"rank {rank} of {ranks}: {failure.message}")
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
    if style == HYBRID:
        return init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("ring", "ulysses")), None
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
    subject = _subject(mixer, torch.device(device_name))
    part = RankPart(n, subject, backend, dtype, style, problem)
    whole = part.put_together(part.answer())
    return whole if rank == 0 else None


class RankPart:
    """What one rank of ``n`` has of a layer and of its input. All ranks make and use theirs alike.

    :param n: All ranks of the default process group.
    :param style: A load balancer's name, :data:`HYBRID`, :data:`TP` or :data:`TP_CP`.
    :param problem: ``whole`` or ``documents``.
    """

    keywords: dict[str, Any]
    """What the layer is called with beside ``x``: the load balancer's."""

    def __init__(
        self, n: int, subject: Subject, backend: str, dtype: torch.dtype, style: str, problem: str
    ):
        device = subject.device
        self.layer = subject.layer(backend, dtype)
        self._cp, tp = _meshes(n, style, device.type)
        if tp is not None:
            self.layer.apply_tp(tp)
        kind = RingAttentionLoadBalancerType("zig_zag" if style in (TP, TP_CP, HYBRID) else style)
        alone = kind == RingAttentionLoadBalancerType.ulysses
        if self._cp is not None:
            ring = None if alone else RingContextParallelStyle(kind)
            uly = UlyssesContextParallelStyle() if alone or style == HYBRID else None
            self.layer.apply_cp(self._cp, ring=ring, uly=uly)

        shards = [y.to(device, dtype) for y in (subject.x, subject.dout)]
        self._shape = shards[0].shape
        shards.append(torch.arange(BATCH * TOKENS, device=device).view(BATCH, TOKENS))
        cu = subject.cu_doc_lens() if problem == "documents" else None
        if cu is None and style == "llama3":  # which shards by document alone
            cu = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * TOKENS
        self.keywords = {}
        if cu is not None:
            shards = [y.flatten(0, 1)[None] for y in shards]
            self.keywords = {"cu_doc_lens": cu}
        if self._cp is not None:
            shard: dict[str, Any] = {
                "inputs": shards,
                "seq_dims": [1, 1, 1],
                "pad_values": [0.0, 0.0, -1],
            }
            balancer = kind.build(self._cp)
            if cu is None:
                shards = balancer.batch_shard(**shard)
            else:
                shards, self.keywords = balancer.batch_shard_by_document(**shard, cu_doc_lens=cu)
        self.x, self.dout, self._held = shards

    def answer(self, call: Callable[..., Tensor] | None = None) -> Answer:
        """Of this rank: for its rows, and its part of the parameters' gradients.

        :param call: In place of the layer, which it calls.
        """
        x = self.x.detach().requires_grad_()
        with torch.enable_grad():
            out = (self.layer if call is None else call)(x, **self.keywords)
            params = dict(self.layer.named_parameters())
            grads = torch.autograd.grad(out, [x, *params.values()], self.dout)
        names = ["dx", *(f"d {name}" for name in params)]
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    def put_together(self, mine: Answer) -> Answer:
        """The whole layer's answer, on the CPU, the same on every rank."""
        return {
            name: self._all_rows(y) if name in ("out", "dx") else self._total(y)
            for name, y in mine.items()
        }

    def _all_rows(self, rows: Tensor) -> Tensor:
        whole = torch.zeros(BATCH * TOKENS, self._shape[-1], dtype=torch.float64)
        held = self._held.flatten().cpu()
        real = held >= 0
        whole[held[real]] = rows.flatten(0, 1).cpu().double()[real]
        return self._sum(whole).to(rows.dtype).view(self._shape)

    def _total(self, grad: Tensor) -> Tensor:
        whole = get_full_tensor(grad)
        return self._sum(whole.cpu().double()).to(whole.dtype)  # so that adding up costs nothing

    def _sum(self, x: Tensor) -> Tensor:
        """Over the ranks that share a sequence."""
        for dim in range(0 if self._cp is None else self._cp.ndim):
            assert self._cp is not None
            dist.all_reduce(x, group=self._cp.get_group(dim))
        return x
