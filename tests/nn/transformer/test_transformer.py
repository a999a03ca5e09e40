"""The whole model against a reference written here, packed against separate, meta against CPU."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.data import doc_lens_from_lengths
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionConfig, SlidingWindowAttentionConfig
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import (
    InitMethod,
    Transformer,
    TransformerBlockConfig,
    TransformerConfig,
)

VOCAB = 23
BLOCKS = ["pre_norm", "post_norm", "sandwich_norm", "ngpt"]


def config(block: str = "pre_norm", window: int | None = None, **options: Any) -> TransformerConfig:
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, rope=RoPEConfig(theta=100))
    if block == "ngpt":
        attention.name = "normalized"
    else:
        attention.bias = False
    if window:
        attention.sliding_window = SlidingWindowAttentionConfig(
            [window], force_full_attention_on_first_layer=False
        )
    defaults: dict[str, Any] = {
        "d_model": 32,
        "vocab_size": VOCAB,
        "n_layers": 2,
        "blocks": [TransformerBlockConfig(name=block, sequence_mixer=attention)],
        "init_method": "normalized" if block == "ngpt" else "fan_in",
        "init_std": 0.3,
        "dtype": "float64",
    }
    return TransformerConfig(**{**defaults, **options})


def build(*args: Any, **options: Any) -> Transformer:
    model = config(*args, **options).build()
    model.init_weights(seed=1)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def reference(model: Transformer, ids: Tensor, block: str) -> Tensor:
    """Logits of ``config(block)`` in float64, one document, straight from the papers."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    d, heads, kv, hd, t = 32, 4, 2, 8, ids.shape[1]
    angles = torch.arange(t).double()[:, None] / 100 ** (torch.arange(0, hd, 2).double() / hd)
    cos, sin = angles.cos(), angles.sin()

    def rope(x: Tensor) -> Tensor:
        a, b = x[..., : hd // 2], x[..., hd // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(x: Tensor, p: str) -> Tensor:
        q, k, v = (x @ w[f"{p}.w_{n}.weight"].T for n in "qkv")
        scale = hd**-0.5
        if block == "ngpt":
            q, k, scale = q * w[f"{p}.sq"] * d**0.5, k * w[f"{p}.sk"] * d**0.5, hd**0.5
        q, k, v = (y.unflatten(-1, (-1, hd)).transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(heads // kv, 1) for y in (k, v))
        scores = rope(q) @ rope(k).transpose(-1, -2) * scale
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{p}.w_out.weight"].T

    def feed_forward(x: Tensor, p: str) -> Tensor:
        a, b = x @ w[f"{p}.w1.weight"].T, x @ w[f"{p}.w3.weight"].T
        if block == "ngpt":
            a, b = a * w[f"{p}.sw1"] * d**0.5, b * w[f"{p}.sw3"]
        return (F.silu(a) * b) @ w[f"{p}.w2.weight"].T

    def norm(x: Tensor, p: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{p}.weight"]

    x = w["embeddings.weight"][ids]
    for i in range(2):
        b = f"blocks.{i}"
        mixer, ff = f"{b}.sequence_mixer", f"{b}.feed_forward"
        if block == "pre_norm":
            x = x + attention(norm(x, f"{mixer}_norm"), mixer)
            x = x + feed_forward(norm(x, f"{ff}_norm"), ff)
        elif block == "sandwich_norm":
            mixed = attention(norm(x, f"{mixer}_norm"), mixer)
            x = x + norm(mixed, f"{mixer}_post_norm")
            x = x + norm(feed_forward(norm(x, f"{ff}_norm"), ff), f"{ff}_post_norm")
        elif block == "post_norm":
            x = x + norm(attention(x, mixer), f"{mixer}_norm")
            x = x + norm(feed_forward(x, ff), f"{ff}_norm")
        else:
            rate = w[f"{b}.mixer_alpha"] * 0.05 * d**0.5
            x = unit(x + rate * (unit(attention(x, mixer)) - x))
            rate = w[f"{b}.feed_forward_alpha"] * 0.05 * d**0.5
            x = unit(x + rate * (unit(feed_forward(x, ff)) - x))
    if block == "ngpt":
        return x @ w["lm_head.w_out.weight"].T * w["lm_head.sz"] * d**0.5
    return norm(x, "lm_head.norm") @ w["lm_head.w_out.weight"].T


def perturb(model: Transformer) -> Transformer:
    """Move vectors away from the ones at which they start, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_reference(block: str) -> None:
    model, ids = perturb(build(block)), tokens(2, 11)
    torch.testing.assert_close(model(ids), reference(model, ids, block), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
def test_autocast_trains_any_block(block: str) -> None:
    """Float32 weights under bfloat16 autocast err no more than a model in bfloat16."""
    exact, ids, labels = perturb(build(block)), tokens(2, 11), tokens(2, 11, seed=1)

    def step(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        model = copy.deepcopy(exact).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids)
            loss = model(ids, labels=labels)
        return [logits, *torch.autograd.grad(loss, list(model.parameters()))]

    want, low, got = (
        torch.cat([x.double().flatten() / x.double().norm() for x in step(*how)])
        for how in ((torch.float64, False), (torch.bfloat16, False), (torch.float32, True))
    )
    assert (got - want).norm() < 1.5 * (low - want).norm()


def test_an_embedding_scale_is_rounded_to_the_models_dtype() -> None:
    plain, scaled = build(), build(embedding_scale=57.3)
    with torch.no_grad():
        plain.embeddings.weight *= 57.3
    torch.testing.assert_close(scaled(tokens(1, 5)), plain(tokens(1, 5)))
    low = build(embedding_scale=57.3, dtype="bfloat16")
    seen: list[Tensor] = []
    low.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    low(tokens(1, 5))
    assert torch.equal(seen[0], low.embeddings(tokens(1, 5)) * torch.tensor(57.3).bfloat16())


def test_a_norm_keeps_the_dtype_that_its_configuration_names() -> None:
    norm = LayerNormConfig(name="rms", bias=False, dtype="float32")
    made = config("sandwich_norm", dtype="bfloat16", layer_norm=norm)
    made.blocks[0].layer_norm = norm
    model = made.build()
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert {d for n, d in dtypes.items() if "_norm." in n or "head.norm" in n} == {torch.float32}
    assert dtypes["blocks.0.feed_forward.w1.weight"] == torch.bfloat16
    assert made.num_params() == model.num_params()
    assert model(tokens(1, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_packed_loss_is_the_mean_over_separate_documents(block: str, window: int | None) -> None:
    model = perturb(build(block, window))
    lengths = [5, 1, 9, 4, 13]  # 2 rows of 16; the third document fills the first row's end
    ids, labels = tokens(2, 16), tokens(2, 16, seed=1)
    labels[0, 2] = labels[1, 7] = -100
    lens = doc_lens_from_lengths(lengths, total=32, size=9)

    packed = model(ids, labels=labels, **lens._asdict())
    packed_grads = torch.autograd.grad(packed, list(model.parameters()))

    total, count = torch.zeros((), dtype=torch.float64), 0
    starts = [0, *itertools.accumulate(lengths)]
    for a, b in itertools.pairwise(starts):
        y = labels.flatten()[a:b]
        if bool((y >= 0).any()):
            part = model(ids.flatten()[None, a:b], labels=y[None], loss_reduction="sum")
            total, count = total + part, count + int((y >= 0).sum())
    separate = total / count
    separate_grads = torch.autograd.grad(separate, list(model.parameters()))

    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-11)
    for a, b in zip(packed_grads, separate_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # The documents matter: without their ends the loss is another.
    assert (model(ids, labels=labels) - packed).abs() > 1e-3


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tied", [False, True])
def test_meta_build_equals_cpu_build(block: str, tied: bool) -> None:
    cpu = build(block, tie_embeddings=tied)
    meta = config(block, tie_embeddings=tied).build(init_device="meta").to_empty(device="cpu")
    meta.init_weights(seed=1)
    assert cpu.state_dict().keys() == meta.state_dict().keys()
    for name, value in cpu.state_dict().items():
        assert torch.equal(value, meta.state_dict()[name]), name
    assert torch.equal(cpu(tokens(1, 6)), meta(tokens(1, 6)))
    assert ("lm_head.w_out.weight" in cpu.state_dict()) != tied


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tied", [False, True])
def test_num_params(block: str, tied: bool) -> None:
    model = build(block, tie_embeddings=tied)
    counted = sum(p.numel() for p in model.parameters())
    assert model.num_params() == model.config.num_params() == counted


def test_num_flops_per_token_counts_matrices_and_attention() -> None:
    model = build()
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    matrices -= model.embeddings.weight.numel()
    assert model.num_flops_per_token(10) == 6 * matrices + 2 * 12 * 32 * 10


@pytest.mark.parametrize("method", list(InitMethod))
def test_init_method_reaches_every_part(method: InitMethod) -> None:
    model = build(init_method=method, d_model=64, init_std=0.02)
    block = model.blocks[1]
    for weight, output in [
        (block.sequence_mixer.w_q.weight, False),
        (block.sequence_mixer.w_out.weight, True),
        (block.feed_forward.w1.weight, False),
        (block.feed_forward.w2.weight, True),
    ]:
        std = method.get_std(
            fan_in=weight.shape[1], d_model=64, block_idx=1, num_blocks=2, output=output
        )
        # A normal distribution cut at three standard deviations is 1.3% narrower.
        assert float(weight.detach().std()) == pytest.approx(0.987 * std, rel=0.06)


def test_chunked_loss_equals_the_whole_one() -> None:
    whole, chunked = build(), build(loss_chunk_size=5)
    ids, labels = tokens(2, 9), tokens(2, 9, seed=1)
    labels[0] = -100
    losses = [model(ids, labels=labels) for model in (whole, chunked)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(losses[0], list(whole.parameters())),
        torch.autograd.grad(losses[1], list(chunked.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_loss_of_ignored_labels_is_zero_and_bfloat16_is_summed_in_float32() -> None:
    model = build(dtype="bfloat16")
    ids = tokens(1, 300)
    assert model(ids, labels=torch.full_like(ids, -100)) == 0
    loss = model(ids, labels=ids, loss_reduction="sum")
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(model(ids)[0].float(), ids[0], reduction="sum")
    assert torch.equal(loss, expected)


def test_logits_to_keep() -> None:
    model, ids = build(), tokens(2, 7)
    torch.testing.assert_close(model(ids, logits_to_keep=2), model(ids)[:, -2:])


def test_ngpt_stays_on_the_sphere() -> None:
    model = build("ngpt", dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens(2, 8), labels=tokens(2, 8, seed=1)).backward()
    optimizer.step()

    def lengths() -> Tensor:
        rows = [model.embeddings.weight, model.lm_head.w_out.weight]
        for block in model.blocks:
            mixer, ff = block.sequence_mixer, block.feed_forward
            rows += [mixer.w_q.weight, mixer.w_k.weight, mixer.w_v.weight, mixer.w_out.weight.T]
            rows += [ff.w1.weight, ff.w3.weight, ff.w2.weight.T]
        return torch.cat([row.norm(dim=1) for row in rows])

    assert (lengths() - 1).abs().max() > 0.1
    model.normalize_matrices()
    torch.testing.assert_close(lengths(), torch.ones_like(lengths()))


def test_pattern_repeats_over_layers() -> None:
    blocks = [TransformerBlockConfig(name=name) for name in ("pre_norm", "post_norm")]
    five = config(blocks=blocks, pattern=[0, 0, 1], n_layers=5)
    assert [b.name for b in five.layer_blocks()] == ["pre_norm", "pre_norm", "post_norm"] + [
        "pre_norm"
    ] * 2
    assert [b.name for b in config(blocks=blocks, n_layers=3).layer_blocks()] == [
        "pre_norm", "post_norm", "pre_norm",
    ]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_config_round_trip(block: str) -> None:
    one = config(block, window=4)
    assert TransformerConfig.from_dict(one.as_config_dict()) == one
    changed = one.merge(["blocks.0.sequence_mixer.n_heads=8", "d_model=64"])
    assert changed.blocks[0].sequence_mixer.n_heads == 8 and one.d_model == 32


@pytest.mark.parametrize("block", BLOCKS)
def test_compiles_to_one_graph_for_any_documents(block: str) -> None:
    model = build(block, window=4, dtype="float32")
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids, labels = tokens(2, 16), tokens(2, 16, seed=1)
    for lengths in ([32], [5, 20, 7], [1] * 8 + [24]):
        cu, _ = doc_lens_from_lengths(lengths, total=32, size=12)
        options = {"labels": labels, "cu_doc_lens": cu, "max_doc_len": 32}
        torch.testing.assert_close(compiled(ids, **options), model(ids, **options))
    assert len(graphs) == 1


def test_autocast() -> None:
    model, ids = build(dtype="float32"), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (loss - model(ids, labels=ids)).abs() < 0.1


BAD_CONFIGS = {
    "no width": ({"d_model": 0}, "d_model must be at least 1, got 0"),
    "no tokens": ({"vocab_size": 0}, "vocab_size"),
    "no layers": ({"n_layers": 0}, "n_layers"),
    "no blocks": ({"blocks": []}, "blocks is empty"),
    "empty pattern": ({"pattern": []}, r"indices of the 1 blocks"),
    "pattern too high": ({"pattern": [0, 1]}, r"got \[0, 1\]"),
    "pattern negative": ({"pattern": [-1]}, r"got \[-1\]"),
    "chunk of nothing": ({"loss_chunk_size": 0}, "loss_chunk_size"),
    "unknown init": ({"init_method": "xavier"}, "xavier"),
    "unknown dtype": ({"dtype": "float8"}, "float8"),
    "unknown block": ({"blocks": [{"name": "sandwich"}]}, "sandwich"),
    "ngpt among others": (
        {"blocks": [config("ngpt").blocks[0], TransformerBlockConfig()]},
        "do not mix",
    ),
    "ngpt without normalized attention": (
        {"blocks": [TransformerBlockConfig(name="ngpt")]},
        "Attention has none",
    ),
    "ngpt without normalized feed-forward": (
        {
            "blocks": [
                TransformerBlockConfig(
                    name="ngpt",
                    sequence_mixer=AttentionConfig(name="normalized", n_heads=4),
                    feed_forward=FeedForwardConfig(64),
                )
            ]
        },
        "FeedForward has none",
    ),
    "heads do not divide": (
        {"blocks": [TransformerBlockConfig(sequence_mixer=AttentionConfig(n_heads=5))]},
        "5",
    ),
    "norm with eps below 0": ({"layer_norm": LayerNormConfig(name="rms", eps=-1)}, "eps"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name: str) -> None:
    options, message = BAD_CONFIGS[name]
    with pytest.raises(OLMoConfigurationError, match=message):
        base = config().as_config_dict()
        blocks = options.get("blocks")
        if blocks and isinstance(blocks[0], dict):
            TransformerConfig.from_dict({**base, **options}).build()
        config(**options).build()


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "1-D ids": ({"input_ids": tokens(5)}, r"input_ids must be \(batch, tokens\)"),
    "float ids": ({"input_ids": torch.zeros(1, 5)}, "float32"),
    "labels of another shape": ({"labels": tokens(2, 4)}, r"input_ids' shape \(2, 5\)"),
    "int32 labels": ({"labels": tokens(2, 5).int()}, "int64"),
    "unknown reduction": ({"labels": tokens(2, 5), "loss_reduction": "max"}, "'max'"),
    "max_doc_len alone": ({"max_doc_len": 5}, "max_doc_len"),
    "short documents": ({"cu_doc_lens": torch.tensor([0, 9], dtype=torch.int32)}, "10"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    options, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        build()(**{"input_ids": tokens(2, 5), **options})
