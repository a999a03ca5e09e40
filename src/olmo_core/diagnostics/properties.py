"""The promise, property by property: each a function from a layer to comparisons.

packed = separate = sharded = cached = the dense float64 reference, forward and, where there is one,
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from olmo_core.diagnostics.measures import Comparison
from olmo_core.diagnostics.sharded import HYBRID, TP, TP_CP, sharded_answer
from olmo_core.diagnostics.subject import (
    BATCH,
    DOCUMENTS,
    LEFT_PADDING,
    TOKENS,
    Answer,
    Subject,
    answer,
)
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.attention.kernels.softmax import Feature
from olmo_core.nn.attention.parallel.balancers import RingAttentionLoadBalancerType
from olmo_core.nn.attention.softmax_attention import SoftmaxAttention

__all__ = ["PROPERTIES", "Property"]

Check = Callable[[Subject, SequenceMixer, torch.dtype], list[Comparison]]

_PREFILL = 140
_MAX_ROLLBACK = 3


@dataclass(frozen=True)
class Property:
    """Something that must hold for every layer on every backend."""

    name: str
    title: str
    features: frozenset[Feature]
    """What it asks of a backend."""
    check: Check
    is_sharded: bool = False
    """Whether several processes check it together."""
    unsuited: Callable[[SequenceMixer, int], str] = lambda layer, ranks: ""
    """Why so many ranks can't share the layer; empty if they can."""


def _whole(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    got = _run(subject, layer, dtype)
    return subject.compare(got, subject.truth("whole"), "whole", dtype)


def _documents(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    got = _run(subject, layer, dtype, cu_doc_lens=subject.cu_doc_lens())
    return subject.compare(got, subject.truth("documents"), "documents", dtype)


def _separate(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    """Packed against each document alone; the parameters' gradients add up over documents."""
    packed = _run(subject, layer, dtype, cu_doc_lens=subject.cu_doc_lens())
    x, dout = _inputs(subject, dtype)
    x, dout = (y.flatten(0, 1)[None] for y in (x, dout))
    params: dict[str, Tensor] = dict(layer.named_parameters())
    parts, at = [], 0
    for length in DOCUMENTS:
        part = slice(at, at + length)
        if length:
            parts.append(answer(layer, x[:, part], dout[:, part], params))
        at += length
    alone: Answer = {}
    for name in packed:
        if name in ("out", "dx"):
            whole = torch.cat([p[name] for p in parts], dim=1)
            alone[name] = whole.view(packed[name].shape)
        else:  # in float64, so that adding up costs nothing
            alone[name] = sum((p[name].cpu().double() for p in parts), torch.zeros(()).double())
    return subject.compare(packed, alone, "documents", dtype)


def _left_padding(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    got = _run(subject, layer, dtype, cache_leftpad=_leftpad(subject))
    return subject.compare(got, subject.truth("left_padding"), "left_padding", dtype)


def _decode(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    """A prefill and then one token at a time; and, after a reset, one at a time from the start."""
    full, x = _full(subject, layer, dtype)
    with _cached(layer) as cache, torch.no_grad():
        steps = [layer(x[:, :_PREFILL])]
        steps += [layer(x[:, t : t + 1]) for t in range(_PREFILL, TOKENS)]
        cache.reset()
        again = [layer(x[:, t : t + 1]) for t in range(20)]
    got = {"out": torch.cat(steps, 1)}
    start = {"out": torch.cat(again, 1)}
    return [
        *subject.compare(got, full, "whole", dtype),
        *_renamed(subject.compare(start, _head(full, 20), "whole", dtype), "out after reset"),
    ]


def _chunks(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    """Chunks of all sizes on a filled cache: shorter and longer than windows and convolutions."""
    full, x = _full(subject, layer, dtype)
    with _cached(layer), torch.no_grad():
        got = torch.cat([layer(part) for part in x.split((3, 1, 7, 90, 2, 70), dim=1)], 1)
    return subject.compare({"out": got}, full, "whole", dtype)


def _cached_left_padding(
    subject: Subject, layer: SequenceMixer, dtype: torch.dtype
) -> list[Comparison]:
    """Padded rows, prefilled in two chunks, then token by token, against the float64 reference."""
    x, _ = _inputs(subject, dtype)
    with _cached(layer), torch.no_grad():
        outs = [layer(x[:, :30], cache_leftpad=_leftpad(subject)), layer(x[:, 30:_PREFILL])]
        outs += [layer(x[:, t : t + 1]) for t in range(_PREFILL, _PREFILL + 20)]
    stop = _PREFILL + 20
    truth = _head(subject.truth("left_padding"), stop)
    return subject.compare({"out": torch.cat(outs, 1)}, truth, "left_padding", dtype)


def _rollback(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
    """Wrong draft tokens are forgotten: what follows is as if they had never been there."""
    full, x = _full(subject, layer, dtype)
    wrong = x.flip(1)
    outs: list[Tensor] = []
    with _cached(layer, max_rollback=_MAX_ROLLBACK) as cache, torch.no_grad():
        outs.append(layer(x[:, :_PREFILL]))
        at = _PREFILL
        for drafts, accepted in ((1, 1), (3, 1), (2, 2), (3, 3), (1, 4)):
            for t in range(drafts):
                layer(wrong[:, t : t + 1])
            cache.rollback(drafts)
            outs += [layer(x[:, at + t : at + t + 1]) for t in range(accepted)]
            at += accepted
        layer(wrong[:, :_MAX_ROLLBACK])
        cache.rollback(_MAX_ROLLBACK)
        outs.append(layer(x[:, at:]))
    return subject.compare({"out": torch.cat(outs, 1)}, full, "whole", dtype)


def _run(subject: Subject, layer: SequenceMixer, dtype: torch.dtype, **lengths: Tensor) -> Answer:
    x, dout = _inputs(subject, dtype)
    params: dict[str, Tensor] = dict(layer.named_parameters())
    return answer(lambda x: layer(x, **lengths), x, dout, params)


def _full(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> tuple[Answer, Tensor]:
    x, _ = _inputs(subject, dtype)
    with torch.no_grad():
        return {"out": layer(x)}, x


def _inputs(subject: Subject, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return subject.x.to(subject.device, dtype), subject.dout.to(subject.device, dtype)


def _leftpad(subject: Subject) -> Tensor:
    return torch.tensor(LEFT_PADDING, dtype=torch.int32, device=subject.device)


def _head(whole: Answer, length: int) -> Answer:
    return {"out": whole["out"][:, :length]}


def _renamed(comparisons: list[Comparison], what: str) -> list[Comparison]:
    return [c._replace(what=what) for c in comparisons]


class _cached:
    """A layer with a cache inside the block."""

    def __init__(self, layer: SequenceMixer, max_rollback: int = 0):
        self.layer, self.max_rollback = layer, max_rollback

    def __enter__(self) -> DecodingCache:
        self.layer.init_kv_cache_manager(BATCH, TOKENS, max_rollback=self.max_rollback)
        assert self.layer.kv_cache_manager is not None
        return self.layer.kv_cache_manager

    def __exit__(self, *_: object) -> None:
        self.layer.kv_cache_manager = None


def _property(name: str, title: str, features: set[Feature], check: Check) -> Property:
    return Property(name, title, frozenset(features), check)


def _sharded(
    style: str,
    title: str,
    features: set[Feature],
    unsuited: Callable[[SequenceMixer, int], str] = lambda layer, ranks: "",
) -> Property:
    """The answer of several ranks, with and without documents."""

    def check(subject: Subject, layer: SequenceMixer, dtype: torch.dtype) -> list[Comparison]:
        backend = layer.backend.name if isinstance(layer, SoftmaxAttention) else "torch"
        return [
            c._replace(what=f"{c.what} ({problem})")
            for problem in ("whole", "documents")
            for c in subject.compare(
                sharded_answer(
                    subject.mixer.name,
                    str(backend),
                    dtype,
                    subject.device,
                    style,
                    problem,
                    ranks=subject.ranks,
                ),
                subject.truth(problem),
                problem,
                dtype,
            )
        ]

    features = {Feature.backward, Feature.documents, *features}
    return Property(style, title, frozenset(features), check, True, unsuited)


def _balanced(style: RingAttentionLoadBalancerType) -> Property:
    alone = style == RingAttentionLoadBalancerType.ulysses
    return _sharded(
        str(style),
        f"sharded by {style} = whole",
        {Feature.ulysses_cp if alone else Feature.ring_cp},
        _query_heads if alone else lambda layer, ranks: "",
    )


def _query_heads(layer: SequenceMixer, ranks: int) -> str:
    """Ulysses repeats kv heads, and key heads of the delta net, where it must."""
    counts = layer.tensor_parallel_table().counts
    n = counts.get("n_v_heads", counts["n_heads"])
    return f"{ranks} ranks can't share {n} heads" if n % ranks else ""


def _dealt_heads(layer: SequenceMixer, ranks: int) -> str:
    counts = layer.tensor_parallel_table().counts
    wrong = [f"{what}={n}" for what, n in counts.items() if n % ranks]
    return f"{ranks} ranks can't share {', '.join(wrong)}" if wrong else ""


PROPERTIES: Mapping[str, Property] = MappingProxyType(
    {
        p.name: p
        for p in (
            _property("whole", "= reference", {Feature.backward}, _whole),
            _property(
                "documents",
                "documents = reference",
                {Feature.backward, Feature.documents},
                _documents,
            ),
            _property(
                "separate", "packed = separate", {Feature.backward, Feature.documents}, _separate
            ),
            _property(
                "left_padding",
                "left-padded = alone",
                {Feature.backward, Feature.documents, Feature.left_padding},
                _left_padding,
            ),
            _property("decode", "token by token = full", {Feature.kv_cache}, _decode),
            _property("chunks", "in chunks = full", {Feature.kv_cache}, _chunks),
            _property(
                "cached_left_padding",
                "padded cache = alone",
                {Feature.kv_cache, Feature.left_padding},
                _cached_left_padding,
            ),
            _property("rollback", "after rollback = full", {Feature.kv_cache}, _rollback),
            *(_balanced(style) for style in RingAttentionLoadBalancerType),
            _sharded(
                HYBRID,
                "ring x ulysses = whole",
                {Feature.ring_cp, Feature.ulysses_cp},
                lambda layer, ranks: _query_heads(layer, 2),
            ),
            _sharded(TP, "heads dealt to ranks = whole", set(), _dealt_heads),
            _sharded(
                TP_CP,
                "heads dealt, sharded = whole",
                {Feature.ring_cp},
                lambda layer, ranks: _dealt_heads(layer, 2),
            ),
        )
    }
)
