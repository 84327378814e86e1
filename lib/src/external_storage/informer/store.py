"""The indexed local copy, and the read-only view of it that everybody else gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from external_storage.kube.types import KubeObject

T = TypeVar("T", bound=KubeObject)

IndexFunction = Callable[[T], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """What happened to one object: ``old`` None is an addition, ``new`` None a deletion."""

    old: T | None
    new: T | None


class Store(Generic[T]):
    """Objects by ``namespace/name``, with indexes; every change is told as a ``Change``.

    ``keep`` drops what nobody here needs before it costs memory; an object that stops being kept
    counts as deleted.
    """

    def __init__(
        self,
        *,
        indexes: Mapping[str, IndexFunction[T]] | None = None,
        keep: Callable[[T], bool] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, T] = {}
        self._functions = dict(indexes or {})
        self._indexes: dict[str, dict[str, dict[str, None]]] = {n: {} for n in self._functions}
        self._keep = keep

    def replace(self, items: Iterable[T]) -> list[Change[T]]:
        """Make ``items`` the whole content; returns only what differs from before."""
        fresh = {item.key: item for item in items if self._keep is None or self._keep(item)}
        changes: list[Change[T]] = []
        with self._lock:
            for key in [key for key in self._objects if key not in fresh]:
                changes += self._put(key, None)
            for key, item in fresh.items():
                changes += self._put(key, item)
        return changes

    def apply(self, item: T, *, deleted: bool = False) -> list[Change[T]]:
        """Take over one watch event."""
        gone = deleted or (self._keep is not None and not self._keep(item))
        with self._lock:
            return self._put(item.key, None if gone else item)

    def get(self, key: str) -> T | None:
        return self._objects.get(key)

    def values(self) -> list[T]:
        with self._lock:
            return list(self._objects.values())

    def by_index(self, index: str, value: str) -> list[T]:
        with self._lock:
            keys = self._indexes[index].get(value, {})
            return [self._objects[key] for key in keys]

    def __len__(self) -> int:
        return len(self._objects)

    def _put(self, key: str, new: T | None) -> list[Change[T]]:
        old = self._objects.get(key)
        if old is None and new is None:
            return []
        if old is not None and new is not None:
            if old.metadata.resource_version == new.metadata.resource_version:
                return []
            if old.uid != new.uid:
                # Deleted and created again under its name while we were not looking.
                return self._put(key, None) + self._put(key, new)
        if old is not None:
            self._unindex(key, old)
        if new is None:
            del self._objects[key]
        else:
            self._objects[key] = new
            self._index(key, new)
        return [Change(old, new)]

    def _index(self, key: str, item: T) -> None:
        for name, function in self._functions.items():
            for value in function(item):
                self._indexes[name].setdefault(value, {})[key] = None

    def _unindex(self, key: str, item: T) -> None:
        for name, function in self._functions.items():
            index = self._indexes[name]
            for value in function(item):
                keys = index.get(value)
                if keys is not None:
                    keys.pop(key, None)
                    if not keys:
                        del index[value]


class Lister(Generic[T]):
    """Reads from a store; what it returns may be a moment old."""

    def __init__(self, store: Store[T]) -> None:
        self._store = store

    def get(self, name: str, *, namespace: str = "") -> T | None:
        return self._store.get(f"{namespace}/{name}" if namespace else name)

    def all(self) -> list[T]:
        return self._store.values()

    def by_index(self, index: str, value: str) -> list[T]:
        """All objects for which the named index function gave ``value``; KeyError if unknown."""
        return self._store.by_index(index, value)

    def __len__(self) -> int:
        return len(self._store)
