"""A model of this library as a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from olmo_core.hf.config import PretrainedError, read_config
from olmo_core.hf.describe import describe
from olmo_core.hf.folder import CONFIG, INDEX, SINGLE
from olmo_core.hf.layouts import ZeroCentred
from olmo_core.hf.rules import export_tensors, rules_of
from olmo_core.hf.tokenizer import Tokenizer, save_tokenizer
from olmo_core.nn.transformer import Transformer, TransformerConfig


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    max_position_embeddings: int = 4096,
    model_type: str | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    It is there whole or not at all. Weights keep their dtype; a norm that transformers stores
    around zero gets the model's.

    :param model: built by :meth:`TransformerConfig.build`.
    :param folder: must not exist.
    :param max_position_embeddings: the longest document that the model has learnt, in tokens.
    :param model_type: the family to write, ``"llama"`` for example; the first that computes the
        same if not given.
    :param tokenizer: to write beside it.
    :returns: the folder.
    :raises PretrainedError: if no model of transformers computes the same, or the folder exists or
        cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise PretrainedError(f"{folder} exists already: choose another name")
    config = model.config
    if not isinstance(config, TransformerConfig):
        raise PretrainedError("the model has no TransformerConfig: build it from one")
    values = describe(config, model_type, max_position_embeddings=max_position_embeddings)
    values |= {"dtype": str(config.dtype), "use_cache": True}
    if tokenizer is not None:
        values |= tokenizer.token_ids()
    imported = read_config(values)
    rules = rules_of(imported, model)
    stored = {
        name for rule in rules if isinstance(rule.layout, ZeroCentred) for name in rule.theirs
    }
    tensors = {
        name: x.detach().cpu().to(config.dtype.as_pt()) if name in stored else x.detach().cpu()
        for name, x in export_tensors(rules, model.state_dict()).items()
    }
    hidden = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        _write_json(hidden / CONFIG, values)
        _write_tensors(hidden, tensors, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, hidden)
        os.rename(hidden, folder)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise PretrainedError(f"{folder} cannot be written: {error}") from error
    return folder


def _write_tensors(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: f for f, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(x.nbytes for x in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        # transformers refuses files that do not name their framework.
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes files that their owner alone can read, whatever the umask says.
        shutil.copymode(folder / CONFIG, folder / file)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
