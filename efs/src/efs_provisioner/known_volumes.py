"""The volumes there are, by file system: whose directory is where, and whose group is which.

Filled from the volumes in the cluster, those of efs-provisioner among them, and from what is being
made at this moment: neither the records on a file system nor its access points know all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from efs_provisioner.parameters import MAX_ID
from efs_provisioner.places import Places
from efs_provisioner.stored import FIXED_GID
from external_storage import Change, PersistentVolume, ProvisioningFailed
from external_storage.gid_allocator import GidAllocator
from external_storage.kube.names import ANN_GID

Place = tuple[str, str]
"""A file system, and the absolute path of a directory on it."""


class DirectoryTaken(ProvisioningFailed):
    """Another volume has the directory, or one below or above it."""


class KnownVolumes:
    """Safe to use from threads. One table of gids for both modes and all classes: they are groups
    of one file system."""

    def __init__(
        self,
        *,
        file_systems: Iterable[str],
        place_of: Callable[[PersistentVolume], Place | None],
    ) -> None:
        """``place_of``: where a volume is; None: on no file system of ours."""
        self._gids = {id: GidAllocator(1, MAX_ID) for id in file_systems}
        self._place_of = place_of
        self._lock = threading.Lock()
        self._volumes = {id: Places() for id in self._gids}
        self._begun = {id: Places() for id in self._gids}

    def observe(self, old: PersistentVolume | None, new: PersistentVolume | None) -> None:
        """A volume of ours has come, changed or gone."""
        volume = new or old
        if volume is None or (place := self._place_of(volume)) is None:
            return
        id, path = place
        if id not in self._gids:
            return
        with self._lock:
            self._begun[id].drop(volume.name)
            if new is None:
                self._volumes[id].drop(volume.name)
            else:
                self._volumes[id].put(volume.name, path)
        if (fixed := _fixed_gid(volume)) is not None:
            self.share_gid(id, fixed)
        elif FIXED_GID not in volume.metadata.annotations:
            self._gids[id].observe(Change(old, new))

    # -- groups

    def gids(self, file_system: str) -> GidAllocator:
        """The table of a file system of ours."""
        return self._gids[file_system]

    def share_gid(self, file_system: str, gid: int) -> None:
        """The group of a whole class: it must never be one volume's own."""
        if gid > 0:
            self._gids[file_system].share(f"group {gid} of a class", gid)

    # -- directories

    def count(self, file_system: str) -> int:
        """How many volumes are on it, or are being made there."""
        with self._lock:
            return len(self._volumes[file_system]) + len(self._begun[file_system])

    def begin(self, name: str, file_system: str, path: str) -> None:
        """The directory is this volume's from now on. Raises ``DirectoryTaken``."""
        with self._lock:
            for places in (self._volumes[file_system], self._begun[file_system]):
                if around := places.around(path) - {name}:
                    raise DirectoryTaken(f"{path} is within the directory of volume {min(around)}")
                if within := places.within(path) - {name}:
                    raise DirectoryTaken(
                        f"the directory {path} is, or has in it, that of volume {min(within)}: "
                        "want a subPathPattern that gives each claim its own"
                    )
            self._begun[file_system].put(name, path)

    def within(self, file_system: str, path: str, *, but: str) -> list[str]:
        """Who has the directory, or one below it, beside the volume ``but``."""
        with self._lock:
            both = (self._volumes[file_system], self._begun[file_system])
            return sorted(set[str]().union(*(places.within(path) for places in both)) - {but})

    def release(self, name: str, *, but: str = "") -> None:
        """Nothing was made for it after all, on no file system ``but`` one: its directory and its
        group are free, unless a volume of the cluster has them."""
        for id, table in self._gids.items():
            if id == but:
                continue
            with self._lock:
                self._begun[id].drop(name)
                is_there = name in self._volumes[id]
            if not is_there:
                table.release(name)

    def ended(self, name: str, file_system: str) -> None:
        """Its data is gone, so its group can be another's. The directory is free only when the
        volume is gone, too: until then its deletion may be tried again."""
        with self._lock:
            self._begun[file_system].drop(name)
        self._gids[file_system].release(name)


def _fixed_gid(volume: PersistentVolume) -> int | None:
    """The group that its class gives to all; None: it has one of its own, or none."""
    notes = volume.metadata.annotations
    text = notes.get(FIXED_GID, "")
    if text == "true":
        text = notes.get(ANN_GID, "")
    return int(text) if text.isdecimal() and len(text) <= 10 and int(text) <= MAX_ID else None
