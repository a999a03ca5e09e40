"""The layers against the dense float64 reference, over products of options."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nn.attention.reference import attention_layer, relative, row_lengths
from olmo_core.nn.attention import (
    Attention,
    FusedAttention,
    GateConfig,
    NormalizedAttention,
    SequenceMixer,
)
from olmo_core.nn.init import InitMethod
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

THETA = 1000.0
RMS = LayerNormConfig(name="rms")


@st.composite
def documents(draw: st.DrawFn, total: int) -> list[int] | None:
    """Ends of documents over ``total`` tokens, some empty, or None."""
    if draw(st.booleans()):
        return None
    ends = sorted(draw(st.lists(st.integers(0, total), max_size=8)))
    return [0, *ends, total]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, seq_len = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 16, 33]))
    n_kv_heads, rep = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 1)]))
    return {
        "kind": draw(st.sampled_from(["default", "normalized", "fused"])),
        "batch": batch,
        "seq_len": seq_len,
        "n_heads": n_kv_heads * rep,
        "n_kv_heads": n_kv_heads,
        "head_dim": draw(st.sampled_from([2, 6, 8])),
        "window": draw(st.sampled_from([None, 1, 2, 5, 40])),
        "cu": draw(documents(batch * seq_len)),
        "rope": draw(st.sampled_from([None, "default", "complex", "fused"])),
        "partial": draw(st.sampled_from([1.0, 0.5])),
        "norm": draw(st.sampled_from([None, "full", "head"])),
        "gate": draw(st.sampled_from([None, "headwise", "elementwise"])),
        "clip": draw(st.sampled_from([None, 0.5])),
        "bias": draw(st.booleans()),
    }


def build(c: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[SequenceMixer, dict]:
    """A layer with random parameters and the reference's options for it."""
    head_dim, theta = c["head_dim"], None if c["rope"] is None else THETA
    partial = c["partial"] if c["rope"] and head_dim % 4 == 0 else 1.0
    rope = RoPEConfig(name=c["rope"], theta=THETA, partial_rotary_factor=partial) if theta else None
    common = {"n_heads": c["n_heads"], "window_size": c["window"], "dtype": dtype}
    options: dict[str, Any] = {"head_dim": head_dim, "window": c["window"], "theta": theta}
    options |= {"rotary_dim": int(head_dim * partial), "pairs": c["rope"] == "complex"}
    d_model = c["n_heads"] * head_dim
    if c["kind"] == "fused":
        if rope is not None:
            rope, options["pairs"] = rope.replace(name="fused"), False
        layer: SequenceMixer = FusedAttention(
            d_model=d_model, rope=rope, bias=c["bias"], clip_qkv=c["clip"], **common
        )
        options["clip"] = c["clip"]
    elif c["kind"] == "normalized":
        layer = NormalizedAttention(
            d_model=d_model, n_kv_heads=c["n_kv_heads"], rope=rope,
            qk_norm=RMS if c["norm"] else None, **common,
        )  # fmt: skip
        options["normalized"] = True
    else:
        layer = Attention(
            d_model=12, n_kv_heads=c["n_kv_heads"], head_dim=head_dim, rope=rope, bias=c["bias"],
            clip_qkv=c["clip"], qk_norm=RMS if c["norm"] else None,
            use_head_qk_norm=c["norm"] == "head", gate=GateConfig(c["gate"]) if c["gate"] else None,
            **common,
        )  # fmt: skip
        options |= {"clip": c["clip"], "per_head_norm": c["norm"] == "head"}
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith("s"):
                p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5))
            p.mul_(1 + 0.1 * torch.rand_like(p))
    layer.double() if dtype == torch.float64 else None
    return layer, options


def run(layer: SequenceMixer, x: Tensor, cu: list[int] | None, **kwargs: Any) -> Tensor:
    if cu is not None:
        kwargs["cu_doc_lens"] = torch.tensor(cu, dtype=torch.int32)
        kwargs["max_doc_len"] = max(b - a for a, b in pairwise(cu))
    return layer(x, **kwargs)


def gradients(out: Tensor, dout: Tensor, x: Tensor, params: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, [x, *params.values()], dout))


@settings(max_examples=120)
@given(cases())
def test_layers_equal_the_dense_reference(c: dict[str, Any]) -> None:
    layer, options = build(c)
    params = dict(layer.named_parameters())
    x = torch.randn(c["batch"], c["seq_len"], layer.w_out.out_features, dtype=torch.float64)
    x.requires_grad_()
    dout = torch.randn_like(x)
    out = run(layer, x, c["cu"])
    cu = c["cu"] or row_lengths(c["batch"], c["seq_len"])
    want = attention_layer(params, x, cu=cu, **options)
    assert relative(out, want) < 1e-12
    for got, expected in zip(gradients(out, dout, x, params), gradients(want, dout, x, params)):
        assert (got - expected).abs().max() <= 1e-11 * (1 + expected.abs().max())


@settings(max_examples=20)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_low_precision_is_as_good_as_the_reference_in_it(
    c: dict[str, Any], dtype: torch.dtype
) -> None:
    """The bound is the error of the plain reference computed in the same precision, twice over."""
    layer, options = build(c, dtype)
    params = {n: p.detach().double() for n, p in layer.named_parameters()}
    x = torch.randn(c["batch"], c["seq_len"], layer.w_out.out_features, dtype=dtype)
    cu = c["cu"] or row_lengths(c["batch"], c["seq_len"])
    want = attention_layer(params, x.double(), cu=cu, **options)
    rounded = {n: p.to(dtype) for n, p in params.items()}
    plain = attention_layer(rounded, x, cu=cu, **options)
    bound = 2 * relative(plain, want) + 8 * torch.finfo(dtype).eps
    assert relative(run(layer, x, c["cu"]), want) <= bound


LAYERS = {
    "attention": lambda **kw: Attention(
        d_model=16, n_heads=4, n_kv_heads=2, rope=RoPEConfig(), qk_norm=RMS, gate=GateConfig(), **kw
    ),
    "normalized": lambda **kw: NormalizedAttention(
        d_model=16, n_heads=4, n_kv_heads=2, rope=RoPEConfig(), **kw
    ),
    "fused": lambda **kw: FusedAttention(
        d_model=16, n_heads=4, rope=RoPEConfig(name="fused"), **kw
    ),
}
CU = torch.tensor([0, 3, 4, 4, 17, 18], dtype=torch.int32)
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@each_layer
@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(make: Any, window: int | None) -> None:
    layer = make(dtype=torch.float64, window_size=window).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda y: layer(y, cu_doc_lens=cu), (x,), fast_mode=True)


@each_layer
@pytest.mark.parametrize("method", list(InitMethod))
def test_meta_build_equals_a_cpu_build(make: Any, method: InitMethod) -> None:
    on_cpu, on_meta = make(), make(init_device="meta")
    assert all(p.is_meta for p in on_meta.parameters())
    on_meta.to_empty(device="cpu")
    for layer in (on_cpu, on_meta):
        layer.init_weights(
            init_method=method, d_model=16, block_idx=1, num_blocks=4,
            generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
    for (name, a), b in zip(on_cpu.named_parameters(), on_meta.parameters()):
        assert torch.equal(a, b), name
    x = torch.randn(2, 9, 16)
    assert torch.equal(run(on_cpu, x, CU.tolist()), run(on_meta, x, CU.tolist()))


@each_layer
def test_autocast_runs_in_bf16_and_gives_float32_gradients(make: Any) -> None:
    layer = make()
    x = torch.randn(2, 9, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(layer, x, CU.tolist())
    assert out.dtype == torch.bfloat16
    full = run(layer, x, CU.tolist())
    assert relative(out, full) < 0.03
    low, high = (torch.autograd.grad(o.float().sum(), x)[0] for o in (out, full))
    assert low.dtype == torch.float32 and relative(low, high) < 0.05


@each_layer
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_bits(make: Any, dropout: float) -> None:
    layer = make(**({"dropout": dropout} if make is not LAYERS["normalized"] else {}))
    x = torch.randn(2, 9, 16, requires_grad=True)
    got = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        if checkpointed:
            # Two microbatches with other lengths in flight: state kept outside the graph would mix.
            other = torch.tensor([0, 9, 18], dtype=torch.int32)
            first, _ = (
                torch.utils.checkpoint.checkpoint(layer, x, cu_doc_lens=cu, use_reentrant=False)
                for cu in (CU, other)
            )
        else:
            first = layer(x, cu_doc_lens=CU)
        got.append((first, *torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])))
    for a, b in zip(*got):
        assert torch.equal(a, b)


def test_dropout_is_off_in_eval_and_unbiased_in_training() -> None:
    """Page 2, failure 4: dropout stayed on in eval."""
    layer = Attention(d_model=16, n_heads=2, dropout=0.4, dtype=torch.float64)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    plain = Attention(d_model=16, n_heads=2, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    want = plain(x)
    assert torch.equal(layer.eval()(x), want)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    assert relative(mean, want) < 0.05


@pytest.mark.parametrize("window", [None, 3])
def test_dropout_gradient(window: int | None) -> None:
    """With the generator put back the dropped weights are the same: finite differences apply."""
    layer = Attention(
        d_model=8, n_heads=4, n_kv_heads=2, dropout=0.4, window_size=window, dtype=torch.float64
    )
    x = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)

    def seeded(y: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(y, cu_doc_lens=cu)

    assert torch.autograd.gradcheck(seeded, (x,), fast_mode=True)


@each_layer
def test_deterministic_mode(make: Any) -> None:
    layer = make(window_size=4)
    x = torch.randn(2, 9, 16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out = layer(x, cu_doc_lens=CU)
            runs.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@each_layer
def test_second_derivative_is_an_error(make: Any) -> None:
    layer = make()
    x = torch.randn(1, 5, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_normalize_matrices_never_gives_nan() -> None:
    layer = NormalizedAttention(d_model=16, n_heads=4)
    with torch.no_grad():
        layer.w_q.weight[3] = 0
        layer.w_out.weight[:, 2] = 0
    layer.normalize_matrices()
    assert all(p.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(layer.w_k.weight.norm(dim=-1), torch.ones(16))
    norms = torch.ones(16)
    norms[2] = 0
    torch.testing.assert_close(layer.w_out.weight.norm(dim=0), norms)


def test_flops_count_the_window() -> None:
    full = Attention(d_model=32, n_heads=4, n_kv_heads=2, bias=False)
    windowed = Attention(d_model=32, n_heads=4, n_kv_heads=2, bias=False, window_size=10)
    weights = 32 * 32 * 2 + 32 * 16 * 2
    assert full.num_flops_per_token(100) == 6 * weights + 12 * 32 * 100
    assert windowed.num_flops_per_token(100) == 6 * weights + 12 * 32 * 10
    assert windowed.num_flops_per_token(4) == 6 * weights + 12 * 32 * 4


def test_documents_are_exact_at_long_offsets() -> None:
    """A document gives the same bits wherever it is packed: positions restart in each."""
    layer = Attention(d_model=16, n_heads=2, rope=RoPEConfig(), window_size=8)
    document = torch.randn(1, 20, 16)
    x = torch.cat([torch.randn(1, 9_973, 16), document], dim=1)
    cu = torch.tensor([0, 9_973, 9_993], dtype=torch.int32)
    with torch.no_grad():
        assert relative(layer(x, cu_doc_lens=cu)[:, 9_973:], layer(document)) < 1e-6


def test_sharded_rope_buffers_are_applied_row_by_row() -> None:
    """Page 2, failure 1: buffers of a shard restarted at the shard's document starts.

    A zig-zag shard holds two pieces of a document. Restarted positions would close the gap between
    them, which RoPE, being relative, would show.
    """
    layer = Attention(d_model=16, n_heads=2, rope=RoPEConfig(theta=THETA), dtype=torch.float64)
    params = dict(layer.named_parameters())
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    cu, rows = [0, 8, 12], torch.tensor([0, 1, 2, 3, 40, 41, 42, 43, 7, 8, 30, 31])
    buffers = layer.rope.get_buffers(64, "cpu", torch.float64)
    got = run(layer, x, cu, pos_sin=buffers.pos_sin[rows], pos_cos=buffers.pos_cos[rows])
    want = attention_layer(params, x, head_dim=8, cu=cu, theta=THETA, pos=rows)
    assert relative(got, want) < 1e-12
    assert relative(run(layer, x, cu), want) > 1e-3


@pytest.mark.parametrize("make", [Attention, FusedAttention])
def test_rope_buffers_do_not_go_on_in_the_next_row(make: Any) -> None:
    """They give each row the positions 0 to T - 1: a document that crosses rows would restart."""
    rope = RoPEConfig(name="fused" if make is FusedAttention else "default", theta=THETA)
    layer = make(d_model=16, n_heads=2, rope=rope, dtype=torch.float64)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    buffers = layer.rope.get_buffers(4, "cpu", torch.float64)
    where = {"pos_sin": buffers.pos_sin, "pos_cos": buffers.pos_cos}
    for ends in ([0, 3, 4, 8, 8, 12], [0, 4, 8, 10, 12]):  # a document starts with each row
        cu = torch.tensor(ends, dtype=torch.int32)
        assert relative(layer(x, cu_doc_lens=cu, **where), layer(x, cu_doc_lens=cu)) < 1e-12
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ends in ([0, 5, 8, 12], [0, 12], [0, 4, 12]):
        cu = torch.tensor(ends, dtype=torch.int32)
        layer(x, cu_doc_lens=cu)
        with pytest.raises(ValueError, match="crosses from one row of the batch to the next"):
            layer(x, cu_doc_lens=cu, **where)
    with pytest.raises(RuntimeError, match="crosses from one row of the batch to the next"):
        compiled(x, cu_doc_lens=cu, **where)


@pytest.mark.parametrize("rows", [3, 5])
def test_a_layer_s_rope_buffers_are_the_rows_of_its_input(rows: int) -> None:
    """A longer one would be unsharded, and nobody could say which rows are meant."""
    layer = Attention(d_model=16, n_heads=2, rope=RoPEConfig())
    buffers = layer.rope.get_buffers(rows, "cpu")
    with pytest.raises(ValueError, match="for each of the input's 4 positions, got shape"):
        layer(torch.randn(1, 4, 16), pos_sin=buffers.pos_sin, pos_cos=buffers.pos_cos)
