"""The access points there are, as far as we know them without asking for each.

Those of a file system are listed once, then now and then; what we make and delete ourselves is
noted in between. So a deletion can be sure whose access point it is, and a new gid is nobody
else's, with no call for either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.known_volumes import KnownVolumes
from efs_provisioner.places import Places
from efs_provisioner.tags import CLAIM_UID, VOLUME, Owner
from external_storage import Infeasible, ProvisionerError, get_logger
from external_storage.gid_allocator import GidAllocator

log = get_logger(__name__)


class AccessPoints:
    """Of one file system; safe to use from threads. What asks AWS raises what ``Aws`` raises."""

    def __init__(self, aws: Aws, file_system: str, *, owner: Owner, gids: GidAllocator) -> None:
        self.file_system = file_system
        self._aws = aws
        self._owner = owner
        self._gids = gids
        self._listing = threading.Lock()
        self._lock = threading.Lock()
        self._known: dict[str, AccessPoint] = {}
        self._places = Places()
        self._meanwhile: dict[str, AccessPoint | None] | None = None
        """What was noted since the listing began that goes on, which may not show it."""
        self.listed = False
        self.listed_at = 0.0
        """When the last listing began; on a monotonic clock."""

    def ensure_listed(self) -> None:
        """List them unless that has been done since the start, or since we lead."""
        if self.listed:
            return
        with self._listing:
            if not self.listed:
                self._list()

    def refresh(self) -> None:
        """List them again."""
        with self._listing:
            self._list()

    def find(self, id: str) -> AccessPoint | None:
        """None: there is no such access point."""
        return self._known.get(id) or self._aws.find_access_point(id)

    def add(self, made: AccessPoint) -> None:
        """It has been made, or was found."""
        self._note(made.id, made)

    def forget(self, id: str) -> None:
        """It has been deleted."""
        self._note(id, None)
        self._gids.release(id)

    def within(self, path: str, *, but: str = "") -> list[str]:
        """The ids of those, but for one, whose root directory is this one or below it."""
        with self._lock:
            return sorted(self._places.within(path) - {but})

    def in_the_way(self, path: str, *, volume: str) -> list[str]:
        """The ids of those that a new one for the volume must not meet: whose root directory is
        this one or below it, or, of ours, above it. One above may well be an admin's own."""
        with self._lock:
            within, around = self._places.within(path), self._places.around(path)
            return sorted(
                id
                for id in within | around
                if (point := self._known.get(id)) is not None
                and not self._owner.has_made_for(volume, point.tags)
                and (id in within or self._owner.has_made(point.tags))
            )

    def __len__(self) -> int:
        return len(self._known)

    # -- inside

    def _note(self, id: str, point: AccessPoint | None) -> None:
        with self._lock:
            if self._meanwhile is not None:
                self._meanwhile[id] = point
            if point is None:
                self._known.pop(id, None)
                self._places.drop(id)
            else:
                self._known[id] = point
                self._places.put(id, point.path)

    def _list(self) -> None:
        began = time.monotonic()
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
            for id in self._known.keys() - found.keys():
                self._places.drop(id)
            for id, point in found.items():
                self._places.put(id, point.path)
            self._known = found
        self.listed, self.listed_at = True, began

    def _update_gids(self, found: Mapping[str, AccessPoint]) -> None:
        """With the lock. Who deletes one of ours releases the group of its volume."""
        for id in self._known.keys() - found.keys():
            self._gids.release(id)
        for id, point in found.items():
            if point.gid is None:
                continue
            # Also of one whose volume was never saved. A group that others have already, such as a
            # class's own, is held beside them.
            volume = point.tags.get(VOLUME) if self._owner.has_made(point.tags) else None
            if volume is None or not self._gids.take(volume, point.gid):
                self._gids.share(id, point.gid)


class AllAccessPoints:
    """Of all file systems of ours; safe to use from threads."""

    def __init__(
        self,
        aws: Aws,
        *,
        file_systems: Iterable[str],
        owner: Callable[[], Owner],
        known: KnownVolumes,
    ) -> None:
        """``owner`` may ask the API server who we are; it is not called before there is work."""
        self._aws = aws
        self.file_systems = tuple(file_systems)
        self._owner = owner
        self._gids = known.gids
        self._lock = threading.Lock()
        self._points: dict[str, AccessPoints] = {}

    def of(self, file_system: str) -> AccessPoints:
        """Those of a file system of ours; ``Infeasible`` for another one."""
        if file_system not in self.file_systems:
            raise Infeasible(
                f"file system {file_system} is none of this provisioner's, which are "
                f"{', '.join(self.file_systems)}"
            )
        owner = self._owner()
        with self._lock:
            if file_system not in self._points:
                self._points[file_system] = AccessPoints(
                    self._aws, file_system, owner=owner, gids=self._gids(file_system)
                )
            return self._points[file_system]

    def made_for(self, claim_uid: str) -> list[str]:
        """The ids of those that we have made for a claim, whatever file system they are on; AWS is
        asked for all, so not for every claim."""
        owner = self._owner()
        return [
            point.id
            for point in self._aws.access_points()
            if owner.has_made(point.tags) and point.tags.get(CLAIM_UID) == claim_uid
        ]

    def within(self, file_system: str, path: str) -> list[str]:
        """The ids of those that lead into a directory, as far as they have been listed."""
        with self._lock:
            points = self._points.get(file_system)
        return points.within(path) if points is not None else []

    def refresh(self, *, older_than_s: float = 0.0) -> None:
        """List again what was listed so long ago: what others make and delete is seen now and
        then."""
        for points in self._all():
            if points.listed and time.monotonic() - points.listed_at >= older_than_s:
                try:
                    points.refresh()
                except ProvisionerError as error:
                    log.warning(
                        "access points cannot be listed",
                        file_system=points.file_system,
                        error=str(error),
                    )

    def lead(self) -> None:
        """Another replica may have made and deleted some: list them when they are needed."""
        for points in self._all():
            points.listed = False

    def counts(self) -> Mapping[str, int]:
        """By file system: how many access points it has, of those that have been listed."""
        return {points.file_system: len(points) for points in self._all() if points.listed}

    def _all(self) -> list[AccessPoints]:
        with self._lock:
            return list(self._points.values())
