"""Buffers that modules derive from their configuration and share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any

import torch

__all__ = ["BufferCache"]


class BufferCache(MutableMapping[Hashable, torch.Tensor]):
    """A dictionary of buffers, such as RoPE tables, that several modules may share.

    Its contents can always be rebuilt from a module's configuration. They are therefore in no
    state dict, follow no ``.to()`` (keys name the device), are left out when the cache is pickled,
    and are shared with a deep copy.

    An empty cache is truthy, so ``cache or BufferCache()`` does not lose the one that was given.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[tuple[str, ...], Hashable], torch.Tensor] = {}
        self._prefix: tuple[str, ...] = ()

    def with_namespace(self, name: str) -> BufferCache:
        """A view of the same storage whose keys collide with nobody else's.

        :param name: The namespace; namespaces nest.
        """
        view = BufferCache()
        view._buffers = self._buffers
        view._prefix = (*self._prefix, name)
        return view

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return self._buffers[self._prefix, key]

    def __setitem__(self, key: Hashable, value: torch.Tensor) -> None:
        self._buffers[self._prefix, key] = value

    def __delitem__(self, key: Hashable) -> None:
        del self._buffers[self._prefix, key]

    def __iter__(self) -> Iterator[Hashable]:
        # A copy, so that another module may add a buffer during the iteration.
        return iter([key for prefix, key in list(self._buffers) if prefix == self._prefix])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> BufferCache:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}, "_prefix": self._prefix}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(namespace={'.'.join(self._prefix)!r}, {len(self)} buffers)"
