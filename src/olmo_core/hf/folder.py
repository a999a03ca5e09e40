"""A folder as transformers writes it: ``config.json`` and safetensors, one file or shards.

Pickled weights (``.bin``, ``.pt``) are never loaded: a pickle runs code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from olmo_core.hf.config import PretrainedError
from olmo_core.hf.rules import listed

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class Folder:
    """The weights of a folder, read tensor by tensor.

    :param path: the folder.
    :raises PretrainedError: if a file is missing, damaged, or not as the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        if not path.is_dir():
            raise PretrainedError(f"{path} is no folder: give one with {CONFIG} and safetensors")
        self.config = read_json(path / CONFIG)
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        try:
            for file, expected in self._files().items():
                self._open(file, expected)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._readers)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        return self._readers[name](name)

    def _files(self) -> dict[str, set[str] | None]:
        """The files, and which tensors the index expects in each."""
        if (self.path / INDEX).exists():
            index = read_json(self.path / INDEX)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise PretrainedError(f"{self.path / INDEX} has no weight_map")
            files: dict[str, set[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise PretrainedError(
                        f"{self.path / INDEX} names {file!r}: not a file beside it"
                    )
                expected = files.setdefault(file, set())
                assert expected is not None
                expected.add(name)
            missing = [file for file in files if not (self.path / file).exists()]
            if missing:
                raise PretrainedError(
                    f"{self.path} lacks shards that {INDEX} names:" + listed(missing)
                )
            return files
        if (self.path / SINGLE).exists():
            return {SINGLE: None}
        pickled = [f.name for s in ("bin", "pt", "pth") for f in self.path.glob(f"*.{s}")]
        if pickled:
            raise PretrainedError(
                f"{self.path} has pickled weights alone ({', '.join(sorted(pickled)[:3])}), which "
                "can run code when they are loaded: convert them to safetensors where you trust "
                "them (transformers: model.save_pretrained)"
            )
        raise PretrainedError(f"{self.path} has neither {SINGLE} nor {INDEX}")

    def _open(self, file: str, expected: set[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = self._stack.enter_context(safe_open(self.path / file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise PretrainedError(f"{self.path / file} cannot be read: {error}") from error
        names = set(handle.keys())
        if expected is not None and names != expected:
            problems = [f"{name} is not in {file}" for name in sorted(expected - names)]
            problems += [f"{name} is in {file} unasked" for name in sorted(names - expected)]
            raise PretrainedError(f"{self.path / INDEX} and its shards differ:" + listed(problems))
        self._readers |= dict.fromkeys(names, handle.get_tensor)


def read_json(path: Path) -> dict[str, Any]:
    """:raises PretrainedError: if the file is missing or holds no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PretrainedError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PretrainedError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    return data
