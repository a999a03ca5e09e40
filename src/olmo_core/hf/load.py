"""Pretrained weights into this library's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from olmo_core.config import DType
from olmo_core.hf.config import Imported, PretrainedError, read_config
from olmo_core.hf.folder import Folder
from olmo_core.hf.gguf import GGUFFile, is_gguf
from olmo_core.hf.rules import import_tensors, mixer_rules, rules_of, text_names
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.transformer import Transformer, TransformerConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class Source(Protocol):
    """Where weights come from: a folder or a GGUF file."""

    path: Path
    config: dict[str, Any]
    """As ``config.json`` has it."""

    @property
    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


def open_source(path: str | Path) -> Source:
    """:raises PretrainedError: if there is nothing that can be read."""
    path = Path(path).expanduser()
    return GGUFFile(path) if is_gguf(path) else Folder(path)


def load_config(path: str | Path, *, ignore: tuple[str, ...] = ()) -> TransformerConfig:
    """The configuration of a model of transformers, or of a GGUF file.

    :param path: a folder with ``config.json`` and safetensors, or a ``.gguf`` file.
    :param ignore: keys of ``config.json`` that are unknown here and do not change the model.
    :raises PretrainedError: with every value that has no counterpart here.
    """
    with open_source(path) as source:
        return read_config(source.config, ignore=ignore).config


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: tuple[str, ...] = (),
) -> Transformer:
    """A model of transformers, or of a GGUF file, as this library's, in evaluation mode.

    Families: Llama, Olmo2, Olmo3, Qwen3, Gemma3 (text), OlmoHybrid and dense Qwen3.5.

    :param path: a folder with ``config.json`` and safetensors, or a ``.gguf`` file.
    :param dtype: of the parameters; that of the stored embeddings if not given, float32 for
        GGUF. Norms that are stored around zero and the delta net's gates stay float32 at least.
    :param ignore: keys of ``config.json`` that are unknown here and do not change the model.
    :raises PretrainedError: for anything missing, damaged, left over or without a counterpart;
        one error lists it all.
    """
    with open_source(path) as source:
        return load_from(source, dtype=dtype, device=device, ignore=ignore)


def load_from(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: tuple[str, ...] = (),
    check: Callable[[Transformer], None] = lambda model: None,
) -> Transformer:
    """:func:`load_model` from what is open already.

    :param check: gets the model on ``meta``, before its weights are read.
    """
    imported = _read(source, dtype, ignore)
    if not imported.family.whole:
        raise PretrainedError(
            f"{imported.family.architecture} is a mixture of experts, which this library does "
            "not have: load_mixer(path, layer) gives its attention and delta net layers"
        )
    model = imported.config.build(init_device="meta")
    check(model)
    state = import_tensors(
        rules_of(imported, model),
        model.state_dict(),
        source.names,
        source.read,
        family=imported.family,
        tied=imported.config.tie_embeddings,
    )
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def load_mixer(
    path: str | Path,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: tuple[str, ...] = (),
) -> SequenceMixer:
    """The sequence mixer of one layer, in evaluation mode; also of Qwen3-Next.

    :param layer: its number, from 0.
    :raises PretrainedError: as :func:`load_model`, or if there is no such layer.

    The other parameters are those of :func:`load_model`.
    """
    with open_source(path) as source:
        imported = _read(source, dtype, ignore)
        config = imported.config
        if not 0 <= layer < config.n_layers:
            raise PretrainedError(f"there is no layer {layer}: {path} has {config.n_layers}")
        mixer = (
            config.layer_blocks()[layer]
            .sequence_mixer.replace(dtype=config.dtype)
            .build(config.d_model, layer_idx=layer, n_layers=config.n_layers, init_device="meta")
        )
        rules = mixer_rules(imported, layer, mixer)
        theirs = {name for rule in rules for name in rule.theirs}
        full_names = text_names(source.names, imported.family.aliases)
        names = [name for short, name in full_names.items() if short in theirs]
        state = import_tensors(
            rules, mixer.state_dict(), names, source.read, family=imported.family
        )
    mixer.load_state_dict(state, assign=True)
    return mixer.to(device).eval()


def _read(source: Source, dtype: torch.dtype | None, ignore: tuple[str, ...]) -> Imported:
    imported = read_config(source.config, ignore=ignore)
    if dtype is None:
        name = text_names(source.names, {}).get("model.embed_tokens.weight")
        dtype = torch.float32 if name is None else source.read(name).dtype
        if not dtype.is_floating_point:
            dtype = torch.float32  # an error that names every such tensor follows
    imported.config.dtype = DType.from_pt(dtype)
    _spread_dtype(imported.config)
    return imported


def _spread_dtype(config: TransformerConfig) -> None:
    """qk-norms are built by their mixer, which does not know the model's dtype for them."""
    for block in config.blocks:
        norm = getattr(block.sequence_mixer, "qk_norm", None)
        if norm is not None and norm.dtype is None:
            norm.dtype = config.dtype
