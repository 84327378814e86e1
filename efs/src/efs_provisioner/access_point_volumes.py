"""Volumes that are access points, mounted by the CSI driver's node plugin.

A volume costs two calls: one makes its access point, one deletes it. Both may be repeated: the
first has a token that is the same in every try for a claim, and what was made before is adopted by
the id in AWS's answer. Before that the claim has its durable intent: whatever becomes of the
answer, the same call is made until its end is known.
"""

from __future__ import annotations

from typing import Final

from efs_provisioner.access_point_making import AccessPointMaker, Plan
from efs_provisioner.access_points import AccessPoints
from efs_provisioner.aws import AccessPoint
from efs_provisioner.parameters import EfsParameters, OnDelete
from efs_provisioner.settings import CSI_DRIVER
from efs_provisioner.stored import (
    FILE_SYSTEM,
    FIXED_GID,
    ON_DELETE,
    PATH,
    Handle,
    handle_of,
    on_delete_of,
)
from external_storage import (
    PersistentVolume,
    ProvisionedVolume,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    ProvisionRequest,
    Unchanged,
    get_logger,
)
from external_storage.claims import has_intent

log = get_logger(__name__)

_MOUNT_TARGET_ADDRESS: Final = "mounttargetip"
_MOST_ENDED: Final = 10_000

Request = ProvisionRequest[EfsParameters]


class AccessPointVolumes:
    """Makes and deletes them; safe to use from threads."""

    def __init__(self, maker: AccessPointMaker) -> None:
        """What makes them has all else that is needed."""
        self._maker = maker
        self._context = maker.context
        self._aws = maker.aws
        self._facts = maker.facts
        self._known = maker.known
        self._points = maker.points
        self._directories = maker.directories
        self._begun: set[str] = set()
        """Volumes of which an access point may be there, by what became of their last call."""
        self._ended: set[str] = set()
        """Volumes whose last call is known to have left nothing."""

    def lead(self) -> None:
        """Another replica may have worked since: what had ended may have been begun again."""
        self._ended.clear()

    # -- making

    def provision(self, request: Request) -> ProvisionedVolume:
        """The access point of a claim: made now, or in an earlier try."""
        name = request.volume_name
        # An intent from before this process: nobody knows what its call has left. The first try
        # of a claim, though, was asked for before there was an intent.
        is_open = name in self._begun or (has_intent(request.claim) and name not in self._ended)
        try:
            made = self._provision(request)
        except ProvisioningInBackground:
            self._begun.add(name)
            self._ended.discard(name)
            raise
        except Exception as error:
            if is_open:
                self._refuse_end(request, error)
            self._note_end(name)
            self._known.release(name)
            raise
        self._begun.discard(name)
        self._ended.discard(name)
        return made

    def _refuse_end(self, request: Request, error: Exception) -> None:
        """What is refused now tells nothing about the tries before. ``Unchanged`` unless AWS says
        that they have left nothing: then the claim may be changed, or go."""
        text = str(error) or type(error).__name__
        try:
            left = self._points.made_for(request.claim.uid)
        except ProvisionerError as failed:
            raise Unchanged(
                f"{text}; whether an access point was made before is not known: {failed}"
            ) from error
        if left:
            raise Unchanged(f"{text} (access point {left[0]} was made before)") from error

    def _note_end(self, name: str) -> None:
        self._begun.discard(name)
        if len(self._ended) > _MOST_ENDED:
            self._ended.clear()
        self._ended.add(name)

    def _provision(self, request: Request) -> ProvisionedVolume:
        remove = self._maker.settings.delete_access_point_root_dir
        plan = Plan.of(request, remove=remove)
        point = self._maker.make(plan)
        parameters = request.parameters
        handle = Handle(point.file_system, point.id)
        source: dict[str, object] = {"driver": CSI_DRIVER, "volumeHandle": str(handle)}
        affinity = None
        try:
            if parameters.az:
                address = self._facts.address(point.file_system, parameters.az)
                source["volumeAttributes"] = {_MOUNT_TARGET_ADDRESS: address}
            if parameters.enforce_zone_affinity:
                affinity = self._facts.affinity(point.file_system)
        except ProvisionerError as error:
            # Asked before it was made, and again after a restart: the answer may have changed.
            raise ProvisioningInBackground(f"access point {point.id} is made; {error}") from error
        annotations = {
            FILE_SYSTEM: point.file_system,
            PATH: point.path,
            ON_DELETE: plan.on_delete.value,
        }
        if parameters.gid is not None:
            annotations[FIXED_GID] = str(parameters.gid)
        return ProvisionedVolume(
            source={"csi": source},
            gid=point.gid if parameters.allocates_gid else None,
            node_affinity=affinity,
            annotations=annotations,
        )

    # -- deleting

    def delete(self, volume: PersistentVolume) -> None:
        """Delete the access point of a volume, its directory before it if that was promised."""
        handle = handle_of(volume)
        if handle is None:
            raise ProvisioningFailed(
                f"the volume's source is no access point of {CSI_DRIVER}: nothing is removed"
            )
        points = self._points.of(handle.file_system)
        points.ensure_listed()
        point = points.find(handle.access_point)
        if point is None:
            self._told_gone(volume, handle)
        else:
            self._delete(volume, point, points)
        self._known.ended(volume.name, handle.file_system)

    def _delete(self, volume: PersistentVolume, point: AccessPoint, points: AccessPoints) -> None:
        if not self._maker.owner().has_made_for(volume.name, point.tags):
            raise ProvisioningFailed(
                f"the tags of access point {point.id} do not say that it was made for this volume "
                "by this provisioner: nothing is removed"
            )
        on_delete = on_delete_of(volume) or OnDelete.RETAIN
        if on_delete is not OnDelete.RETAIN:
            # Those above it, such as an admin's for all, were there when it was made.
            others = points.within(point.path, but=point.id)
            others += self._known.within(point.file_system, point.path, but=volume.name)
            if others:
                shown = ", ".join(sorted(others)[:3])
                text = f"The directory {point.path} is kept: {shown} lead into it, too"
                self._context.events.warning(volume, "AssetKept", text)
            else:
                self._directories.end(volume.name, point, on_delete)
        # Last: as long as it is there, it says whose directory that is.
        self._aws.delete_access_point(point.id)
        points.forget(point.id)

    def _told_gone(self, volume: PersistentVolume, handle: Handle) -> None:
        log.info("the access point is gone already", volume=volume.name, handle=str(handle))
        if on_delete_of(volume) in (OnDelete.DELETE, OnDelete.ARCHIVE):
            path = volume.metadata.annotations.get(PATH, "unknown")
            text = f"Access point {handle.access_point} was gone already: if {path} is, too, is not"
            self._context.events.warning(volume, "AssetKept", f"{text} looked at")
