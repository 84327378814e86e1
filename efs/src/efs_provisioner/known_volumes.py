"""The volumes there are, by file system: how many, and whose group is which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from efs_provisioner.access_point_path import overlap
from efs_provisioner.parameters import MAX_ID
from efs_provisioner.stored import FIXED_GID, PATH, handle_of
from external_storage import Change, Informer, PersistentVolume
from external_storage.gid_allocator import GidAllocator
from external_storage.kube.client import Client
from external_storage.kube.names import ANN_GID
from external_storage.persistent_volume import is_ours


class KnownVolumes:
    """Our volumes as the API server has them, and a table of gids for each file system.

    One table for both modes and all classes: they are groups of one file system.
    """

    def __init__(
        self,
        client: Client,
        *,
        names: Collection[str],
        file_systems: Collection[str],
        file_system_of: Callable[[PersistentVolume], str | None],
    ) -> None:
        """``names``: the provisioner names that are ours. Starts nothing."""
        self._gids = {id: GidAllocator(1, MAX_ID) for id in file_systems}
        self._counts: Counter[str] = Counter()
        self._file_system_of = file_system_of
        self._informer = Informer(client, PersistentVolume, keep=lambda v: is_ours(v, names))
        self._informer.add_handler(self._observe)

    def start(self) -> None:
        self._informer.start()

    def stop(self) -> None:
        self._informer.stop()

    def problem(self) -> str | None:
        """Why nothing can be said of gids yet, or None."""
        return None if self._informer.has_synced else "the volumes have not been listed yet"

    def gids(self, file_system: str) -> GidAllocator:
        """The table of a file system of ours."""
        return self._gids[file_system]

    def count(self, file_system: str) -> int:
        """How many volumes are on it."""
        return self._counts[file_system]

    def overlapping(self, file_system: str, path: str, *, but: str) -> list[str]:
        """The volumes, but for one, that are access points of the directory, or above or below."""
        return [
            volume.name
            for volume in self._informer.lister.all()
            if volume.name != but
            and (handle := handle_of(volume)) is not None
            and handle.file_system == file_system
            and overlap(volume.metadata.annotations.get(PATH, "/"), path)
        ]

    def _observe(self, change: Change[PersistentVolume]) -> None:
        """On the informer's thread, which also is the only one that counts."""
        old = None if change.old is None else self._file_system_of(change.old)
        new = None if change.new is None else self._file_system_of(change.new)
        if old != new:
            self._counts[old or ""] -= 1
            self._counts[new or ""] += 1
        volume = change.new or change.old
        table = self._gids.get(new or old or "")
        if table is None or volume is None:
            return
        if FIXED_GID not in volume.metadata.annotations:
            table.observe(change)
            return
        text = volume.metadata.annotations.get(ANN_GID, "")
        if text.isdecimal() and int(text) <= MAX_ID:
            # Of a whole class: it must never be one volume's own.
            table.take(f"group {text} of a class", int(text))
