"""Configurations to dictionaries, and dictionaries and text to configurations.

The code behind :mod:`olmo_core.config`, which documents it. ``where`` is the dotted place of a
value, which errors name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import dataclass_extensions

from olmo_core.exceptions import OLMoConfigurationError

CLASS_KEY = "_CLASS_"
"""The key that holds a configuration's dotted class path in a dictionary."""


class Registrable(dataclass_extensions.Registrable):
    """A base class whose registered subclasses can be chosen by name.

    The name travels as the key ``type`` of a dictionary, and as the keyword-only argument ``type``.
    """

    def __new__(cls, *args: Any, type: str | None = None, **kwargs: Any) -> Registrable:
        try:
            return typing.cast(Registrable, super().__new__(cls, *args, type=type, **kwargs))
        except KeyError:
            raise _unknown_type(cls, type, cls.__name__) from None


class Text(str):
    """A value as it stood in a dotlist, not yet read as any type."""


class _MismatchError(Exception):
    """A value that is not of the expected type; the caller knows the place."""


def suggest(name: str, choices: Iterable[str]) -> str:
    import difflib

    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    question = f"; did you mean {close[0]!r}?" if close else "."
    return f"{question} The choices are: {', '.join(choices) or '(none)'}"


_TYPE_HINTS: dict[type, dict[str, Any]] = {}


def type_hints(cls: type) -> dict[str, Any]:
    if cls not in _TYPE_HINTS:
        _TYPE_HINTS[cls] = typing.get_type_hints(cls)
    return _TYPE_HINTS[cls]


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def check_keys(keys: Iterable[str], cls: type, where: str) -> None:
    known = _fields(cls)
    for key in keys:
        if key not in known:
            raise OLMoConfigurationError(
                f"{where}: {cls.__name__} has no field {key!r}{suggest(str(key), known)}"
            )


def _unknown_type(cls: type[Registrable], name: object, where: str) -> OLMoConfigurationError:
    choices = cls.get_registered_names() or [n for n in [cls.registered_name] if n]
    what = "type is missing" if name is None else f"unknown type {name!r}"
    return OLMoConfigurationError(f"{where}: {what}{suggest(str(name), choices)}")


def _class_path(cls: type) -> str:
    """The shortest path at which ``cls`` is found: a re-export outlives the file behind it."""
    module = cls.__module__
    while (parent := module.rpartition(".")[0]) and (
        getattr(sys.modules.get(parent), cls.__name__, None) is cls
    ):
        module = parent
    return f"{module}.{cls.__qualname__}"


def encode(value: Any, class_paths: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls: type = value.__class__
        out = {field: encode(getattr(value, field), class_paths) for field in _fields(cls)}
        name = getattr(cls, "registered_name", None)
        if isinstance(value, Registrable) and name is not None:
            out = {"type": name, **out}
        return {CLASS_KEY: _class_path(cls), **out} if class_paths else out
    if isinstance(value, Mapping):
        return {encode(k, False): encode(v, class_paths) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(encode(v, class_paths) for v in value)
    if isinstance(value, (list, tuple)):
        return [encode(v, class_paths) for v in value]
    try:
        return dataclass_extensions.encode(value)
    except TypeError as error:
        raise OLMoConfigurationError(f"cannot write {value!r} to a dictionary: {error}") from None


def _find_class(path: object, where: str) -> type:
    module_name, _, name = str(path).rpartition(".")
    module = sys.modules.get(module_name)
    if module is None and module_name.partition(".")[0] == __name__.partition(".")[0]:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            module = None
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        raise OLMoConfigurationError(
            f"{where}: {CLASS_KEY} names {path!r}, which is not a class of a loaded module; "
            "import the module that defines it first"
        )
    return cls


def _choose_class(data: Mapping[str, Any], cls: type, where: str) -> tuple[type, dict[str, Any]]:
    """The class that ``data`` describes, and the fields in it."""
    rest = dict(data)
    if (path := rest.pop(CLASS_KEY, None)) is not None:
        found = _find_class(path, where)
        if not issubclass(found, cls):
            raise OLMoConfigurationError(
                f"{where}: expected a {cls.__name__}, but {CLASS_KEY} names {path!r}"
            )
        cls = found
    if issubclass(cls, Registrable):
        name = rest.pop("type", None)
        name = cls._default_type if name is None else str(name)
        if name is not None and name != cls.registered_name:
            if name not in cls.get_registered_names():
                raise _unknown_type(cls, name, where)
            cls = cls.get_registered_class(name)
        elif name is None and cls.registered_name is None and cls.get_registered_names():
            raise _unknown_type(cls, None, where)
    return cls, rest


def _construct(cls: type, values: dict[str, Any], where: str) -> Any:
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OLMoConfigurationError(f"{where}: {cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


def decode_dataclass(data: object, cls: type, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise OLMoConfigurationError(
            f"{where}: expected a dictionary of {cls.__name__}'s fields, got {data!r}"
        )
    cls, rest = _choose_class(data, cls, where)
    check_keys(rest, cls, where)
    hints = type_hints(cls)
    values = {k: decode(v, hints[k], f"{where}.{k}") for k, v in rest.items()}
    return _construct(cls, values, where)


def parse_dotlist(dotlist: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Nested dictionaries with text at the leaves, to be merged one after the other."""
    tree: dict[str, Any] = {}
    for override in dotlist:
        key, equals, text = override.removeprefix("--").partition("=")
        *parents, leaf = key.strip().split(".")
        if not equals or not all((*parents, leaf)):
            raise OLMoConfigurationError(
                f"override {override!r}: expected 'field=value' or 'outer.inner=value'"
            )
        if _meets_text(tree, parents):  # "a={...}", then "a.b=1": the second builds on the first
            yield tree
            tree = {}
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = Text(text.strip())
    yield tree


def _meets_text(tree: dict[str, Any], path: list[str]) -> bool:
    node: Any = tree
    for key in path:
        node = node.get(key, {})
        if isinstance(node, Text):
            return True
    return False


def merge(config: Any, tree: Mapping[str, Any], where: str) -> Any:
    """A copy of ``config`` with the fields in ``tree`` replaced."""
    cls = type(config)
    if isinstance(config, Registrable) and "type" in tree:
        if str(tree["type"]) != cls.registered_name:
            return _merge_new(cls.registered_base or cls, tree, where)
        tree = {k: v for k, v in tree.items() if k != "type"}
    check_keys(tree, cls, where)
    hints = type_hints(cls)
    changes = {
        k: _merge_value(getattr(config, k), v, hints[k], f"{where}.{k}") for k, v in tree.items()
    }
    return dataclasses.replace(config, **changes)


def _merge_new(cls: type, tree: Mapping[str, Any], where: str) -> Any:
    """A new ``cls`` with the fields in ``tree``."""
    cls, rest = _choose_class(tree, cls, where)
    check_keys(rest, cls, where)
    hints = type_hints(cls)
    values = {k: _merge_value(None, v, hints[k], f"{where}.{k}") for k, v in rest.items()}
    return _construct(cls, values, where)


def _merge_value(current: Any, new: Text | dict[str, Any], hint: Any, where: str) -> Any:
    """``current`` replaced by text, or changed inside by a tree."""
    if isinstance(new, Text):
        return decode(new, hint, where)
    if dataclasses.is_dataclass(current):
        return merge(current, new, where)
    if isinstance(current, list):
        items = list(current)
        item_hint = (*typing.get_args(hint), Any)[0]
        for key, value in new.items():
            if not key.removeprefix("-").isdigit() or not -len(items) <= int(key) < len(items):
                raise OLMoConfigurationError(
                    f"{where}: expected an index below {len(items)}, got {key!r}"
                )
            items[int(key)] = _merge_value(items[int(key)], value, item_hint, f"{where}.{key}")
        return items
    classes = [t for t in _options(hint) if dataclasses.is_dataclass(t)]
    if len(classes) != 1:
        raise OLMoConfigurationError(
            f"{where}: holds {current!r}, which has no field {next(iter(new))!r}; "
            f"set {where.rpartition('.')[2]} as a whole ({_name(hint)})"
        )
    return _merge_new(typing.cast(type, classes[0]), new, where)


def _options(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for arg in typing.get_args(hint) for option in _options(arg)]
    origin = typing.get_origin(hint)
    return [origin if dataclasses.is_dataclass(origin) else hint]  # Part[int] is a Part


def _name(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if option is type(None):
            names.append("null")
        elif isinstance(option, type) and issubclass(option, Enum):
            names.append(f"{option.__name__} ({', '.join(str(m.value) for m in option)})")
        elif isinstance(option, type) and typing.get_origin(option) is None:
            names.append(option.__name__)
        else:
            names.append(str(option).replace("typing.", ""))
    return " or ".join(names)


def decode(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint``; text in a union becomes the first type that can read it."""
    options = _options(hint)
    # None first and str last: any text is a string, and "null" in a dotlist should mean None.
    for option in sorted(options, key=lambda t: (t is not type(None), t is str)):
        try:
            return _convert(value, option, where)
        except _MismatchError:
            continue
    what = str(value) if isinstance(value, Text) else value
    raise OLMoConfigurationError(f"{where}: expected {_name(hint)}, got {what!r}")


def _convert(value: Any, t: Any, where: str) -> Any:
    if t is Any:
        return str(value) if isinstance(value, Text) else value
    origin, args = typing.get_origin(t), typing.get_args(t)
    text = str(value) if isinstance(value, Text) else None
    if isinstance(value, Text):
        value = _read(value, origin or t)
    if origin is typing.Literal:
        literals = [a for a in args if a == value or text == str(a)]
        if literals:
            return literals[0]
    elif origin in (list, tuple, set, frozenset, Sequence) or t in (list, tuple, set):
        return _convert_items(value, origin or t, args, where)
    elif origin in (dict, Mapping) or t is dict:
        if isinstance(value, Mapping):
            k, v = args or (Any, Any)
            return {
                decode(Text(key) if isinstance(key, str) else key, k, where): decode(
                    item, v, f"{where}.{key}"
                )
                for key, item in value.items()
            }
    elif dataclasses.is_dataclass(t):
        if isinstance(value, t):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return decode_dataclass(value, typing.cast(type, t), where)
    elif isinstance(t, type) and issubclass(t, Enum):
        members = [m for m in t if m is value or m.value == value or text == str(m.value)]
        if members:
            return members[0]
    elif t is bool or t is type(None):
        if isinstance(value, t):
            return value
    elif t is int or t is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and (t is float or value == value // 1):
            return t(value)
    elif t is str:
        if isinstance(value, str):
            return value
    elif isinstance(t, type):
        if isinstance(value, t):
            return value
        if issubclass(t, Path) and isinstance(value, str):
            return t(value)
    raise _MismatchError


def _convert_items(value: Any, origin: Any, args: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise _MismatchError
    cls = tuple if origin is Sequence else origin
    if cls is not tuple or len(args) != 2 or args[1] is not Ellipsis:
        fixed = cls is tuple and args and origin is tuple
        if fixed and len(args) != len(value):
            raise _MismatchError
        hints = list(args) if fixed else [(*args, Any)[0]] * len(value)
    else:
        hints = [args[0]] * len(value)
    return cls(
        decode(item, hint, f"{where}.{i}")
        for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _read(text: Text, t: Any) -> Any:
    """Read a dotlist's text as a value that may become a ``t``."""
    try:
        if t is type(None) and text.lower() in ("null", "none", "~"):
            return None
        if t is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if t is int:
            return int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
        if t is float:
            return float(text)
        if t is str and text[:1] == text[-1:] == '"':
            return json.loads(text)
        if t in (dict, Mapping) or dataclasses.is_dataclass(t):
            return json.loads(text)
    except ValueError:
        raise _MismatchError from None
    if t in (list, tuple, set, frozenset, Sequence):
        if text[:1] + text[-1:] not in ("[]", "()"):
            raise _MismatchError
        return _split(text[1:-1])
    if t is type(None):
        raise _MismatchError
    return str(text)


def _split(text: str) -> list[Text]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[({") - (char in "])}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [Text(part.strip()) for part in parts if part.strip()]
