"""Whose directories are where on one file system, so that none is within another's."""

from __future__ import annotations

from collections import Counter

Parts = tuple[str, ...]


class Places:
    """Absolute paths by the name of who has them; not safe to use from several threads."""

    def __init__(self) -> None:
        self._parts: dict[str, Parts] = {}
        self._at: dict[Parts, set[str]] = {}
        self._below: Counter[Parts] = Counter()
        """For each directory that has paths below it, how many."""

    def put(self, name: str, path: str) -> None:
        """Its path, in place of the one it had."""
        parts = _parts(path)
        if self._parts.get(name) == parts:
            return
        self.drop(name)
        self._parts[name] = parts
        self._at.setdefault(parts, set()).add(name)
        self._below.update(_above(parts))

    def drop(self, name: str) -> None:
        """It has none any more."""
        parts = self._parts.pop(name, None)
        if parts is None:
            return
        self._at[parts].discard(name)
        if not self._at[parts]:
            del self._at[parts]
        for above in _above(parts):
            self._below[above] -= 1
            if not self._below[above]:
                del self._below[above]

    def within(self, path: str) -> set[str]:
        """Who has the directory itself or one below it."""
        parts = _parts(path)
        found = set(self._at.get(parts, ()))
        if self._below.get(parts):  # seldom: then all are looked at
            depth = len(parts)
            found |= {name for name, other in self._parts.items() if other[:depth] == parts}
        return found

    def around(self, path: str) -> set[str]:
        """Who has a directory above it. Not who has the root: that is given to no volume, so it is
        somebody who looks after all, or of whom it is not known what he has."""
        return {name for above in _above(_parts(path))[1:] for name in self._at.get(above, ())}

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __len__(self) -> int:
        return len(self._parts)


def _parts(path: str) -> Parts:
    return tuple(segment for segment in path.split("/") if segment)


def _above(parts: Parts) -> list[Parts]:
    return [parts[:depth] for depth in range(len(parts))]
