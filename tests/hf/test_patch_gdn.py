"""transformers' hybrids with their delta net computed here: their own numbers, and documents that
stay apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf.models import build, llama, olmo_hybrid, qwen3_5, qwen3_next, tokens, transformers
from olmo_core.hf import PretrainedError, patch_gdn, register

MODELS = {"olmo_hybrid": olmo_hybrid, "qwen3_5": qwen3_5, "qwen3_next": qwen3_next}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = [1, 11, 2, 9]


def pair(family: str) -> tuple[Any, Any]:
    """The model as it is, and patched, on this library's attention."""
    register()
    theirs = build(MODELS[family])
    ours = copy.deepcopy(theirs)
    assert patch_gdn(ours) == patch_gdn(ours) == 3
    ours.set_attn_implementation("olmo_core")
    theirs.set_attn_implementation("eager")
    return theirs, ours


@pytest.mark.parametrize("family", MODELS)
def test_the_same_logits_and_gradients(family: str) -> None:
    theirs, ours = pair(family)
    ids = tokens(2, 70)
    want, got = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-5)
    cotangent = torch.randn_like(want)
    want.backward(cotangent)
    got.backward(cotangent)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 5e-5 * b.grad.norm().clamp(min=1), name


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_packed_documents_stay_apart(family: str, rows: int, use_cache: bool) -> None:
    theirs, ours = pair(family)
    ids = tokens(rows, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    with torch.no_grad():
        got = ours(ids, position_ids=positions, use_cache=use_cache).logits
        want = separate(ours, ids)
        torch.testing.assert_close(got, want, **TOLERANCE)
        torch.testing.assert_close(want, separate(theirs, ids), atol=3e-5, rtol=1e-5)
        leaked = theirs(ids, position_ids=positions, use_cache=use_cache).logits
    assert (leaked - want).abs().max() > 0.01, "transformers changed: say so in the documentation"


def separate(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(piece).logits for piece in ids.split(LENGTHS, 1)], 1)


def test_lengths_of_a_collator() -> None:
    _, ours = pair("olmo_hybrid")
    ids = tokens(1, sum(LENGTHS))
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": piece[0].tolist()} for piece in ids.split(LENGTHS, 1)])
    del batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, separate(ours, ids), **TOLERANCE)


@pytest.mark.parametrize("family", MODELS)
def test_greedy_text_of_padded_prompts(family: str) -> None:
    theirs, ours = pair(family)
    prompts = torch.cat([torch.cat([torch.zeros(1, 5).long(), tokens(1, 4)], 1), tokens(1, 9)])
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(ours.generate(prompts, **options), theirs.generate(prompts, **options))


def test_a_prompt_in_pieces() -> None:
    theirs, ours = pair("olmo_hybrid")
    ids, outputs = tokens(2, 20), []
    with torch.no_grad():
        for model in (theirs, ours):
            cache = transformers.DynamicCache(config=model.config)
            pieces = ids.split([2, 9, 1, 8], 1)
            logits = [model(piece, past_key_values=cache).logits for piece in pieces]
            outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(outputs[1], outputs[0], atol=3e-5, rtol=1e-5)


def test_right_padding_leaves_the_state_alone() -> None:
    _, ours = pair("qwen3_5")
    ids = tokens(1, 9)
    padded = torch.cat([ids, torch.zeros(1, 4).long()], 1)
    mask = (torch.arange(13) < 9).long()[None]
    with torch.no_grad():
        caches = [transformers.DynamicCache(config=ours.config) for _ in range(2)]
        ours(ids, past_key_values=caches[0])
        ours(padded, attention_mask=mask, past_key_values=caches[1])
    states = [cache.get_recurrent_state(0, state_idx=0) for cache in caches]
    torch.testing.assert_close(states[1], states[0], **TOLERANCE)


def test_what_is_refused() -> None:
    with pytest.raises(PretrainedError, match="LlamaForCausalLM has no gated delta net layer"):
        patch_gdn(build(llama))
    _, ours = pair("olmo_hybrid")
    cache = transformers.DynamicCache(config=ours.config)
    positions = torch.cat([torch.arange(5, 8), torch.arange(3)])[None]
    with torch.no_grad():
        ours(tokens(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="packed documents cannot continue a cache"):
            ours(tokens(1, 6), position_ids=positions, past_key_values=cache)

    class OtherDeltaNet(nn.Module):
        pass

    model = nn.Module()
    model.linear_attn = OtherDeltaNet()
    with pytest.raises(PretrainedError, match="OtherDeltaNet is not known here"):
        patch_gdn(model)
