"""Typed configurations: plain dataclasses that convert to dictionaries and back, exactly.

Every mistake in a dictionary or an override raises
:class:`~olmo_core.exceptions.OLMoConfigurationError` with the place, what was expected, what came,
and the closest known name.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from olmo_core._config_io import (
    CLASS_KEY,
    Registrable,
    check_keys,
    decode,
    decode_dataclass,
    encode,
    merge,
    parse_dotlist,
    suggest,
    type_hints,
)
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["CLASS_KEY", "Config", "DType", "Registrable", "StrEnum"]


class StrEnum(str, Enum):
    """An enumeration of strings: ``str()`` gives the value, as in Python 3.11's own."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> Any:
        choices = [str(member.value) for member in cls]
        raise ValueError(f"{value!r} is not a {cls.__name__}{suggest(str(value), choices)}")


class DType(StrEnum):
    """The floating-point types that parameters may have."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"

    @classmethod
    def from_pt(cls, dtype: torch.dtype) -> DType:
        """The member for a ``torch.dtype``.

        :raises OLMoConfigurationError: For a type that is not listed here.
        """
        try:
            return cls(str(dtype).removeprefix("torch."))
        except ValueError as error:
            raise OLMoConfigurationError(str(error)) from None

    def as_pt(self) -> torch.dtype:
        """The matching ``torch.dtype``."""
        import torch

        dtype = getattr(torch, self.value)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclasses.dataclass
class Config:
    """Base class of all configurations.

    An enumeration may be given by its value, a list as a tuple, a float as an int: fields are
    stored as declared, so that round trips are exact.

    A subclass that is also :class:`Registrable` and defines ``__post_init__`` has to accept the
    argument ``type``.
    """

    def __post_init__(self, *init_vars: object) -> None:
        del init_vars  # ``type`` of a registered class, which its ``__new__`` has seen
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value.__class__ in (str, tuple, int):
                where = f"{self.__class__.__name__}.{field.name}"
                value = decode(value, type_hints(self.__class__)[field.name], where)
                object.__setattr__(self, field.name, value)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-compatible dictionary without class paths; see :meth:`as_config_dict`."""
        return typing.cast("dict[str, Any]", encode(self, class_paths=False))

    def as_config_dict(self) -> dict[str, Any]:
        """A JSON-compatible dictionary from which :meth:`from_dict` restores an equal object.

        Each configuration in it carries its dotted class path as ``_CLASS_`` and, if it is
        registered under a name, that name as ``type``.
        """
        return typing.cast("dict[str, Any]", encode(self, class_paths=True))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """The inverse of :meth:`as_config_dict`.

        The class is the one that ``_CLASS_`` or ``type`` names, which must be ``cls`` or derive
        from it; without both it is ``cls``, or its default registered subclass.
        ``_CLASS_`` imports modules of this package only: import your own before.

        :param data: Field names and values; nested configurations are dictionaries.
        :param overrides: A dotlist to :meth:`merge` afterwards.
        :raises OLMoConfigurationError: For an unknown key, type or class, a missing field, or a
            value of the wrong type.
        """
        config = decode_dataclass(data, cls, cls.__name__)
        return config.merge(overrides) if overrides else config

    def merge(self, dotlist: Sequence[str]) -> Self:
        """A copy with fields replaced by ``"a.b=value"`` strings.

        The field's type decides how a value is read: ``3``, ``1e-3``, ``true``, ``null``,
        ``[4096, -1]``, an enumeration's value, or ``{...}`` (JSON) for a nested configuration.
        A path through a nested configuration that is None creates it with its defaults.
        Later strings win.

        :param dotlist: Overrides, each with an optional leading ``--``.
        :raises OLMoConfigurationError: For an override without ``=``, an unknown key, or a value
            that does not fit.
        """
        config: Any = self
        for tree in parse_dotlist([dotlist] if isinstance(dotlist, str) else dotlist):
            config = merge(config, tree, self.__class__.__name__)
        return typing.cast("Self", config)

    def replace(self, **changes: Any) -> Self:
        """A copy with fields replaced by values.

        :raises OLMoConfigurationError: For an unknown field.
        """
        check_keys(changes, self.__class__, self.__class__.__name__)
        return dataclasses.replace(self, **changes)

    def copy(self) -> Self:
        """A deep copy."""
        return copy.deepcopy(self)
