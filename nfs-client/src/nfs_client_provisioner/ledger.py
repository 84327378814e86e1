"""Which volumes there are on the servers: where their directories are, and what was promised.

Filled from the volumes of our provisioner names in the cluster, those that nfs-subdir made under
them among them, and from what is being made at this moment. The records on the shares do not know
the former. Volumes made by hand, or of other provisioners, are known to neither.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from external_storage import PersistentVolume, ProvisioningFailed
from external_storage.kube import quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A directory of a volume."""

    server: str
    """Our name for it."""
    path: str
    """Below the server's directory."""

    def above(self) -> Iterator[Place]:
        """The directories above it, the base not among them."""
        parts = self.path.split("/")
        for depth in range(1, len(parts)):
            yield Place(server=self.server, path="/".join(parts[:depth]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One volume."""

    place: Place
    capacity: int
    """Bytes that were promised."""


class Conflict(ProvisioningFailed):
    """A directory cannot be used or removed because of what other volumes have."""


class Ledger:
    """The volumes by name and by place; safe to use from threads."""

    def __init__(self, place_of: Callable[[PersistentVolume], Place | None]) -> None:
        """``place_of``: where a volume of the cluster is; None: on no server of ours."""
        self._place_of = place_of
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._at: dict[Place, set[str]] = {}
        self._below: Counter[Place] = Counter()
        self._ended: set[str] = set()
        """Deleted by us, while the watch may still have news of their last days."""

    def observe(self, _old: PersistentVolume | None, new: PersistentVolume | None) -> None:
        """A volume of the cluster has come, changed or gone."""
        volume = new or _old
        assert volume is not None
        place = self._place_of(volume) if new is not None else None
        with self._lock:
            if new is None:
                self._ended.discard(volume.name)
                self._drop(volume.name)
            elif place is not None and volume.name not in self._ended:
                self._put(volume.name, Entry(place=place, capacity=_capacity(volume)))

    @contextmanager
    def reserve(self, name: str, entry: Entry, *, shared: bool) -> Iterator[None]:
        """Count a volume from now on; taken back if the block raises and it was not there before.

        Raises ``Conflict`` if its directory is in another volume's, around one, or, unless it is
        ``shared``, another's itself.
        """
        with self._lock:
            self._refuse_overlap(name, entry.place, shared=shared)
            before = self._entries.get(name)
            self._ended.discard(name)
            self._put(name, entry)
        try:
            yield
        except BaseException:
            with self._lock:
                if before is None:
                    self._drop(name)
                else:
                    self._put(name, before)
            raise

    def promised(self, server: str, *, without: str) -> int:
        """Bytes promised to the volumes on a server, all but one."""
        with self._lock:
            return sum(
                entry.capacity
                for name, entry in self._entries.items()
                if entry.place.server == server and name != without
            )

    def company(self, name: str, place: Place) -> set[str]:
        """The names of other volumes with the same directory."""
        with self._lock:
            return self._at.get(place, set()) - {name}

    def refuse_around(self, place: Place) -> None:
        """Raise ``Conflict`` if directories of other volumes are within this one."""
        with self._lock:
            if count := self._below[place]:
                raise Conflict(
                    f"the directories of {count} other volumes are below {place.path!r}: nothing "
                    "is removed until they are gone"
                )

    def ended(self, name: str) -> None:
        """The volume's directory is not its own any more."""
        with self._lock:
            if name in self._entries:
                self._drop(name)
                self._ended.add(name)

    def _refuse_overlap(self, name: str, place: Place, *, shared: bool) -> None:
        others = self._at.get(place, set()) - {name}
        if others and not shared:
            raise Conflict(
                f"the directory {place.path!r} is that of volume {min(others)}: want a pattern "
                'that gives each claim its own, or shared: "true" in the class'
            )
        own_below = int(self._is_below(self._entries.get(name), place))
        if self._below[place] > own_below:
            raise Conflict(f"directories of other volumes are below {place.path!r}")
        for above in place.above():
            if others := self._at.get(above, set()) - {name}:
                raise Conflict(f"{place.path!r} is within the directory of volume {min(others)}")

    @staticmethod
    def _is_below(entry: Entry | None, place: Place) -> bool:
        return entry is not None and place in entry.place.above()

    def _put(self, name: str, entry: Entry) -> None:
        known = self._entries.get(name)
        if known is not None and known.place == entry.place:
            self._entries[name] = entry
            return
        self._drop(name)
        self._entries[name] = entry
        self._at.setdefault(entry.place, set()).add(name)
        self._below.update(entry.place.above())

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        names = self._at[entry.place]
        names.discard(name)
        if not names:
            del self._at[entry.place]
        for above in entry.place.above():
            self._below[above] -= 1
            if not self._below[above]:
                del self._below[above]


def _capacity(volume: PersistentVolume) -> int:
    try:
        return quantity.to_bytes(volume.spec.capacity.get("storage", "0"))
    except ValueError:
        return 0
