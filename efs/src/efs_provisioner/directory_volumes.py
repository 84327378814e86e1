"""Volumes that are directories, mounted by NFS: what efs-provisioner's volumes are.

No call of AWS is made for any. The directory, its owner and its record are made on the file system
itself, which the kubelet has mounted into our pod (``external_storage.shares``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from efs_provisioner.access_points import AllAccessPoints
from efs_provisioner.facts import Facts
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.known_volumes import DirectoryTaken, KnownVolumes
from efs_provisioner.parameters import EfsParameters, OnDelete
from efs_provisioner.stored import (
    FILE_SYSTEM,
    FIXED_GID,
    ON_DELETE,
    PATH,
    file_system_of,
    on_delete_of,
)
from external_storage import (
    AssetRecord,
    AssetState,
    Infeasible,
    PersistentVolume,
    ProvisionedVolume,
    ProvisioningFailed,
    ProvisioningInBackground,
    ProvisionRequest,
    Unchanged,
    get_logger,
)
from external_storage.claims import has_intent
from external_storage.events import EventRecorder
from external_storage.gid_allocator import GidsExhausted
from external_storage.path_template import BadExpansion
from external_storage.shares import (
    Ended,
    Ownership,
    ShareDirectories,
    ShareUnavailable,
    check_path,
)
from external_storage.shares.location import below, join

log = get_logger(__name__)

MOUNT_OPTIONS: Final = (
    "nfsvers=4.1",
    "rsize=1048576",
    "wsize=1048576",
    "hard",
    "timeo=600",
    "retrans=2",
    "noresvport",
)
"""What AWS advises; a class that has some of its own has them all, as with efs-provisioner."""

GID: Final = "gid"
"""Key of a record's details."""
_FOR_GROUP: Final = 0o2771
_FOR_EVERYBODY: Final = 0o777
_MAX_NAME: Final = 255

Request = ProvisionRequest[EfsParameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A mounted file system and what is done on it."""

    system: FileSystem
    directories: ShareDirectories


class DirectoryVolumes:
    """Makes and deletes them; safe to use from threads."""

    def __init__(
        self,
        systems: Mapping[str, FileSystem],
        shares: Mapping[str, ShareDirectories],
        *,
        facts: Facts,
        known: KnownVolumes,
        points: AllAccessPoints,
        events: EventRecorder,
        keep_archives_s: float | None,
    ) -> None:
        """``shares``: of the file systems that are mounted in our pod, by id."""
        self._systems = systems
        self._places = {
            id: _Place(system=systems[id], directories=share) for id, share in shares.items()
        }
        self._facts = facts
        self._known = known
        self._points = points
        self._events = events
        self._keep_archives_s = keep_archives_s

    # -- making

    def provision(self, request: Request) -> ProvisionedVolume:
        """The directory of a claim: made now, or in an earlier try."""
        place = self._choose(request)
        try:
            return self._provision(request, place)
        except (Unchanged, ProvisioningInBackground):
            raise
        except Exception:
            if request.volume_name not in place.directories.records:
                self._known.release(request.volume_name)
            raise

    def _provision(self, request: Request, place: _Place) -> ProvisionedVolume:
        parameters, name = request.parameters, request.volume_name
        system = place.system
        path = _path(request)
        server, affinity = system.server, None
        if parameters.az:
            server = self._facts.address(system.id, parameters.az)
        if parameters.enforce_zone_affinity:
            affinity = self._facts.affinity(system.id)
        on_delete = parameters.on_delete or OnDelete.DELETE
        self._begin(name, system, join(system.path, path))
        gid = self._gid(request, place)
        try:
            made = place.directories.make(
                name,
                claim=request.claim,
                path=path,
                ownership=_ownership(parameters, gid),
                adopt=not parameters.ensure_unique_directory,
                details={GID: gid},
            )
        except ValueError as error:
            raise Infeasible(f"no directory for the volume: {error}") from error
        annotations = {FILE_SYSTEM: system.id, PATH: made.path, ON_DELETE: on_delete.value}
        if parameters.gid is not None:
            annotations[FIXED_GID] = "true"
        return ProvisionedVolume(
            source={"nfs": {"server": server, "path": made.server_path}},
            mount_options=() if request.storage_class.mount_options else MOUNT_OPTIONS,
            gid=gid,
            node_affinity=affinity,
            annotations=annotations,
        )

    def _choose(self, request: Request) -> _Place:
        """Where an earlier try began, else the class's, else the one with the fewest volumes."""
        places = list(self._places.values())
        for place in places:
            if request.volume_name in place.directories.records:
                return place
        wanted = request.parameters.file_system_id
        if wanted is not None:
            return self._at(wanted)
        if not places:
            raise Infeasible(_not_mounted(", ".join(self._systems)))
        if has_intent(request.claim):
            # An earlier try may have begun where nothing can be read yet.
            for place in places:
                if not place.directories.records.are_read:
                    share = place.directories.share
                    raise ShareUnavailable(share.problem() or f"{share}: its records are not read")
        usable = [place for place in places if place.directories.problem() is None]
        # If none is, the first one says why.
        return min(usable or places, key=lambda place: self._known.count(place.system.id))

    def _at(self, file_system: str) -> _Place:
        if file_system not in self._systems:
            raise Infeasible(
                f"file system {file_system} is none of this provisioner's, which are "
                f"{', '.join(self._systems)}"
            )
        if file_system not in self._places:
            raise Infeasible(_why_none(self._systems[file_system]))
        return self._places[file_system]

    def _begin(self, name: str, system: FileSystem, path: str) -> None:
        """Nobody else has the directory, or gets it. AWS is not asked for it."""
        self._known.begin(name, system.id, path)
        if points := self._points.within(system.id, path):
            raise DirectoryTaken(f"access points lead into {path}: {', '.join(points[:3])}")

    def _gid(self, request: Request, place: _Place) -> int | None:
        """The volume's group; kept until its end, for a directory may have been made with it."""
        parameters = request.parameters
        table = self._known.gids(place.system.id)
        if not parameters.allocates_gid:
            if parameters.gid is not None:
                self._known.share_gid(place.system.id, parameters.gid)
            return parameters.gid
        record = place.directories.records.own(request.volume_name)
        before = record.details.get(GID) if record is not None else None
        if record is not None and isinstance(before, int):
            if table.take(request.volume_name, before) or record.state is AssetState.PUBLISHED:
                return before
            # Another volume has got it since: the directory is made anew, nobody has used it.
            place.directories.discard(record)
        low, high = parameters.gid_range
        try:
            return table.allocate(request.volume_name, minimum=low, maximum=high)
        except GidsExhausted as error:
            raise ProvisioningFailed(str(error)) from error

    # -- ending

    def delete(self, volume: PersistentVolume) -> None:
        """End the directory of a volume as was promised when it was made."""
        id = file_system_of(volume, self._systems)
        place = self._places.get(id or "")
        if id is None or place is None:
            raise ProvisioningFailed(
                f"{_not_mounted(id)}: nothing is removed"
                if id in self._systems
                else "the volume is on no file system of this provisioner: nothing is removed"
            )
        ended = self._end(volume, place)
        # Not before the data is out of reach: the next one with this group could read it.
        self._known.ended(volume.name, id)
        log.info("a directory has ended", volume=volume.name, ending=ended.ending.value)

    def _end(self, volume: PersistentVolume, place: _Place) -> Ended:
        relative = self._relative(volume, place)
        on_delete = on_delete_of(volume) or OnDelete.DELETE
        directories = place.directories
        if on_delete is OnDelete.RETAIN:
            return directories.keep(volume.name)
        path = join(place.system.path, relative)
        others = self._known.within(place.system.id, path, but=volume.name)
        if others := others + self._points.within(place.system.id, path):
            text = f"The directory {path} is kept: {', '.join(others[:3])} lead into it, too"
            self._events.warning(volume, "AssetKept", text)
            return directories.keep(volume.name, in_use=True)
        if volume.name not in directories.records:
            self._refuse_unknown(volume, place, relative)
        if on_delete is OnDelete.ARCHIVE:
            keep_s = self._keep_archives_s
            return directories.archive(volume.name, path=relative, keep_s=keep_s)
        return directories.remove(volume.name, path=relative)

    def discard(self, record: AssetRecord) -> None:
        """Undo what was begun for a claim that is gone."""
        for place in self._places.values():
            if record.name in place.directories.records:
                place.directories.discard(record)
        self._known.release(record.name)

    def _relative(self, volume: PersistentVolume, place: _Place) -> str:
        path = volume.spec.nfs.path if volume.spec.nfs is not None else ""
        relative = below(place.system.path, path)
        if relative is None:
            raise ProvisioningFailed(
                f"the volume's path {path!r} is not below {place.system.path} of "
                f"{place.system}: nothing is removed"
            )
        return relative

    def _refuse_unknown(self, volume: PersistentVolume, place: _Place, relative: str) -> None:
        """Without a record only a directory that is named after the volume, as efs-provisioner
        named them all, is known to be its own."""
        problem = place.directories.problem()
        if problem is not None:
            raise ProvisioningFailed(problem)
        reference = volume.spec.claim_ref
        claim = reference.name if reference is not None else ""
        is_named = relative.rpartition("/")[2] == f"{claim}-{volume.name}"
        if is_named and FILE_SYSTEM not in volume.metadata.annotations:
            return
        if place.directories.exists(relative):
            raise ProvisioningFailed(
                f"there is no record that the directory {relative} is this volume's: nothing is "
                "removed"
            )


def _path(request: Request) -> str:
    parameters = request.parameters
    template = parameters.path_template()
    try:
        if template is None:
            # As efs-provisioner: the claim's name for people, the volume's to make it unique.
            most = _MAX_NAME - len(request.volume_name) - 1
            relative = f"{request.claim.name[:most]}-{request.volume_name}"
        else:
            relative = template.path(request.claim, volume_name=request.volume_name)
            if parameters.ensure_unique_directory:
                relative = f"{relative}-{request.claim.uid}"
        path = f"{parameters.base_path.strip('/')}/{relative}".lstrip("/")
        check_path(path)
    except (BadExpansion, ValueError) as error:
        raise Infeasible(f"no directory for the volume: {error}") from error
    return path


def _ownership(parameters: EfsParameters, gid: int | None) -> Ownership:
    mode = _FOR_EVERYBODY if gid is None else _FOR_GROUP
    if parameters.directory_perms:
        mode = int(parameters.directory_perms, 8)
    uid = -1 if parameters.uid is None else parameters.uid
    return Ownership(uid=uid, gid=-1 if gid is None else gid, mode=mode)


def _why_none(system: FileSystem) -> str:
    if not system.server:
        return f"the server of file system {system.id} is not known: set --aws-region or --dns-name"
    return _not_mounted(system.id)


def _not_mounted(file_system: str | None) -> str:
    return (
        f"file system {file_system} is not mounted in the provisioner's pod, as directories need "
        "it: give the pod an nfs volume of it"
    )
