"""GGUF, the file format of llama.cpp: read as if it were a folder of transformers.

Metadata becomes a ``config.json``, names and values of tensors those of transformers, quantised
blocks float32. Needs the package ``gguf``, whose tables say what tensors are called and how blocks
are packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olmo_core.hf.config import PretrainedError
from olmo_core.hf.families import ATTENTION, FEED_FORWARD, MODEL, NORMS, PRE
from olmo_core.hf.layouts import PairedHalves
from olmo_core.hf.rules import listed

if TYPE_CHECKING:
    from gguf import GGUFReader

# Metadata after the architecture's name -> config.json.
_VALUES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
# Metadata that repeats what others say, or is for another kind of model.
_INERT = {"vocab_size", "rope.dimension_count", "attention.value_length"}
_ARCHITECTURES = ("llama", "qwen3")
# llama.cpp rotates neighbouring rows in this one.
_INTERLEAVED = ("llama",)
_PERMUTED = (".self_attn.q_proj.", ".self_attn.k_proj.")


def is_gguf(path: Path) -> bool:
    """By its name, or by how it begins."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


class GGUFFile:
    """The weights of a ``.gguf`` file, read tensor by tensor.

    :raises PretrainedError: if the package is missing, or the file is damaged, or holds an
        architecture, a quantisation or a value without a counterpart here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import gguf
        except ImportError as error:
            raise PretrainedError(
                f"reading {path.name} needs the package gguf: pip install gguf"
            ) from error
        if not path.is_file():
            raise PretrainedError(f"{path} is no file")
        try:
            self.reader = gguf.GGUFReader(path)
        # The reader trusts the file: a damaged one fails anywhere in it.
        except Exception as error:
            raise PretrainedError(f"{path} cannot be read as GGUF: {error}") from error
        self.metadata = {
            name: field.contents()
            for name, field in self.reader.fields.items()
            if not name.startswith(("GGUF.", "tokenizer."))
        }
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise PretrainedError(
                f"{path} holds the architecture {self.architecture!r}: supported are "
                f"{', '.join(_ARCHITECTURES)}"
            )
        self._tensors = self._named(gguf)
        self._check_kinds()
        self.config = self._config()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._tensors.clear()

    @property
    def names(self) -> list[str]:
        """Of all tensors, as transformers calls them."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """One tensor as transformers has it: float32, or as stored for float types."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        x = x.reshape(*(int(n) for n in reversed(tensor.shape)))
        if self.architecture in _INTERLEAVED and any(part in name for part in _PERMUTED):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            (x,) = PairedHalves(self.config[key]).here(x)
        return x

    def tokenizer_field(self, name: str) -> Any:
        """``tokenizer.NAME`` of the metadata, None without it."""
        return field_of(self.reader, f"tokenizer.{name}")

    def _named(self, gguf: Any) -> dict[str, Any]:
        layers = int(self.metadata.get(f"{self.architecture}.block_count", 0))
        arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.architecture)
        table = gguf.get_tensor_name_map(arch, layers)
        modules = [*MODEL, *ATTENTION, *FEED_FORWARD, *NORMS[PRE]]
        full = [m for m in modules if m in MODEL]
        full += [f"model.layers.{i}.{m}" for i in range(layers) for m in modules if m not in MODEL]
        theirs = {table.get_name(name): name for name in full}
        named = {}
        for tensor in self.reader.tensors:
            module, _, suffix = tensor.name.rpartition(".")
            named[f"{theirs[module]}.{suffix}" if module in theirs else tensor.name] = tensor
        return named

    def _check_kinds(self) -> None:
        from gguf.quants import dequantize

        one_of_each = {tensor.tensor_type: tensor for tensor in self._tensors.values()}
        unknown = []
        for kind, tensor in one_of_each.items():
            try:
                dequantize(tensor.data[:1], kind)
            except NotImplementedError:
                unknown += [
                    f"{name} is {kind.name}"
                    for name, each in self._tensors.items()
                    if each.tensor_type == kind
                ]
        if unknown:
            raise PretrainedError(
                f"{self.path} has quantisations that the package gguf cannot undo:"
                + listed(unknown)
            )

    def _config(self) -> dict[str, Any]:
        prefix = f"{self.architecture}."
        found = {
            name.removeprefix(prefix): value
            for name, value in self.metadata.items()
            if name.startswith(prefix)
        }
        config: dict[str, Any] = {"model_type": self.architecture}
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        if "model.embed_tokens.weight" in self._tensors:
            config["vocab_size"] = int(self._tensors["model.embed_tokens.weight"].shape[1])
        for name, value in found.items():
            if name in _VALUES:
                config[_VALUES[name]] = _shortest(value) if isinstance(value, float) else value
            elif name.startswith("rope.scaling."):
                continue
            elif name not in _INERT:
                config[f"{prefix}{name}"] = value
        missing = [f"{prefix}{name}" for name, key in _REQUIRED.items() if key not in config]
        if missing:
            raise PretrainedError(f"{self.path} lacks metadata:" + listed(missing))
        scaling = found.get("rope.scaling.type", "none")
        if scaling != "none":
            config["rope_scaling"] = {"rope_type": scaling}
            if "rope.scaling.factor" in found:
                config["rope_scaling"]["factor"] = _shortest(found["rope.scaling.factor"])
            for name in found.keys() - {"rope.scaling.type", "rope.scaling.factor"}:
                if name.startswith("rope.scaling."):
                    config["rope_scaling"][name.removeprefix("rope.scaling.")] = found[name]
        if "rope_freqs.weight" in self._tensors:
            config["rope_scaling"] = {"rope_type": "one factor a frequency (rope_freqs.weight)"}
        config["num_key_value_heads"] = config.get(
            "num_key_value_heads", config["num_attention_heads"]
        )
        return config


_REQUIRED = {
    name: _VALUES[name]
    for name in (
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    )
}


def field_of(reader: GGUFReader, name: str) -> Any:
    """A value of the metadata, None without it."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _shortest(x: float) -> float:
    """The float64 that a float32 was written for: 1e-05, not 9.99999974737e-06."""
    import numpy as np

    return float(str(np.float32(x)))
