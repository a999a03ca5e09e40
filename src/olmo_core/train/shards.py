"""Tensors of many ranks as safetensors files: torch's distributed checkpoints.

Each rank writes its parts of DTensors to a file of its own; of what several ranks hold, one writes
it. Any number of ranks reads the parts that it needs from all files, and a process alone the whole.
Everything is in Hugging Face's storage format: unlike the default one it pickles nothing.

Importing this imports ``torch.distributed.checkpoint``, which takes a second: do it where it is
used.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from olmo_core.distributed.utils import is_distributed

__all__ = ["Shards", "write_shards", "written_by"]


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of all ranks, and return once their bytes are on the disk.

    A collective of the default process group: all ranks give the same names.

    :param folder: made if it is missing.
    :raises Exception: what the first rank that failed has raised, on every rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plain_errors():
        save(dict(tensors), storage_writer=writer, planner=_Contiguous())


def written_by(rank: int, folder: Path) -> list[Path]:
    """What :func:`write_shards` has written on a rank: a file, or none if it alone held nothing."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


class Shards:
    """What :func:`write_shards` has written, or any other safetensors files.

    :param files: all that hold a part.
    :raises OSError: if one is missing.
    :raises ValueError: if they do not hold each tensor just once.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._reader = _Reader(files)
        self._metadata: dict[str, TensorStorageMetadata] = {}
        for name, each in self._reader.read_metadata().state_dict_metadata.items():
            assert isinstance(each, TensorStorageMetadata)
            if sum(math.prod(chunk.sizes) for chunk in each.chunks) != math.prod(each.size):
                raise ValueError(f"the files' parts of {name} are not the whole tensor")
            self._metadata[name] = each

    def tensors(self, device: str = "meta") -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes that were saved, without their values."""
        return {
            name: torch.empty(each.size, dtype=each.properties.dtype, device=device)
            for name, each in self._metadata.items()
        }

    def read(self) -> dict[str, Tensor]:
        """All tensors, whole, in this process alone."""
        tensors = self.tensors("cpu")
        self._load(tensors, no_dist=True)
        return tensors

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; a collective of the default process group, if there is one.

        :param tensors: some of :meth:`tensors`, plain or DTensors, of their shapes; the same names
            on all ranks.
        :raises Exception: what the first rank that failed has raised, on every rank.
        """
        self._load({name: x.detach() for name, x in tensors.items()}, not is_distributed())

    def _load(self, tensors: dict[str, Any], no_dist: bool) -> None:
        with _plain_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=self._reader, no_dist=no_dist)


class _Contiguous(DefaultSavePlanner):
    """Safetensors has no strides, and the writer hands it tensors as they lie."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        data = super().resolve_data(write_item)
        if not isinstance(data, Tensor):  # the planner has pickled it
            raise TypeError(f"{write_item.index.fqn} is no tensor")
        return data.contiguous()


class _Files(FileSystem):
    """A folder that has no other files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(file) for file in files]

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return self.files


class _Reader(HuggingFaceStorageReader):
    """Reads the headers once: DCP asks for them again, and says little of what goes wrong then."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(str(files[0].parent))
        self.fs = _Files(files)
        self._known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata()
        return self._known


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a rank has raised, in place of DCP's wrapper, which is no ``Exception``."""
    try:
        yield
    except CheckpointException as wrapper:
        _, (error, _) = min(wrapper.failures.items())
        raise error from None
