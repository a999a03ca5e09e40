"""Spoiled folders, files and configurations: one error each, which says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf.models import FAMILIES, build, qwen3_next
from olmo_core.hf import PretrainedError, load_mixer, load_model, load_tokenizer

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    build(FAMILIES["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def with_config(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return spoil


def with_shards(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Two shards with their index, then ``change``, then the index is written."""

    def spoil(folder: Path) -> None:
        tensors = sorted(load_file(folder / WEIGHTS).items())
        (folder / WEIGHTS).unlink()
        weight_map = {}
        for file, part in (("a.safetensors", tensors[:20]), ("b.safetensors", tensors[20:])):
            save_file(dict(part), folder / file)
            weight_map |= {name: file for name, _ in part}
        change(folder, weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def truncate(file: str, part: float = 0.5) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * part)])

    return spoil


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


Q = "model.layers.1.self_attn.q_proj.weight"
SCALED = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 2.0}
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"no folder: give one with config.json and safetensors"),
    "no config": (remove(CONFIG), r"config.json cannot be read: No such file"),
    "truncated config": (truncate(CONFIG), r"config.json is not JSON"),
    "config is a list": (
        lambda f: (f / CONFIG).write_text("[]"),
        r"holds a list, expected a JSON object",
    ),
    "no weights": (remove(WEIGHTS), r"neither model.safetensors nor model.safetensors.index.json"),
    "pickled weights": (
        pickled,
        r"pickled weights alone \(pytorch_model.bin\), which can run code",
    ),
    "truncated weights": (truncate(WEIGHTS), r"model.safetensors cannot be read: "),
    "truncated header": (truncate(WEIGHTS, 0.001), r"model.safetensors cannot be read: "),
    "empty weights": (truncate(WEIGHTS, 0), r"model.safetensors cannot be read: "),
    "a missing shard": (
        with_shards(lambda f, _: (f / "b.safetensors").unlink()),
        r"lacks shards that .*:\n- b.safetensors",
    ),
    "a truncated shard": (
        with_shards(lambda f, _: truncate("b.safetensors")(f)),
        r"b.safetensors cannot be read",
    ),
    "a tensor that the index forgets": (
        with_shards(lambda _, names: names.pop(Q)),
        rf"differ:\n- {re.escape(Q)} is in [ab].safetensors unasked",
    ),
    "a tensor that no shard has": (
        with_shards(lambda _, names: names.update(extra="a.safetensors")),
        r"differ:\n- extra is not in a.safetensors",
    ),
    "a shard elsewhere": (
        with_shards(lambda _, names: names.update({Q: "../a.safetensors"})),
        r"'../a.safetensors': not a file beside it",
    ),
    "an empty index": (with_shards(lambda _, names: names.clear()), r"has no weight_map"),
    "a missing tensor": (with_tensors(lambda t: t.pop(Q)), rf"- {re.escape(Q)} is missing"),
    "a tensor too many": (
        with_tensors(lambda t: t.update(more=torch.zeros(2))),
        r"- more is unknown to this model",
    ),
    "several at once": (
        with_tensors(
            lambda t: (t.pop(Q), t.pop("model.norm.weight"), t.update(a=t["lm_head.weight"] + 1))
        ),
        r"- model.norm.weight is missing\n- .*q_proj.weight is missing\n- a is unknown",
    ),
    "a tensor of another shape": (
        with_tensors(lambda t: t.update({Q: t[Q][:40].clone()})),
        r"w_q.weight the shape \(40, 48\), the configuration says \(48, 48\)",
    ),
    "an integer tensor": (
        with_tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        r"q_proj.weight is torch.int8: quantised weights are read from GGUF",
    ),
    "tied, and yet different": (
        with_config(tie_word_embeddings=True),
        r"lm_head.weight differs from the embeddings that it is tied to",
    ),
    "another family": (with_config(model_type="gpt2"), r"model_type='gpt2': supported are llama"),
    "no family": (with_config(model_type=None), r"model_type=None: supported are llama"),
    "another activation": (with_config(hidden_act="relu2"), r"- hidden_act='relu2'"),
    "dynamic RoPE": (
        with_config(rope_parameters={"rope_type": "dynamic", **SCALED}),
        r"- rope_type='dynamic' \(there are default, linear, llama3, yarn\)",
    ),
    "YaRN with a factor of its own": (
        with_config(rope_parameters={"rope_type": "yarn", **SCALED, "attention_factor": 3.0}),
        r"- YaRN's attention_factor=3.0 \(it is 1.06931\)",
    ),
    "YaRN without rounding": (
        with_config(rope_parameters={"rope_type": "yarn", **SCALED, "truncate": False}),
        r"- YaRN's truncate=False",
    ),
    "a scaling without its factor": (
        with_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        r"- rope_parameters of linear lack 'factor'",
    ),
    "an unknown value of a scaling": (
        with_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "bend": 1}),
        r"- bend=1 in rope_parameters of linear",
    ),
    "partial rotation where there is none": (
        with_config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        r"- partial_rotary_factor=0.5, which LlamaForCausalLM lacks",
    ),
    "a quantised model": (
        with_config(quantization_config={"quant_method": "gptq"}),
        r"- quantization_config=",
    ),
    "a softcap": (with_config(final_logit_softcapping=30.0), r"- final_logit_softcapping=30.0"),
    "an unknown value": (
        with_config(residual_multiplier=0.5, shiny=3),
        r"- residual_multiplier=0.5, which is unknown here\n- shiny=3.*\n.*ignore=",
    ),
    "windows in a family without": (
        with_config(layer_types=["sliding_attention"] * 4),
        r"layer_types=.*expected 4, of \['full_attention'\]",
    ),
    "too few types of layers": (
        with_config(layer_types=["full_attention"]),
        r"layer_types=\['full_attention'\] \(expected 4",
    ),
    "heads that do not fit": (
        with_config(num_key_value_heads=4),
        r"config.json cannot be read: n_heads must be a multiple of n_kv_heads, got 6 and 4",
    ),
    "no heads": (with_config(num_attention_heads=0), r"config.json cannot be read"),
    "a size that is a word": (with_config(hidden_size="many"), r"config.json cannot be read"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_one_error_says_what_is_wrong(name: str, folder: Path) -> None:
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(PretrainedError, match=message):
        load_model(folder)


def test_unknown_values_can_be_ignored(folder: Path) -> None:
    with_config(shiny=3)(folder)
    load_model(folder, ignore=("shiny",))


def test_a_long_list_is_cut(folder: Path) -> None:
    with_tensors(lambda t: t.update({f"more.{i}": torch.zeros(1) for i in range(50)}))(folder)
    with pytest.raises(PretrainedError, match=r"- and 38 more$"):
        load_model(folder)


def test_a_mixture_of_experts_has_mixers_alone(tmp_path: Path) -> None:
    build(qwen3_next).save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"mixture of experts.*load_mixer"):
        load_model(tmp_path)
    with pytest.raises(PretrainedError, match="there is no layer 4"):
        load_mixer(tmp_path, 4)


def test_bad_tokenizers(folder: Path) -> None:
    with pytest.raises(PretrainedError, match=r"tokenizer.json does not exist"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(PretrainedError, match=r"tokenizer.json is no tokenizer"):
        load_tokenizer(folder)
