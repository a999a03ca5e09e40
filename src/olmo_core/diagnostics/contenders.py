"""Who is timed: this library's backends, and what people would write without it.

A contender prepares a problem once and returns a function that attends, from (B, T, H, D) to the
same; or it says why it can't. Peers get the layout and the mask that they like, made outside the
timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.diagnostics.bench_cases import BenchCase, Problem, Settings
from olmo_core.nn.attention.capabilities import CAPABILITIES, Environment, Request, refusals
from olmo_core.nn.attention.config import AttentionBackendName
from olmo_core.nn.attention.decoding.kv_cache import KVCacheManager
from olmo_core.nn.attention.kernels.softmax import Feature

__all__ = ["PEERS", "Attend", "Contender", "Unavailable", "absent_backends", "contenders"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_MAX_MASK_BYTES = 2**31


class Unavailable(Exception):
    """A contender can't do a problem; the message is the reason."""


@dataclass(frozen=True)
class Contender:
    """Someone to time."""

    name: str
    is_peer: bool
    prepare: Callable[[Problem], Attend]
    """:raises Unavailable: With the reason."""


def absent_backends(device: torch.device, settings: Settings) -> dict[str, str]:
    """Why, for each backend that can't run these sizes here."""
    environment = Environment.detect(device)
    request = Request(settings.dtype, settings.head_dim, frozenset({Feature.backward}))
    return {
        name: "; ".join(reasons)
        for name, c in CAPABILITIES.items()
        if (reasons := refusals(c, environment, request))
    }


def contenders(backends: Iterable[str], peers: bool) -> list[Contender]:
    """The named backends, and all peers if wanted."""

    def backend(name: str) -> Contender:
        return Contender(name, False, lambda p: _backend(name, p))

    found = [backend(name) for name in backends]
    return [*found, *(Contender(n, True, f) for n, f in PEERS.items() if peers)]


def _backend(name: str, p: Problem) -> Attend:
    s = p.settings
    environment = Environment.detect(p.device)
    features = {
        BenchCase.full: {Feature.backward},
        BenchCase.window: {Feature.backward, Feature.window},
        BenchCase.documents: {Feature.backward, Feature.documents},
        BenchCase.decode: {Feature.kv_cache},
    }[p.case]
    request = Request(s.dtype, s.head_dim, frozenset(features))
    if reasons := refusals(CAPABILITIES[name], environment, request):
        raise Unavailable("; ".join(reasons))
    backend = AttentionBackendName(name).build(
        head_dim=s.head_dim,
        n_heads=s.n_heads,
        n_kv_heads=s.n_kv_heads,
        window_size=(-1, -1) if p.window < 0 else (p.window - 1, 0),
    )
    lengths: dict[str, Any] = {}
    if p.case == BenchCase.documents:
        lengths = {"cu_doc_lens": p.cu_doc_lens, "max_doc_len": max(p.lengths)}
    if p.case != BenchCase.decode:
        return lambda q, k, v: backend((q, k, v), **lengths)

    _, keys, values = p.qkv
    cache = KVCacheManager(p.batch, p.n_tokens, s.n_kv_heads, s.head_dim, p.device, s.dtype)
    cache.k_cache.copy_(keys)
    cache.v_cache.copy_(values)
    cache.update_seqlen(p.n_tokens - 1)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = backend((q, k[:, -1:], v[:, -1:]), kv_cache_manager=cache)
        cache.rollback(1)
        return out

    return step


def _sdpa(p: Problem) -> Attend:
    if p.case in (BenchCase.window, BenchCase.documents):
        raise Unavailable("plain SDPA has neither windows nor documents")
    causal = p.case == BenchCase.full

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(
            1, 2
        )

    return attend


def _sdpa_mask(p: Problem) -> Attend:
    if p.case in (BenchCase.full, BenchCase.decode):
        raise Unavailable("no mask is needed")
    mask = _dense_mask(p)
    # With a mask, CUDA's fused kernels do not group heads: SDPA would build all scores.
    repeats = p.settings.n_heads // p.settings.n_kv_heads if p.device.type == "cuda" else 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=repeats == 1)
        return out.transpose(1, 2)

    return attend


def _dense_mask(p: Problem) -> Tensor:
    if p.n_tokens**2 > _MAX_MASK_BYTES:
        raise Unavailable(
            f"a {p.n_tokens} x {p.n_tokens} mask takes {p.n_tokens**2 / 2**30:.0f} GiB"
        )
    return p.mask


def _flex(p: Problem) -> Attend:
    if p.device.type != "cuda":
        raise Unavailable("FlexAttention has no backward on this device")
    if p.case == BenchCase.decode:
        raise Unavailable("not set up for decoding")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(p.lengths[: len(p.lengths) // p.batch], device=p.device)
    document = torch.arange(len(lengths), device=p.device).repeat_interleave(lengths)
    window = p.window if p.window > 0 else p.n_tokens

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query >= key) & (query - key < window)
        return near & (document[query] == document[key])

    block_mask = create_block_mask(sees, None, None, p.n_tokens, p.n_tokens, device=p.device)
    torch.compiler.reset()  # each shape compiles anew, and dynamo gives up after eight
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Any = compiled(q, k, v, block_mask=block_mask, enable_gqa=True)
        attended: Tensor = out.transpose(1, 2)
        return attended

    return attend


def _transformers(p: Problem) -> Attend:
    """What a Hugging Face model does with SDPA, its default: a dense mask where one is needed."""
    if find_spec("transformers") is None:
        raise Unavailable('not installed: pip install "olmo-attention[hf]"')
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masked = p.case in (BenchCase.window, BenchCase.documents)
    mask = _dense_mask(p)[None, None] if masked else None
    module: Any = SimpleNamespace(
        num_key_value_groups=p.settings.n_heads // p.settings.n_kv_heads,
        is_causal=True,
        training=False,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask)[0]
        return out

    return attend


PEERS: Mapping[str, Callable[[Problem], Attend]] = MappingProxyType(
    {"sdpa": _sdpa, "sdpa+mask": _sdpa_mask, "flex": _flex, "transformers": _transformers}
)
"""By name. ``sdpa+mask`` is SDPA with the dense mask that windows and documents need."""
