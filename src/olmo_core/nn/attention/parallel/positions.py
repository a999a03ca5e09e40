"""RoPE's positions in a shard, from the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_core.nn.attention.parallel.op import LIBRARY, TAGS
from olmo_core.nn.attention.parallel.plan import plan_positions
from olmo_core.nn.attention.parallel.readings import read_documents
from olmo_core.nn.dispatch import register_inference


def _forward(
    x: Tensor,
    lengths: Tensor | None,
    layout: str,
    local: bool,
    ranks: int,
    rank: int,
    parts: int,
    part: int,
) -> Tensor:
    batch, rows = x.shape[:2]
    reading = read_documents(lengths, ranks if local else 1, ranks * parts * rows, x.device)
    try:
        found = plan_positions(reading, layout, ranks, rank, parts, part, rows)
    except (RuntimeError, ValueError):
        found = torch.empty(0)
    if found.shape[-1] != rows or found.shape[0] not in (1, batch):
        # Not this rank's shard. The attention that follows says so, to the other ranks too.
        return x.new_zeros((batch, rows), dtype=torch.int64)
    return found.expand(batch, rows).clone()


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


LIBRARY.define(
    "shard_positions(Tensor x, Tensor? lengths, str layout, bool local, int ranks, int rank, "
    "int parts, int part) -> Tensor",
    tags=TAGS,
)
shard_positions = register_inference(LIBRARY, "shard_positions", _forward, _fake)
"""The op ``shard_positions(x, lengths, layout, local, ranks, rank, parts, part) -> Tensor``.

The position inside its document of each token of ``x``, ``(b, t, ...)``: ``(b, t)``, int64. The
layout deals to ``ranks``, of which this is ``rank``; with Ulysses each shard is cut in ``parts``,
of which this is ``part``."""
