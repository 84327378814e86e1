"""Which volume has which directory, so that none is within another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Parts = tuple[str, ...]


class Paths:
    """Paths by volume; not safe to use from several threads."""

    def __init__(self) -> None:
        self._holders: dict[Parts, dict[str, bool]] = {}
        """By path: whether each of its volumes shares it."""
        self._paths: dict[str, Parts] = {}
        self._above: Counter[Parts] = Counter()
        """For each directory above a path, how many volumes are below."""

    def put(self, name: str, parts: Parts, *, shared: bool) -> None:
        """The volume's path, in place of the one it had."""
        self.drop(name)
        self._paths[name] = parts
        self._holders.setdefault(parts, {})[name] = shared
        self._above.update(_above(parts))

    def drop(self, name: str) -> None:
        """The volume has none any more."""
        parts = self._paths.pop(name, None)
        if parts is None:
            return
        holders = self._holders[parts]
        del holders[name]
        if not holders:
            del self._holders[parts]
        self._above.subtract(_above(parts))
        for above in _above(parts):
            if not self._above[above]:
                del self._above[above]

    def at(self, parts: Parts) -> Mapping[str, bool]:
        """The volumes at exactly this path, and whether each shares it."""
        return self._holders.get(parts, {})

    def conflict(self, name: str, parts: Parts, *, shared: bool) -> str | None:
        """Why the volume cannot have this path, or None."""
        path = "/".join(parts)
        others = {other: shares for other, shares in self.at(parts).items() if other != name}
        if others and not shared:
            return f"the directory {path} belongs to the volume {min(others)}"
        if not all(others.values()):
            other = min(other for other, shares in others.items() if not shares)
            return f"the directory {path} belongs to the volume {other}, which does not share it"
        for above in _above(parts):
            if holders := [holder for holder in self.at(above) if holder != name]:
                return f"{path} is within the directory of the volume {min(holders)}"
        own = self._paths.get(name, ())
        if self._above[parts] > (parts in _above(own)):
            return f"directories of other volumes are within {path}"
        return None


def _above(parts: Parts) -> list[Parts]:
    return [parts[:depth] for depth in range(1, len(parts))]
