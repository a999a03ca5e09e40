"""What importing costs, what it needs, and which way imports point."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import pytest

import olmo_core
from olmo_core.nn.attention.backend import BACKENDS

SRC = Path(olmo_core.__file__).parents[1]
FILES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SRC / "olmo_core").rglob("*.py"))
}
OPTIONAL = [
    "cutlass",
    "fla",
    "flash_attn",
    "flash_attn_3",
    "flash_attn_interface",
    "flash_qla",
    "gguf",
    "matplotlib",
    "numpy",
    "quack",
    "tensorboard",
    "tilelang",
    "tokenizers",
    "torchao",
    "transformer_engine",
    "transformer_engine_torch",
    "transformers",
    "triton",
]
# Each costs between 0.1 and 2 seconds, so it loads when it is used.
HEAVY_TORCH = [
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "torch.nn.attention.varlen",
    "torch.testing",
    "torch.utils.tensorboard",
]

# Bottom to top: a module imports from its own layer and from those before it in this list. A
# package speaks for its modules that are not listed.
LAYERS = [
    ["olmo_core", "olmo_core.exceptions"],
    ["olmo_core.config", "olmo_core.utils", "olmo_core.distributed", "olmo_core.data"],
    ["olmo_core.nn"],
    ["olmo_core.nn.attention.segments"],
    ["olmo_core.nn.attention.kernels"],
    ["olmo_core.nn.attention.attend", "olmo_core.nn.convolution"],
    [
        "olmo_core.nn.attention.capabilities",
        "olmo_core.nn.attention.decoding",
        "olmo_core.nn.attention.kv_cache",
        "olmo_core.nn.attention.parallel",
        "olmo_core.nn.attention.ring",
    ],
    [
        "olmo_core.nn.attention.base",
        "olmo_core.nn.attention.inputs",
        "olmo_core.nn.attention.selection",
    ],
    [
        "olmo_core.nn.attention.sdpa",
        "olmo_core.nn.attention.backend",
        "olmo_core.nn.attention.qk",
        "olmo_core.nn.attention.gate",
    ],
    [
        "olmo_core.nn.attention.attention",
        "olmo_core.nn.attention.fused_attention",
        "olmo_core.nn.attention.softmax_attention",
        "olmo_core.nn.attention.recurrent",
        "olmo_core.nn.attention.gated_delta_net",
    ],
    ["olmo_core.nn.attention.config"],
    ["olmo_core.nn.attention"],
    ["olmo_core.nn.transformer"],
    ["olmo_core.diagnostics", "olmo_core.hf", "olmo_core.train"],
    ["olmo_core.cli", "olmo_core.__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def run(script: str, *args: str) -> Any:
    """What a script prints as JSON on its last line, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC), "PATH": "", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported(module: str, *, top_level: bool = False, types: bool = False) -> Iterator[str]:
    """The modules that a file imports.

    :param top_level: Leave out what functions import.
    :param types: Count what ``if TYPE_CHECKING`` imports too.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        if not types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in FILES else base
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(FILES[module].read_text(encoding="utf-8")))


def level(module: str) -> int:
    while module not in LEVEL:
        module = module.rpartition(".")[0]
    return LEVEL[module]


def needs_triton(module: str) -> bool:
    """A file of Triton kernels: ``@triton.jit`` needs the package when the file is imported."""
    return any(name.split(".")[0] == "triton" for name in imported(module, top_level=True))


def test_importing_attention_loads_nothing_optional() -> None:
    script = """
import json, sys
import torch
before = set(sys.modules)
import olmo_core.nn.attention
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = run(script)
    packages = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    packages = {name for name in packages if "cython" not in name}  # yaml's own machinery
    assert packages <= {"olmo_core", "dataclass_extensions", "typing_extensions", "yaml", "torch"}
    assert "olmo_core.nn.attention" in loaded
    for heavy in HEAVY_TORCH:
        assert not [name for name in loaded if name == heavy or name.startswith(heavy + ".")]
    assert len(loaded) < 200


def test_importing_the_trainer_loads_nothing_slow() -> None:
    """Neither does what reads and writes checkpoints of many ranks, before it is used."""
    script = """
import json, sys
import torch
before = set(sys.modules)
import olmo_core.train.sharded_checkpoint, olmo_core.train.trainer
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = run(script)
    for heavy in [*HEAVY_TORCH, "torch.distributed.checkpoint"]:
        assert not [name for name in loaded if name == heavy or name.startswith(heavy + ".")]


def test_training_in_one_process_loads_nothing_of_many_ranks() -> None:
    script = """
import json, sys
import torch
before = set(sys.modules)
import olmo_core.cli.train, olmo_core.cli.launch, olmo_core.train.trainer
import olmo_core.train.parallel.many
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    heavy = tuple(name + "." for name in HEAVY_TORCH if not name.startswith("torch.utils"))
    assert not [name for name in run(script) if (name + ".").startswith(heavy)]


def test_every_module_imports_without_the_optional_packages() -> None:
    """All of them at once: none of our modules may need one of them to be imported."""
    script = """
import importlib, json, sys
modules, optional = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in optional:
    sys.modules[name] = None
found = []
for module in modules:
    try:
        importlib.import_module(module)
    except Exception as error:
        found.append(f"{module}: {type(error).__name__}: {error}")
print(json.dumps(found))
"""
    modules = [name for name in FILES if not needs_triton(name)]
    assert run(script, json.dumps(modules), json.dumps(OPTIONAL)) == []


def test_only_kernel_files_need_triton_to_import() -> None:
    for module in FILES:
        if needs_triton(module):
            assert module.startswith("olmo_core.nn.attention.kernels."), module


@pytest.mark.parametrize("module", [m for m in FILES if not needs_triton(m)])
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    third_party = {name.split(".")[0] for name in imported(module, top_level=True)}
    assert third_party.isdisjoint(OPTIONAL)
    if not module.startswith(("olmo_core.cli", "olmo_core.train")):
        assert third_party.isdisjoint({"typer", "rich", "safetensors"})


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module: str) -> None:
    names = imported(module, types=True)
    ours = [name for name in names if name in FILES and name != "olmo_core"]
    upwards = [name for name in ours if level(name) > level(module)]
    assert upwards == []


def test_there_is_no_cycle() -> None:
    """Imports inside functions and for types counted."""
    graph = {
        module: {n for n in imported(module, types=True) if n in FILES and n != module}
        for module in FILES
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_kernels_do_not_import_each_other() -> None:
    """Neither do their rooms: a room imports its own files and what lies beside the rooms."""
    package = "olmo_core.nn.attention.kernels."
    kernels = {f"{package}softmax.{cls.kernel_file}" for cls in BACKENDS.values()}
    for module in FILES:
        if module in kernels:
            assert kernels.isdisjoint(imported(module)), module
        room = module.removeprefix(package).split(".")
        if module.startswith(package) and len(room) > 1:
            for name in imported(module):
                other = name.removeprefix(package).split(".")
                assert not name.startswith(package) or len(other) == 1 or other[0] == room[0], name


def test_the_layer_table_names_what_exists() -> None:
    planned = {"olmo_core.hf"}
    assert set(LEVEL) - set(FILES) - planned == set()


def test_every_package_has_an_init() -> None:
    """A namespace package would be missing from the wheel."""
    found = {m.name for m in pkgutil.walk_packages([str(SRC / "olmo_core")], "olmo_core.")}
    assert found == set(FILES) - {"olmo_core"}
