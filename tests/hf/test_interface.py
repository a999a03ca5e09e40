"""Models of transformers on this library's attention: their own numbers where theirs are right,
and documents that stay apart where theirs leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf.models import FAMILIES, WINDOW, build, tokens, transformers
from olmo_core.hf import register

MODELS = ["llama", "olmo2", "olmo3", "qwen3", "gemma3"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = [1, 2 * WINDOW, 3, 9]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def on(name: str, family: str) -> Any:
    model = build(FAMILIES[family])
    model.set_attn_implementation(name)
    return model


def packed() -> tuple[Tensor, Tensor]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return tokens(1, sum(LENGTHS)), positions[None]


def separate(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(piece, use_cache=False).logits for piece in ids.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("name", ["olmo_core", "olmo_core_torch"])
@pytest.mark.parametrize("family", MODELS)
def test_the_same_logits_and_gradients(family: str, name: str) -> None:
    theirs, ours = on("eager", family), on(name, family)
    ids = tokens(2, 17)
    want, got = theirs(ids), ours(ids)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
    cotangent = torch.randn_like(want.logits)
    for out in (want, got):
        out.logits.backward(cotangent)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        error = (a.grad - b.grad).abs().max()
        assert error <= 1e-5 * b.grad.abs().max().clamp(min=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_packed_documents_stay_apart(family: str, with_mask: bool, use_cache: bool) -> None:
    model = on("olmo_core", family)
    ids, positions = packed()
    mask = torch.ones_like(ids) if with_mask else None
    options = {"position_ids": positions, "attention_mask": mask, "use_cache": use_cache}
    with torch.no_grad():
        got, want = model(ids, **options).logits, separate(model, ids)
        torch.testing.assert_close(got, want, **TOLERANCE)
        theirs = on("sdpa", family)(ids, **options).logits
    leaks = bool((theirs - want).abs().max() > 0.1)
    assert leaks == (with_mask or use_cache), "transformers changed: say so in the documentation"


def test_lengths_of_a_collator() -> None:
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    ids, _ = packed()
    batch = collator([{"input_ids": piece[0].tolist()} for piece in ids.split(LENGTHS, 1)])
    del batch["labels"], batch["position_ids"]
    model = on("olmo_core", "llama")
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        got = model(**batch, position_ids=positions).logits
        torch.testing.assert_close(got, separate(model, ids), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_padding(family: str, side: str) -> None:
    model = on("olmo_core", family)
    short, long = tokens(1, 6), tokens(1, 14)
    pad = torch.zeros(1, 8, dtype=torch.int64)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    real = torch.cat([torch.zeros(1, 8), torch.ones(1, 6)], 1).long()
    mask = torch.cat([real if side == "left" else real.flip(1), torch.ones(1, 14).long()])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(torch.cat([row, long]), attention_mask=mask, position_ids=positions).logits
        got = logits[:1, 8:] if side == "left" else logits[:1, :6]
        torch.testing.assert_close(got, model(short).logits, **TOLERANCE)
        torch.testing.assert_close(logits[1:], model(long).logits, **TOLERANCE)


@pytest.mark.parametrize("family", MODELS)
def test_greedy_text_of_padded_prompts(family: str) -> None:
    prompts = torch.cat([torch.cat([torch.zeros(1, 5).long(), tokens(1, 4)], 1), tokens(1, 9)])
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = on("eager", family).generate(prompts, **options)
        got = on("olmo_core", family).generate(prompts, **options)
    assert torch.equal(got, want)


def test_a_prompt_in_pieces() -> None:
    """Several queries behind keys of a cache, with a window that drops some of them."""
    theirs, ours = on("eager", "olmo3"), on("olmo_core", "olmo3")
    ids = tokens(2, 20)
    with torch.no_grad():
        outputs = []
        for model in (theirs, ours):
            cache, logits = transformers.DynamicCache(config=model.config), []
            for piece in ids.split([9, 7, 4], 1):
                logits.append(model(piece, past_key_values=cache).logits)
            outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(outputs[1], outputs[0], **TOLERANCE)


def test_what_is_refused() -> None:
    model = on("olmo_core", "llama")
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match="tokens of row 0 do not lie together"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"2-D attention_mask \(batch, keys\), got shape"):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match="needs keys that end with the queries"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static", do_sample=False)
    both_ways = build(FAMILIES["gemma3"], use_bidirectional_attention=True)
    both_ways.set_attn_implementation("olmo_core")
    with pytest.raises(ValueError, match=r"is causal|asks for another mask"):
        both_ways(ids)
    softcap = build(FAMILIES["gemma3"])
    softcap.set_attn_implementation("olmo_core")
    layer = softcap.model.layers[0].self_attn
    q = torch.randn(1, 6, 4, 16)
    with pytest.raises(ValueError, match="and has no softcap"):
        transformers.AttentionInterface()["olmo_core"](layer, q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match="one head_dim, got 16 of queries and 8 of values"):
        transformers.AttentionInterface()["olmo_core"](layer, q, q, q[..., :8], None)


def test_tokens_that_see_later_ones() -> None:
    from olmo_core.hf.interface import padding_mask

    def blocks(batch: Any, head: Any, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) | ((q // 3 == 1) & (kv // 3 == 1))

    with pytest.raises(ValueError, match="tokens that see later ones"):
        padding_mask(1, 9, 9, mask_function=blocks)
    assert padding_mask(1, 9, 9, mask_function=lambda b, h, q, kv: kv <= q) is None
