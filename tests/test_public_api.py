"""The package offers what tests/spec/nn-attention-api.txt promises, and keeps its import paths.

Each class, method, argument, default and enum member of the text is compared with the code. The
code may add keyword-only arguments with a default; nothing else may differ.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

SPEC = Path(__file__).parent / "spec" / "nn-attention-api.txt"
HEADING = re.compile(
    r"^(?P<prefix>(?:class |abstract |classmethod )*)(?P<name>[\w.]+)\((?P<args>.*)\)\[source\]$"
)
BARE_CLASS = re.compile(r"^class (?P<name>[\w.]+)\[source\]$")
BASES = re.compile(r"^Bases: (?P<bases>.+)$")
ATTRIBUTE = re.compile(r"^(?P<name>\w+): (?P<type>[\w\[\], ]+?)(?: = (?P<value>.+))?$")
MEMBER = re.compile(r"^(?P<name>\w+) = (?P<value>'.*')$")


@dataclass
class Method:
    arguments: str
    is_classmethod: bool
    is_abstract: bool


@dataclass
class Class:
    name: str
    arguments: str
    bases: list[str] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)
    fields: dict[str, str | None] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)


def parse(text: str) -> dict[str, Class]:
    """The classes of the page. Prose never starts a line with a signature, so lines suffice."""
    classes: dict[str, Class] = {}
    current: Class | None = None
    for line in text.splitlines():
        heading, bare = HEADING.match(line), BARE_CLASS.match(line)
        if bare or (heading and heading["prefix"].startswith("class ")):
            match = heading or bare
            assert match is not None
            name = match["name"].removeprefix("olmo_core.nn.attention.")
            current = classes[name] = Class(name, heading["args"] if heading else "")
        elif current is None:
            continue
        elif heading:
            current.methods[heading["name"]] = Method(
                heading["args"], "classmethod" in heading["prefix"], "abstract" in heading["prefix"]
            )
        elif bases := BASES.match(line):
            current.bases = [re.sub(r"\[.*\]", "", b) for b in bases["bases"].split(", ")]
        elif "StrEnum" in current.bases:
            if member := MEMBER.match(line):
                current.members[member["name"]] = ast.literal_eval(member["value"])
        elif attribute := ATTRIBUTE.match(line):
            current.fields[attribute["name"]] = attribute["value"]
    return classes


CLASSES = parse(SPEC.read_text(encoding="utf-8"))


def promised_signature(arguments: str) -> inspect.Signature:
    """The signature that the text writes, defaults evaluated."""
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def promised({arguments}): ...", scope)
    return inspect.signature(scope["promised"])


def actual_signature(function: Any) -> inspect.Signature:
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")
    ]
    return inspect.Signature(parameters)


def differences(promised: inspect.Signature, actual: inspect.Signature) -> list[str]:
    found = []
    have = actual.parameters
    for name, p in promised.parameters.items():
        if name not in have:
            found.append(f"argument {name!r} is missing")
        elif have[name].kind != p.kind:
            found.append(f"argument {name!r} is {have[name].kind.description}")
        elif have[name].default != p.default:
            found.append(f"argument {name!r} defaults to {have[name].default!r}, not {p.default!r}")
    order = [name for name in have if name in promised.parameters]
    if order != [name for name in promised.parameters if name in have]:
        found.append(f"the order is {order}")
    for name, p in have.items():
        if name in promised.parameters:
            continue
        if p.kind is not inspect.Parameter.KEYWORD_ONLY or p.default is inspect.Parameter.empty:
            found.append(f"argument {name!r} is new, but not keyword-only with a default")
    return found


def resolve(name: str) -> Any:
    return getattr(importlib.import_module("olmo_core.nn.attention"), name)


def test_the_page_is_read_whole() -> None:
    """A parser that reads nothing would agree with everything."""
    text = SPEC.read_text(encoding="utf-8")
    assert len(CLASSES) == text.count("class olmo_core.nn.attention.") == 24
    headings = [line for line in text.splitlines() if line.endswith("[source]")]
    assert sum(1 + len(c.methods) for c in CLASSES.values()) == len(headings)
    assert sum(len(c.members) for c in CLASSES.values()) == 13
    assert sum(len(c.fields) for c in CLASSES.values()) == 17


@pytest.mark.parametrize("name", CLASSES)
def test_class_is_exported(name: str) -> None:
    package = importlib.import_module("olmo_core.nn.attention")
    assert inspect.isclass(resolve(name))
    assert name in package.__all__


@pytest.mark.parametrize("name", CLASSES)
def test_bases(name: str) -> None:
    bases = {base.__name__ for base in resolve(name).__mro__}
    assert set(CLASSES[name].bases) - {"object"} <= bases


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if "StrEnum" not in c.bases])
def test_constructor(name: str) -> None:
    promised = promised_signature(CLASSES[name].arguments)
    # The page writes an enum's default as its value, and a StrEnum equals its value.
    assert differences(promised, actual_signature(resolve(name))) == []


@pytest.mark.parametrize(
    ("name", "method"), [(c.name, m) for c in CLASSES.values() for m in c.methods]
)
def test_method(name: str, method: str) -> None:
    promised, cls = CLASSES[name].methods[method], resolve(name)
    function = getattr(cls, method)
    assert callable(function)
    assert inspect.ismethod(function) == promised.is_classmethod
    found = differences(promised_signature(promised.arguments), actual_signature(function))
    assert found == []


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if "StrEnum" in c.bases])
def test_enum_members(name: str) -> None:
    """Every promised member with its value; further members are additions."""
    cls = resolve(name)
    assert issubclass(cls, str) and issubclass(cls, enum.Enum)
    members = {member.name: member.value for member in cls}
    assert {k: members.get(k) for k in CLASSES[name].members} == CLASSES[name].members
    assert all(str(member) == member.value == member for member in cls)


@pytest.mark.parametrize(
    ("name", "attribute"), [(c.name, f) for c in CLASSES.values() for f in c.fields]
)
def test_config_field(name: str, attribute: str) -> None:
    cls, value = resolve(name), CLASSES[name].fields[attribute]
    fields = cls.__dataclass_fields__
    assert attribute in fields
    if value is not None:
        assert fields[attribute].default == ast.literal_eval(value)


@pytest.mark.parametrize("name", ["AttentionConfig", "GatedDeltaNetConfig"])
def test_mixer_configs_are_registered_under_their_base(name: str) -> None:
    from olmo_core.nn.attention.base import SequenceMixerConfig

    assert resolve(name).registered_base is SequenceMixerConfig


def test_a_changed_signature_is_seen() -> None:
    def compare(arguments: str) -> list[str]:
        return differences(promised_signature("a, b=1, *, c=None"), promised_signature(arguments))

    assert compare("a, b=1, *, c=None") == []
    assert compare("a, b=1, *, c=None, d=None") == []
    for changed in (
        "a, b=2, *, c=None",
        "a, *, b=1, c=None",
        "a, b=1",
        "b, a=1, *, c=None",
        "a, b=1, d=2, *, c=None",
        "a, b=1, *, c=None, d",
    ):
        assert compare(changed) != []


IMPORT_PATHS = """
olmo_core.nn.attention.backend AttentionBackend AttentionBackendName TorchAttentionBackend
olmo_core.nn.attention.backend FlashAttention2Backend FlashAttention3Backend FlashAttention4Backend
olmo_core.nn.attention.backend TEAttentionBackend
olmo_core.nn.attention.base SequenceMixer SequenceMixerConfig
olmo_core.nn.attention.kv_cache KVCacheManager
olmo_core.nn.attention.ring RingAttentionLoadBalancerType RingAttentionLoadBalancer
olmo_core.nn.attention.ring RingAttentionZigZagLoadBalancer RingAttentionLlama3LoadBalancer
olmo_core.nn.attention.ring UlyssesLoadBalancer RingContextParallelStyle UlyssesContextParallelStyle
olmo_core.nn.attention.recurrent GatedDeltaNet GatedDeltaNetConfig
olmo_core.nn.rope RoPEConfig ABFRoPEScalingConfig PIRoPEScalingConfig StepwiseRoPEScalingConfig
olmo_core.nn.rope YaRNRoPEScalingConfig
olmo_core.nn.layer_norm LayerNormConfig LayerNormType LayerNorm RMSNorm FusedRMSNorm L2Norm
olmo_core.nn.layer_norm QwenRMSNorm CuTeRMSNorm
olmo_core.nn.buffer_cache BufferCache
olmo_core.nn.convolution CausalConv1d
olmo_core.nn.transformer.init InitMethod
olmo_core.config Config DType StrEnum Registrable
olmo_core.exceptions OLMoConfigurationError
olmo_core.utils seed_all get_default_device
olmo_core.distributed.utils get_rank get_world_size get_full_tensor
"""
PATHS = [
    (module, name)
    for module, *names in (line.split() for line in IMPORT_PATHS.strip().splitlines())
    for name in names
]


@pytest.mark.parametrize(("module", "name"), PATHS)
def test_import_path(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)
