"""Configurations: exact round trips, typed overrides, and errors that name the mistake."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Dict, Generic, List, Literal, Optional, Tuple, TypeVar, Union  # noqa: UP035

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmo_core.config import CLASS_KEY, Config, DType, Registrable, StrEnum
from olmo_core.exceptions import OLMoConfigurationError, OLMoError
from olmo_core.nn.feed_forward import FeedForwardConfig, FeedForwardType
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.rope import (
    ABFRoPEScalingConfig,
    PIRoPEScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    RoPEType,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)


class Colour(StrEnum):
    red = "red"
    dark_blue = "dark_blue"


class Level(Enum):
    low = 1
    high = 2


@dataclass
class Inner(Config):
    size: int = 4
    rate: float = 0.5
    colour: Colour = Colour.red
    note: Optional[str] = None  # noqa: UP045 (both spellings have to work)


T = TypeVar("T")


@dataclass
class Part(Config, Registrable, Generic[T]):
    """A base with registered implementations, as the sequence mixers have."""


@Part.register("wheel")
@dataclass
class Wheel(Part[int]):
    spokes: int = 32
    dtype: DType = DType.float32


@Part.register("door")
@dataclass
class Door(Part[str]):
    width: float
    inner: Inner = field(default_factory=Inner)


@dataclass
class Outer(Config):
    pattern: List[int]  # noqa: UP006
    inner: Inner = field(default_factory=Inner)
    maybe: Optional[Inner] = None  # noqa: UP045
    part: Part[Any] | None = None
    parts: list[Part[Any]] = field(default_factory=list)
    by_name: Dict[str, Inner] = field(default_factory=dict)  # noqa: UP006
    by_index: dict[int, float] = field(default_factory=dict)
    pair: Tuple[int, float] = (1, 2.0)  # noqa: UP006
    betas: tuple[float, ...] = (0.9, 0.95)
    names: set[str] = field(default_factory=set)
    level: Level = Level.low
    mode: Literal["fast", "exact"] = "fast"
    either: Union[int, str, None] = None  # noqa: UP007
    path: Path = Path("runs")
    on: bool = True
    anything: Any = None


floats = st.floats(allow_nan=False)
words = st.text("abcxyz_ ,[]{}=.\"'é", max_size=8)
inners = st.builds(Inner, st.integers(), floats, st.sampled_from(Colour), st.none() | words)
wheels = st.builds(Wheel, st.integers(), st.sampled_from(DType))
parts = st.one_of(wheels, st.builds(Door, floats, inners))
outers = st.builds(
    Outer,
    pattern=st.lists(st.integers(), max_size=4),
    inner=inners,
    maybe=st.none() | inners,
    part=st.none() | parts,
    parts=st.lists(parts, max_size=2),
    by_name=st.dictionaries(words, inners, max_size=2),
    by_index=st.dictionaries(st.integers(), floats, max_size=2),
    pair=st.tuples(st.integers(), floats),
    betas=st.lists(floats, max_size=3).map(tuple),
    names=st.sets(words, max_size=3),
    level=st.sampled_from(Level),
    mode=st.sampled_from(["fast", "exact"]),
    either=st.none() | st.integers() | words,
    path=st.sampled_from([Path("a/b"), Path(".")]),
    on=st.booleans(),
    anything=st.none() | st.integers() | st.lists(st.booleans(), max_size=2),
)
positive = st.floats(0.125, 1e9) | st.integers(1, 10**9)
scalings = st.one_of(
    st.none(),
    st.builds(ABFRoPEScalingConfig, positive, positive),
    st.builds(PIRoPEScalingConfig, positive, positive),
    st.builds(StepwiseRoPEScalingConfig, positive, positive, positive, st.integers(1, 10**6)),
    st.builds(YaRNRoPEScalingConfig, positive, positive, positive, st.integers(1, 10**6)),
)
library_configs = st.one_of(
    st.builds(
        RoPEConfig,
        st.sampled_from(RoPEType),
        positive,
        st.booleans(),
        st.booleans(),
        scalings,
        positive,
    ),
    st.builds(
        LayerNormConfig,
        st.sampled_from(LayerNormType),
        st.none() | positive,
        *[st.none() | st.booleans()] * 3,
        st.none() | st.sampled_from(DType),
    ),
    st.builds(
        FeedForwardConfig,
        st.integers(1, 10**6),
        st.sampled_from(FeedForwardType),
        st.none() | st.booleans(),
        st.sampled_from(DType),
    ),
)


@given(st.one_of(outers, parts, library_configs))
def test_round_trip_is_exact(config: Config) -> None:
    data = config.as_config_dict()
    assert data[CLASS_KEY].endswith(type(config).__name__)
    for again in (data, json.loads(json.dumps(data))):
        restored = Config.from_dict(again)  # the class path alone finds the class
        assert type(restored) is type(config)
        assert restored == config
        # As text, because 1 == 1.0 == True.
        assert json.dumps(restored.as_config_dict()) == json.dumps(data)


@given(outers)
def test_round_trip_by_type_names_alone(config: Outer) -> None:
    data = config.as_dict()
    assert CLASS_KEY not in json.dumps(data)
    assert Outer.from_dict(json.loads(json.dumps(data))) == config


@given(library_configs)
def test_library_round_trip_without_class_paths(config: Config) -> None:
    assert type(config).from_dict(config.as_dict()) == config


def test_registered_classes_dispatch_on_type() -> None:
    assert Part.from_dict({"type": "wheel", "spokes": 3}) == Wheel(3)
    assert Part.from_dict({"type": "door", "width": 1}) == Door(1.0)
    assert Wheel.from_dict({"spokes": 3}) == Wheel(3)
    assert Wheel(3).as_config_dict()["type"] == "wheel"
    assert Wheel.registered_base is Part
    assert isinstance(Part(type="wheel"), Wheel)
    assert list(inspect.signature(Wheel).parameters) == ["spokes", "dtype", "type"]
    assert inspect.signature(Wheel).parameters["type"].kind is inspect.Parameter.KEYWORD_ONLY


def test_class_path_is_the_shortest_public_one() -> None:
    assert RoPEConfig().as_config_dict()[CLASS_KEY] == "olmo_core.nn.rope.RoPEConfig"
    # A re-export is accepted too.
    data = {CLASS_KEY: "olmo_core.nn.rope.PIRoPEScalingConfig", "factor": 3.0}
    assert RoPEScalingConfig.from_dict(data) == PIRoPEScalingConfig(3.0)


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("inner.size=7", "inner", Inner(size=7)),
        ("inner.size=1e3", "inner", Inner(size=1000)),
        ("inner.size=1_000", "inner", Inner(size=1000)),
        ("inner.size=-1", "inner", Inner(size=-1)),
        ("inner.rate=1e-3", "inner", Inner(rate=1e-3)),
        ("inner.rate=2", "inner", Inner(rate=2.0)),
        ("inner.rate=inf", "inner", Inner(rate=math.inf)),
        ("inner.colour=dark_blue", "inner", Inner(colour=Colour.dark_blue)),
        ("inner.note=a=b", "inner", Inner(note="a=b")),
        ("inner.note=null", "inner", Inner(note=None)),
        ('inner.note="null"', "inner", Inner(note="null")),
        ("inner.note=5", "inner", Inner(note="5")),
        ("inner.note=", "inner", Inner(note="")),
        ("maybe.size=3", "maybe", Inner(size=3)),
        ('maybe={"size": 3}', "maybe", Inner(size=3)),
        ("maybe={}", "maybe", Inner()),
        ("maybe=None", "maybe", None),
        ("part.type=wheel", "part", Wheel()),
        ("pattern=[4096, -1]", "pattern", [4096, -1]),
        ("pattern=[]", "pattern", []),
        ("pattern.1=9", "pattern", [1, 9]),
        ("pattern.-1=9", "pattern", [1, 9]),
        ("pair=(3, 4)", "pair", (3, 4.0)),
        ("betas=[0.1,0.2,0.3]", "betas", (0.1, 0.2, 0.3)),
        ("names=[a,b]", "names", {"a", "b"}),
        ("level=2", "level", Level.high),
        ("mode=exact", "mode", "exact"),
        ("either=5", "either", 5),
        ("either=word", "either", "word"),
        ("either=null", "either", None),
        ("path=x/y", "path", Path("x/y")),
        ("--on=false", "on", False),
        ("on=True", "on", True),
        ('by_index={"3": 1}', "by_index", {3: 1.0}),
        ("anything=word", "anything", "word"),
    ],
)
def test_merge_reads_a_value_by_its_type(override: str, name: str, expected: Any) -> None:
    base = Outer(pattern=[1, 2])
    merged = base.merge([override])
    value = getattr(merged, name)
    assert (value, type(value)) == (expected, type(expected))
    assert merged.replace(**{name: getattr(base, name)}) == base  # nothing else changed
    assert base == Outer(pattern=[1, 2])


def test_merge_applies_overrides_in_order() -> None:
    base = Outer(pattern=[1])
    assert base.merge(["on=false", "on=true"]).on is True
    # Siblings build one object, so required fields may come in any order.
    door = base.merge(["part.inner.size=9", "part.width=2", "part.type=door"]).part
    assert door == Door(2.0, Inner(size=9))
    assert base.merge(['maybe={"size": 3}', "maybe.rate=1"]).maybe == Inner(size=3, rate=1.0)
    assert base.merge(["maybe.size=3", "maybe=null"]).maybe is None
    # Another type starts anew; the same type keeps its values.
    wheel = base.replace(part=Wheel(5))
    assert wheel.merge(["part.type=wheel", "part.dtype=float16"]).part == Wheel(5, DType.float16)
    assert wheel.merge(["part.type=door", "part.width=1"]).part == Door(1.0)
    two = base.replace(parts=[Wheel(1), Wheel(2)])
    assert two.merge(["parts.1.spokes=7"]).parts == [Wheel(1), Wheel(7)]
    assert base.merge([]) == base
    assert RoPEConfig().merge(["scaling.type=yarn", "scaling.factor=4"]) == RoPEConfig(
        scaling=YaRNRoPEScalingConfig(factor=4.0)
    )
    assert Outer.from_dict({"pattern": [1]}, overrides=["on=false"]).on is False


@given(library_configs)
def test_merge_of_every_field_restores_it(config: Any) -> None:
    overrides = []
    for name, value in config.as_dict().items():
        if isinstance(value, dict):
            overrides += [f"{name}.{key}={item}" for key, item in value.items()]
        elif value is not None:
            overrides.append(f"{name}={value}")
    start = FeedForwardConfig(1) if isinstance(config, FeedForwardConfig) else type(config)()
    assert start.merge(overrides) == config


def test_construction_stores_fields_as_declared() -> None:
    config = Outer(pattern=(1, 2), inner=Inner(colour="dark_blue"))  # type: ignore[arg-type]
    assert config.pattern == [1, 2]
    assert isinstance(config.pattern, list)
    assert config.inner.colour is Colour.dark_blue
    assert isinstance(Inner(rate=2).rate, float)
    assert isinstance(Outer(pattern=[], either=2).either, int)
    check(lambda: Inner(size="4"), "Inner.size: expected int, got '4'")  # type: ignore[arg-type]
    check(lambda: Outer(pattern=3), "Outer.pattern")  # type: ignore[arg-type]
    assert LayerNormConfig(name="rms", dtype="bfloat16").dtype is DType.bfloat16  # type: ignore[arg-type]


def test_replace_and_copy_leave_the_original_alone() -> None:
    base = Outer(pattern=[1])
    copied = base.copy()
    copied.pattern.append(2)
    copied.inner.size = 99
    assert base == Outer(pattern=[1])
    assert base.replace(on=False).on is False
    assert base.on is True
    assert pickle.loads(pickle.dumps(base)) == base
    assert copy.deepcopy(Wheel(3)) == Wheel(3)


def check(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(OLMoConfigurationError) as error:
        action()
    message = str(error.value)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"pattern": [1], "inne": {}}, ["no field 'inne'", "did you mean 'inner'?"]),
        ({"pattern": [1], "inner": {"siz": 1}}, ["Outer.inner", "'siz'", "did you mean 'size'?"]),
        ({"pattern": [1], "qqq": 1}, ["'qqq'", "The choices are: pattern, inner"]),
        ({}, ["Outer needs pattern"]),
        ({"pattern": 3}, ["Outer.pattern", "expected List[int]", "got 3"]),
        ({"pattern": [1, "x"]}, ["Outer.pattern.1", "expected int", "got 'x'"]),
        ({"pattern": [1, True]}, ["Outer.pattern.1", "expected int", "got True"]),
        ({"pattern": [1.5]}, ["Outer.pattern.0", "got 1.5"]),
        ({"pattern": [], "inner": {"size": "4"}}, ["Outer.inner.size", "got '4'"]),
        ({"pattern": [], "inner": {"rate": None}}, ["Outer.inner.rate", "expected float"]),
        ({"pattern": [], "inner": 5}, ["Outer.inner", "expected Inner", "got 5"]),
        ({"pattern": [], "inner": {"colour": "rd"}}, ["Colour (red, dark_blue)", "got 'rd'"]),
        ({"pattern": [], "mode": "slow"}, ["Outer.mode", "fast", "got 'slow'"]),
        ({"pattern": [], "on": 1}, ["Outer.on", "expected bool", "got 1"]),
        ({"pattern": [], "pair": [1]}, ["Outer.pair", "got [1]"]),
        ({"pattern": [], "either": 1.5}, ["int or str or null", "got 1.5"]),
        ({"pattern": [], "part": {"spokes": 3}}, ["Outer.part", "type is missing", "wheel, door"]),
        (
            {"pattern": [], "part": {"type": "wheal"}},
            ["unknown type 'wheal'", "did you mean 'wheel'?", "wheel, door"],
        ),
        ({"pattern": [], "part": {"type": "door"}}, ["Outer.part", "Door needs width"]),
        ({"pattern": [], "inner": {CLASS_KEY: "no.such.Thing"}}, ["'no.such.Thing'", "import"]),
        ({"pattern": [], "inner": {CLASS_KEY: "olmo_core.nn.rope.Rope"}}, ["not a class"]),
        ({"pattern": [], "inner": {CLASS_KEY: "olmo_core.nope.Thing"}}, ["not a class"]),
        (
            {"pattern": [], "inner": {CLASS_KEY: "olmo_core.nn.rope.RoPEConfig"}},
            ["Outer.inner", "expected a Inner"],
        ),
        ([1, 2], ["expected a dictionary", "[1, 2]"]),
        (None, ["expected a dictionary", "None"]),
    ],
)
def test_bad_dictionaries(data: Any, words: list[str]) -> None:
    check(lambda: Outer.from_dict(data), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inner.sise=3", ["Outer.inner", "no field 'sise'", "did you mean 'size'?"]),
        ("inne.size=3", ["Outer", "no field 'inne'", "did you mean 'inner'?"]),
        ("inner.size=abc", ["Outer.inner.size", "expected int", "got 'abc'"]),
        ("inner.size=1.5", ["Outer.inner.size", "expected int", "got '1.5'"]),
        ("inner.size=inf", ["Outer.inner.size", "expected int", "got 'inf'"]),
        ("inner.size=nan", ["Outer.inner.size", "expected int"]),
        ("inner.size=null", ["Outer.inner.size", "expected int"]),
        ("inner.rate=fast", ["Outer.inner.rate", "expected float", "got 'fast'"]),
        ("on=yes", ["Outer.on", "expected bool", "got 'yes'"]),
        ("inner.colour=blue", ["Colour (red, dark_blue)", "got 'blue'"]),
        ("pattern=3", ["Outer.pattern", "expected List[int]", "got '3'"]),
        ("pattern=[1,x]", ["Outer.pattern.1", "expected int", "got 'x'"]),
        ("pattern.5=1", ["Outer.pattern", "index below 2", "'5'"]),
        ("pattern.first=1", ["Outer.pattern", "'first'"]),
        ("on.size=1", ["Outer.on", "no field 'size'"]),
        ("maybe={size}", ["Outer.maybe", "expected Inner or null"]),
        ("part.spokes=3", ["Outer.part", "type is missing"]),
        ("part.type=wheal", ["did you mean 'wheel'?"]),
        ("part.type=door", ["Door needs width"]),
        ("inner", ["'inner'", "expected 'field=value'"]),
        ("=3", ["expected 'field=value'"]),
        ("inner..size=3", ["expected 'field=value'"]),
    ],
)
def test_bad_overrides(override: str, words: list[str]) -> None:
    check(lambda: Outer(pattern=[1, 2]).merge([override]), *words)


def test_bad_calls_from_python() -> None:
    check(lambda: Outer(pattern=[]).replace(patern=[1]), "'patern'", "did you mean 'pattern'?")
    check(lambda: Inner(colour="blue"), "Inner.colour", "red, dark_blue")  # type: ignore[arg-type]
    check(lambda: Wheel(type="door"), "unknown type 'door'")
    check(lambda: Part(type="wing"), "unknown type 'wing'", "wheel, door")
    check(lambda: DType.from_pt(torch.int32), "'int32'", "float32, bfloat16")
    check(lambda: Outer(pattern=[], anything=object()).as_config_dict(), "cannot write")
    assert issubclass(OLMoConfigurationError, OLMoError)


def test_enums() -> None:
    assert str(Colour.red) == f"{Colour.red}" == "red"
    assert f"{Colour.red:>5}" == "  red"
    assert Colour("red") is Colour.red
    assert Colour.red == "red"
    with pytest.raises(ValueError, match=r"'read' is not a Colour; did you mean 'red'\?"):
        Colour("read")


@pytest.mark.parametrize("member", DType)
def test_dtype_names_torch_dtypes(member: DType) -> None:
    assert DType.from_pt(member.as_pt()) is member
    assert str(member.as_pt()) == f"torch.{member}"


def test_importing_config_loads_no_torch() -> None:
    code = "import sys, olmo_core.config; assert 'torch' not in sys.modules"
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": source})
