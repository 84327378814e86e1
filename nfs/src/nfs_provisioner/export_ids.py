"""Which export id belongs to which volume."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

LAST_ID = 65535
RESERVED_IDS = frozenset({0, 152})
"""Never given out: 0 is the id of Ganesha's pseudo root, 152.152 its file system id."""


class ExportIdsExhausted(Exception):
    """All 65534 usable export ids are in use."""


class ExportIds:
    """Gives out export ids by volume name. Thread-safe, allocate and release take constant time.

    A freed id goes to the end of the queue of free ones: it is used again as late as possible, so
    that a file handle of a deleted volume, which names its export by id, does not reach a new one.
    Everything is keyed by name, because a delete that is tried again must not free an id that has
    since become another volume's.
    """

    def __init__(self, used: Mapping[str, int] | None = None) -> None:
        """``used``: name → id of the volumes there are. ValueError as ``claim`` does."""
        self._lock = threading.Lock()
        self._by_name: dict[str, int] = {}
        self._names: dict[int, str] = {}
        # Goes on above the highest id in use; what was freed before a restart is not known.
        used = used or {}
        start = max(used.values(), default=0) + 1
        for name, export_id in used.items():
            self._take(name, export_id)
        order = (*range(start, LAST_ID + 1), *range(1, start))
        self._free: deque[int] = deque(
            i for i in order if i not in RESERVED_IDS and i not in self._names
        )

    def allocate(self, name: str) -> int:
        """The id of ``name``: the one it has, else a free one. Raises ExportIdsExhausted."""
        with self._lock:
            if (known := self._by_name.get(name)) is not None:
                return known
            if not self._free:
                raise ExportIdsExhausted(f"all {len(self._names)} export ids are in use")
            export_id = self._free.popleft()
            self._take(name, export_id)
            return export_id

    def claim(self, name: str, export_id: int) -> None:
        """Note that ``name`` has ``export_id``; known already is fine.

        Raises ValueError if the id is no usable one, is another volume's, or the volume has
        another one.
        """
        with self._lock:
            if self._by_name.get(name) != export_id:
                self._take(name, export_id)
                self._free.remove(export_id)

    def release(self, name: str) -> None:
        """The volume is gone, its id is free; a volume without an id is fine."""
        with self._lock:
            export_id = self._by_name.pop(name, None)
            if export_id is not None:
                del self._names[export_id]
                self._free.append(export_id)

    def of(self, name: str) -> int | None:
        """The id of ``name``, if it has one."""
        with self._lock:
            return self._by_name.get(name)

    def used(self) -> dict[str, int]:
        """A copy: name → id."""
        with self._lock:
            return dict(self._by_name)

    def _take(self, name: str, export_id: int) -> None:
        if not 1 <= export_id <= LAST_ID or export_id in RESERVED_IDS:
            raise ValueError(f"export id {export_id} of {name} is not a usable one")
        if (other := self._names.get(export_id, name)) != name:
            raise ValueError(f"export id {export_id} of {name} belongs to {other}")
        if (known := self._by_name.get(name, export_id)) != export_id:
            raise ValueError(f"{name} has export id {known}, not {export_id}")
        self._names[export_id] = name
        self._by_name[name] = export_id
