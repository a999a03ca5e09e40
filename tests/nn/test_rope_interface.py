"""RoPE as its users call it: heads first, fewer queries, start_pos, documents, packed."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nn.test_rope import CPU, reference
from nn.test_rope_transformers import hf_config
from olmo_core.nn.rope import (
    ComplexRotaryEmbedding,
    FusedRotaryEmbedding,
    RoPEConfig,
    RoPEType,
    RotaryEmbedding,
    RotaryEmbeddingBase,
)

TABLE = torch.ones(6, 16)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("cls", [RotaryEmbedding, ComplexRotaryEmbedding])
def test_signatures(cls: type[RotaryEmbeddingBase]) -> None:
    expected = (
        "q, k, head_first=True, start_pos=None, pos_sin=None, pos_cos=None, freqs_cis=None, "
        "cu_doc_lens=None, *, positions=None, max_position=None"
    )
    assert _signature(cls.forward) == expected
    expected = (
        "qkv, start_pos=None, pos_sin=None, pos_cos=None, freqs_cis=None, *, positions=None, "
        "max_position=None"
    )
    assert _signature(FusedRotaryEmbedding.forward) == expected
    assert next(iter(inspect.signature(cls).parameters)) == "head_size"


def _signature(f: Any) -> str:
    parameters = inspect.signature(f).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.name != "self"]
    return str(inspect.Signature(plain))[1:-1]


@given(
    name=st.sampled_from([RoPEType.default, RoPEType.complex]),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    fewer=st.integers(0, 8),
    head_first=st.booleans(),
    partial=st.sampled_from([1.0, 0.5]),
    where=st.sampled_from(["arange", "start", "documents", "positions", "buffers", "both"]),
    seed=st.integers(0, 99),
)
def test_every_way_to_say_positions(
    name: RoPEType, batch: int, length: int, fewer: int, head_first: bool, partial: float,
    where: str, seed: int,
) -> None:  # fmt: skip
    """Against the float64 reference, one position at a time; gradients too."""
    torch.manual_seed(seed)
    rope = RoPEConfig(name=name, partial_rotary_factor=partial).build(16)
    q, k = (torch.randn(batch, t, h, 16) for t, h in ((max(1, length - fewer), 4), (length, 2)))
    kwargs: dict[str, Any] = {}
    at = torch.arange(length).expand(batch, length)
    if where in ("start", "buffers"):
        kwargs["start_pos"] = seed
        at = at + seed
    if where == "positions":
        at = torch.randint(99, (batch, length))
        kwargs |= {"positions": at, "max_position": 99}
    if where in ("documents", "both"):
        ends = sorted({0, batch * length, *torch.randint(batch * length + 1, (3,)).tolist()})
        kwargs["cu_doc_lens"] = int32(*ends)
        at = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)]).view(batch, length)
    if where in ("buffers", "both"):  # longer than needed
        buffers = rope.get_buffers(200, CPU, torch.float64)
        kwargs |= {f: b for f, b in buffers._asdict().items() if b is not None}

    leaves = [x.transpose(1, 2) if head_first else x for x in (q, k)]
    leaves = [x.clone().requires_grad_() for x in leaves]
    got = rope(*leaves, head_first=head_first, **kwargs)
    for x, y, leaf in zip((q, k), got, leaves, strict=True):
        x.requires_grad_()
        want = reference(rope, x, at[:, length - x.shape[1] :])
        dy = torch.randn_like(x)
        (dx,) = torch.autograd.grad(want, x, dy.double())
        (dleaf,) = torch.autograd.grad(
            y, leaf, dy.transpose(1, 2) if head_first else dy, retain_graph=True
        )
        y, dleaf = (z.transpose(1, 2) if head_first else z for z in (y, dleaf))
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(dleaf, dx, rtol=1e-5, atol=2e-6)


def test_heads_first_as_transformers_has_them() -> None:
    """The layout that a swapped default would rotate along the wrong axis."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(2, 5, 7, 64), torch.randn(2, 3, 7, 64)  # (B, H, T, D)
    theirs = LlamaRotaryEmbedding(hf_config("default", theta=10_000.0))
    cos, sin = theirs(q, torch.arange(7)[None] + 3)
    want = apply_rotary_pos_emb(q, k, cos, sin)
    got = RotaryEmbedding(head_size=64, theta=10_000)(q, k, start_pos=3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 6),
    where=st.sampled_from(["arange", "start", "positions", "buffers"]),
)
def test_packed(batch: int, length: int, where: str) -> None:
    fused, apart = FusedRotaryEmbedding(head_size=8), RotaryEmbedding(head_size=8)
    qkv = torch.randn(batch, length, 3, 2, 8, requires_grad=True)
    kwargs: dict[str, Any] = {}
    if where in ("start", "buffers"):
        kwargs["start_pos"] = 5
    if where == "positions":
        kwargs = {"positions": torch.randint(9, (batch, length)), "max_position": 9}
    if where == "buffers":
        buffers = fused.get_buffers(20, CPU)
        kwargs |= {"pos_sin": buffers.pos_sin, "pos_cos": buffers.pos_cos}
    got = fused(qkv, **kwargs)
    assert got.shape == qkv.shape
    q, k = apart(qkv[:, :, 0], qkv[:, :, 1], head_first=False, **kwargs)
    want = torch.stack((q, k, qkv[:, :, 2]), dim=2)
    assert torch.equal(got, want)
    dout = torch.randn_like(qkv)
    (dx,), (want_dx,) = (torch.autograd.grad(y, qkv, dout) for y in (got, want))
    torch.testing.assert_close(dx, want_dx)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"start_pos": -1}, ValueError, "must not be negative, got -1"),
        ({"start_pos": 1.0}, TypeError, "must be an int, got 1.0"),
        ({"start_pos": torch.tensor(1)}, TypeError, "must be an int"),
        ({"start_pos": True}, TypeError, "must be an int"),
        ({"start_pos": 1, "cu_doc_lens": int32(0, 12)}, ValueError, "leave out start_pos"),
        (
            {"start_pos": 1, "positions": torch.arange(6), "max_position": 6},
            ValueError,
            "either start_pos or positions",
        ),
        (
            {"positions": torch.arange(6), "max_position": 6, "cu_doc_lens": int32(0, 12)},
            ValueError,
            "leave out start_pos, positions",
        ),
        ({"cu_doc_lens": int32(0, 6)}, ValueError, "flattened batch, 12"),
        ({"cu_doc_lens": torch.tensor([0, 12])}, TypeError, "int32"),
        ({"cu_doc_lens": int32(0, 12).to("meta")}, ValueError, "on meta, the queries on cpu"),
        ({"pos_sin": TABLE, "pos_cos": TABLE, "start_pos": 1}, ValueError, "0 to 6, got 6 rows"),
        (
            {"pos_sin": TABLE, "pos_cos": TABLE, "cu_doc_lens": int32(0, 12)},
            ValueError,
            "a document is longer than the RoPE buffers, which hold 6 positions",
        ),
    ],
)
def test_what_excludes_each_other(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    q, k = torch.ones(2, 4, 6, 16), torch.ones(2, 2, 6, 16)
    with pytest.raises(error, match=message):
        RotaryEmbedding(head_size=16)(q, k, **kwargs)


def test_shapes() -> None:
    rope = RotaryEmbedding(head_size=16)
    with pytest.raises(ValueError, match=r"q \(B, H, T, 16\) and k \(B, Hkv, T, 16\), got"):
        rope(torch.ones(2, 4, 6, 8), torch.ones(2, 4, 6, 16))
    with pytest.raises(ValueError, match=r"no longer than k \(with head_first=True"):
        rope(torch.ones(2, 4, 6, 16), torch.ones(2, 4, 5, 16))
    with pytest.raises(ValueError, match="batch size and device"):
        rope(torch.ones(1, 4, 6, 16), torch.ones(2, 4, 6, 16))
    with pytest.raises(ValueError, match=r"packed qkv \(B, T, 3, H, 16\), got \(2, 4, 6, 16\)"):
        FusedRotaryEmbedding(head_size=16)(torch.ones(2, 4, 6, 16))
    with pytest.raises(ValueError, match="pos_sin and pos_cos together"):
        FusedRotaryEmbedding(head_size=16)(
            torch.ones(1, 6, 3, 2, 16), freqs_cis=torch.ones(6, 8) + 0j
        )
    with pytest.raises(TypeError, match="head_dim"):
        RotaryEmbedding(head_dim=16)  # type: ignore[call-arg]
