"""The access points of one file system, as far as we know them without asking for each.

Listed once, then now and then; what we make and delete ourselves is noted in between. So a deletion
can be sure whose access point it is, and a new gid is nobody else's, with no call for either.
"""

from __future__ import annotations

import threading

from efs_provisioner import access_point_path
from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.tags import VOLUME, Owner
from external_storage.gid_allocator import GidAllocator


class AccessPoints:
    """Safe to use from threads; what asks AWS raises what ``Aws`` raises."""

    def __init__(self, aws: Aws, file_system: str, *, owner: Owner, gids: GidAllocator) -> None:
        self.file_system = file_system
        self._aws = aws
        self._owner = owner
        self._gids = gids
        self._listing = threading.Lock()
        self._lock = threading.Lock()
        self._known: dict[str, AccessPoint] = {}
        self._meanwhile: dict[str, AccessPoint | None] | None = None
        """What was noted since the listing began that goes on, which may not show it."""
        self.listed = False

    def ensure_listed(self) -> None:
        """List them unless that has been done since the start."""
        if self.listed:
            return
        with self._listing:
            if not self.listed:
                self._list()

    def refresh(self) -> None:
        """List them again."""
        with self._listing:
            self._list()

    def get(self, id: str) -> AccessPoint | None:
        """One that is known; ``find`` asks AWS for one that is not."""
        return self._known.get(id)

    def find(self, id: str) -> AccessPoint | None:
        """None: there is no such access point."""
        return self._known.get(id) or self._aws.find_access_point(id)

    def add(self, made: AccessPoint) -> None:
        """It has been made, or was found."""
        self._note(made.id, made)

    def forget(self, id: str) -> None:
        """It has been deleted."""
        self._note(id, None)

    def ours(self) -> list[AccessPoint]:
        """Those that we have made."""
        return [point for point in self._snapshot() if self._owner.has_made(point.tags)]

    def overlapping(self, point: AccessPoint) -> list[AccessPoint]:
        """Others whose root directory is the same, below or above."""
        return [
            other
            for other in self._snapshot()
            if other.id != point.id and access_point_path.overlap(other.path, point.path)
        ]

    def __len__(self) -> int:
        return len(self._known)

    # -- inside

    def _snapshot(self) -> list[AccessPoint]:
        with self._lock:
            return list(self._known.values())

    def _note(self, id: str, point: AccessPoint | None) -> None:
        with self._lock:
            if self._meanwhile is not None:
                self._meanwhile[id] = point
            if point is None:
                self._known.pop(id, None)
            else:
                self._known[id] = point

    def _list(self) -> None:
        with self._lock:
            self._meanwhile = {}
        try:
            found = {point.id: point for point in self._aws.access_points(self.file_system)}
        except BaseException:
            with self._lock:
                self._meanwhile = None
            raise
        with self._lock:
            for id, point in self._meanwhile.items():
                if point is None:
                    found.pop(id, None)
                else:
                    found[id] = point
            self._meanwhile = None
            self._update_gids(found)
            self._known = found
        self.listed = True

    def _update_gids(self, found: dict[str, AccessPoint]) -> None:
        """With the lock: who deletes one meanwhile releases its gid after us."""
        for id, point in self._known.items():
            if id not in found and not self._owner.has_made(point.tags):
                self._gids.release(id)
        for point in found.values():
            if point.gid is not None:
                # Of several with one gid (a class's own) the first has it: it is taken, is all.
                self._gids.take(self._holder(point), point.gid)

    def _holder(self, point: AccessPoint) -> str:
        """The key in the table of gids: also of one whose volume was never saved."""
        ours = self._owner.has_made(point.tags)
        return point.tags.get(VOLUME, point.id) if ours else point.id
