"""SmolLM2-135M-Instruct against transformers with the same weights, which this file reads from
GGUF by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from olmo_core.hf import PretrainedError, load_model, load_tokenizer, smollm2_path
from olmo_core.hf.smollm2 import INSTALL
from olmo_core.nn.transformer import Transformer, generate

pytestmark = pytest.mark.slow
TEXT = (
    "The lighthouse keeper climbed the stairs each evening, as he had for thirty years, and lit "
    "the lamp. On clear nights he could see the ships far out, and he knew most of them by the "
    "way they moved. In winter 1887 the sea froze along the coast for 12 miles, and no ship came. "
    "He lit the lamp all the same. When his daughter asked him why, he said that a light is not "
    "for the ships one sees."
)
QUESTION = [{"role": "user", "content": "What is the capital of France, and why is it famous?"}]


@pytest.fixture(scope="module")
def ours() -> Transformer:
    try:
        return load_model(smollm2_path())
    except PretrainedError:
        pytest.skip(f"SmolLM2 is not installed: {INSTALL}")


@pytest.fixture(scope="module")
def theirs(ours: Transformer) -> Any:
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for tensor in gguf.GGUFReader(smollm2_path()).tensors:
        x = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        words = tensor.name.split(".")
        if words[0] == "blk":
            name = f"model.layers.{words[1]}.{parts[words[2]]}.weight"
            heads = {"attn_q": 9, "attn_k": 3}.get(words[2])
            if heads is not None:  # rows in neighbouring pairs there
                x = x.view(heads, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[words[0]]
            name += ".weight"
        state[name] = x
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def test_loss_of_a_text(ours: Transformer, theirs: Any) -> None:
    ids = torch.tensor([load_tokenizer(smollm2_path()).encode(TEXT)])
    with torch.no_grad():
        want = float(theirs(ids, labels=ids).loss)
        got = float(ours(ids[:, :-1], labels=ids[:, 1:].contiguous()))
        logits = (ours(ids) - theirs(ids).logits).abs().max()
    assert abs(got - want) < 1e-3
    assert got < 4  # rows in the wrong order give more than 5
    assert logits < 1e-3


def test_greedy_text(ours: Transformer, theirs: Any) -> None:
    prompt = load_tokenizer(smollm2_path()).encode_chat(QUESTION)
    steps = generate(ours, [prompt], max_new_tokens=64, temperature=0)
    got = [token for (token,) in steps]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        mask = torch.ones_like(ids)
        # Logits as they are: min_new_tokens would forbid the end of the answer.
        want = theirs.generate(ids, attention_mask=mask, eos_token_id=[], pad_token_id=0, **options)
        for i, (a, b) in enumerate(zip(got, want[0, len(prompt) :].tolist(), strict=True)):
            if a != b:
                best = theirs(want[:, : len(prompt) + i]).logits[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-3, f"the texts part at token {i}"
                break


def test_the_tokenizer() -> None:
    try:
        tokenizer = load_tokenizer(smollm2_path())
    except PretrainedError:
        pytest.skip(f"SmolLM2 is not installed: {INSTALL}")
    assert tokenizer.encode("What is gravity? 123") == [1780, 314, 9354, 47, 216, 33, 34, 35]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.stop_tokens == {2}
    assert "SmolLM, trained by Hugging Face" in tokenizer.render_chat(QUESTION)
