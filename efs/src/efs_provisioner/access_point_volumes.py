"""Volumes that are access points, mounted by the CSI driver's node plugin.

A volume costs two calls: one makes its access point, one deletes it. Both may be repeated: the
first has a token that is the same in every try for a claim, and what was made before is adopted by
the id in AWS's answer. Before that the claim has its durable intent: whatever becomes of the
answer, the same call is made until its end is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from efs_provisioner import access_point_path, tags
from efs_provisioner.access_point_directories import AccessPointDirectories
from efs_provisioner.access_points import AccessPoints
from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.aws_errors import AccessPointsExhausted, TokenUsed
from efs_provisioner.facts import Facts
from efs_provisioner.known_volumes import KnownVolumes
from efs_provisioner.parameters import EfsParameters, OnDelete
from efs_provisioner.settings import CSI_DRIVER, EfsSettings
from efs_provisioner.stored import FILE_SYSTEM, ON_DELETE, PATH, Handle, handle_of, on_delete_of
from efs_provisioner.tags import CLAIM_UID, Owner
from external_storage import (
    Context,
    Infeasible,
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
from external_storage.gid_allocator import GidsExhausted
from external_storage.path_template import BadExpansion

log = get_logger(__name__)

_MOUNT_TARGET_ADDRESS: Final = "mounttargetip"
_GOING: Final = frozenset({"deleting", "deleted"})
_PERMISSIONS: Final = "700"
_MOST_ENDED: Final = 10_000

Request = ProvisionRequest[EfsParameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be made, whatever file system it comes to."""

    request: Request
    path: str
    on_delete: OnDelete

    @property
    def parameters(self) -> EfsParameters:
        return self.request.parameters

    @property
    def name(self) -> str:
        return self.request.volume_name


class AccessPointVolumes:
    """Makes and deletes them; safe to use from threads."""

    def __init__(
        self,
        settings: EfsSettings,
        context: Context,
        *,
        aws: Aws,
        facts: Facts,
        known: KnownVolumes,
        file_systems: Sequence[str],
        owner: Callable[[], Owner],
        directories: AccessPointDirectories,
    ) -> None:
        """``owner`` may ask the API server who we are; it is not called before there is work."""
        self._settings = settings
        self._context = context
        self._aws = aws
        self._facts = facts
        self._known = known
        self._file_systems = tuple(file_systems)
        self._owner = owner
        self._directories = directories
        self._lock = threading.Lock()
        self._points: dict[str, AccessPoints] = {}
        self._ended: set[str] = set()
        """Volumes whose last call is known to have left nothing."""

    # -- making

    def provision(self, request: Request) -> ProvisionedVolume:
        """The access point of a claim: made now, or in an earlier try."""
        # An intent from before this process: nobody knows what its call has left.
        is_open = has_intent(request.claim) and request.volume_name not in self._ended
        try:
            made = self._provision(request)
        except ProvisioningInBackground:
            self._ended.discard(request.volume_name)
            raise
        except Exception as error:
            if is_open:
                # What is refused now tells nothing about the try before.
                raise Unchanged(str(error) or type(error).__name__) from error
            if len(self._ended) > _MOST_ENDED:
                self._ended.clear()
            self._ended.add(request.volume_name)
            raise
        self._ended.discard(request.volume_name)
        return made

    def _provision(self, request: Request) -> ProvisionedVolume:
        plan = self._plan(request)
        point = self._make(plan)
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
        return ProvisionedVolume(
            source={"csi": source},
            gid=point.gid if parameters.allocates_gid else None,
            node_affinity=affinity,
            annotations={
                FILE_SYSTEM: point.file_system,
                PATH: point.path,
                ON_DELETE: plan.on_delete.value,
            },
        )

    def _plan(self, request: Request) -> _Plan:
        parameters = request.parameters
        relative = request.volume_name
        template = parameters.path_template()
        try:
            if template is not None:
                relative = template.path(request.claim, volume_name=request.volume_name)
                if parameters.ensure_unique_directory:
                    relative = f"{relative}-{request.claim.uid}"
            path = access_point_path.check(access_point_path.join(parameters.base_path, relative))
        except (BadExpansion, ValueError) as error:
            raise Infeasible(f"no root directory for an access point: {error}") from error
        on_delete = parameters.on_delete
        if on_delete is None:
            remove = self._settings.delete_access_point_root_dir
            on_delete = OnDelete.DELETE if remove else OnDelete.RETAIN
        return _Plan(request=request, path=path, on_delete=on_delete)

    def _make(self, plan: _Plan) -> AccessPoint:
        """On the file system of the class, else on the one with the fewest that has room."""
        wanted = plan.parameters.file_system_id
        points = [self._of(wanted)] if wanted else [self._of(id) for id in self._file_systems]
        for each in points:
            each.ensure_listed()
        full: AccessPointsExhausted | None = None
        for each in sorted(points, key=len):
            self._ask_before(each.file_system, plan)
            try:
                made = self._make_on(each, plan)
            except AccessPointsExhausted as error:
                full = error
                continue
            self._release_elsewhere(plan.name, made.file_system)
            return made
        raise full or ProvisioningFailed("there is no file system")

    def _release_elsewhere(self, name: str, file_system: str) -> None:
        """Of a try on another file system, of which nobody knew the end, a gid was kept."""
        for id in self._file_systems:
            if id != file_system:
                self._known.gids(id).release(name)

    def _ask_before(self, file_system: str, plan: _Plan) -> None:
        """What must be known and may be refused, while nothing has been made."""
        if plan.parameters.az:
            self._facts.address(file_system, plan.parameters.az)
        if plan.parameters.enforce_zone_affinity:
            self._facts.affinity(file_system)
        if plan.on_delete is not OnDelete.RETAIN:
            self._directories.check(file_system, plan.path)

    def _make_on(self, points: AccessPoints, plan: _Plan) -> AccessPoint:
        parameters = plan.parameters
        if not parameters.allocates_gid:
            return self._create(points, plan, gid=parameters.gid or 0)
        low, high = parameters.gid_range
        table = self._known.gids(points.file_system)
        try:
            with table.reserve(plan.name, minimum=low, maximum=high) as gid:
                return self._create(points, plan, gid=gid)
        except GidsExhausted as error:
            raise ProvisioningFailed(
                f"every group from {low} to {high} is taken on file system {points.file_system}: "
                "delete volumes, or widen gidRangeStart and gidRangeEnd"
            ) from error

    def _create(self, points: AccessPoints, plan: _Plan, *, gid: int) -> AccessPoint:
        request, parameters = plan.request, plan.parameters
        provisioner = request.storage_class.provisioner
        owner = self._owner()
        ours = owner.tags(plan.name, claim=request.claim, provisioner=provisioner)
        try:
            made = self._aws.create_access_point(
                token=owner.token(request.claim.uid, provisioner=provisioner),
                file_system=points.file_system,
                path=plan.path,
                uid=gid if parameters.uid is None else parameters.uid,
                gid=gid,
                permissions=parameters.directory_perms or _PERMISSIONS,
                tags={
                    **tags.parse(self._settings.tags),
                    **tags.parse(parameters.tags),
                    **ours,
                },
            )
        except TokenUsed as used:
            return self._adopt(used.access_point_id, plan, gid=gid)
        points.add(made)
        return made

    # -- adopting

    def _adopt(self, id: str, plan: _Plan, *, gid: int) -> AccessPoint:
        """The access point that an earlier try has made, whatever file system that was on."""
        try:
            found = self._aws.find_access_point(id)
        except ProvisionerError as error:
            raise ProvisioningInBackground(
                f"access point {id} of an earlier try cannot be looked at: {error}"
            ) from error
        if found is None or found.state in _GOING:
            raise ProvisioningFailed(f"access point {id} of an earlier try is being deleted")
        uid = plan.request.claim.uid
        made = self._owner().has_made_for(plan.name, found.tags)
        if not made or found.tags.get(CLAIM_UID) != uid:
            raise Infeasible(
                f"access point {id} has the token of this claim and not its tags: it is not "
                "touched; look at who has changed them"
            )
        if found.file_system not in self._file_systems:
            raise ProvisioningInBackground(
                f"access point {id} of an earlier try is on file system {found.file_system}, "
                "which this provisioner does not have any more"
            )
        points = self._of(found.file_system)
        if found.path != plan.path or not self._fits(found, plan, gid):
            self._discard(found, plan)
        points.add(found)
        log.info("adopted an access point", access_point=id, volume=plan.name)
        return found

    def _fits(self, found: AccessPoint, plan: _Plan, gid: int) -> bool:
        """Whether its group can be this volume's: another may have got it since."""
        if not plan.parameters.allocates_gid:
            return found.gid == gid
        table = self._known.gids(found.file_system)
        return found.gid is not None and table.take(plan.name, found.gid)

    def _discard(self, found: AccessPoint, plan: _Plan) -> None:
        """Delete one that no volume has led to, so nobody has mounted it; the next try makes
        another one. Raises always."""
        if self._context.client.find(PersistentVolume, plan.name) is not None:
            raise Unchanged(f"volume {plan.name} is there already")
        log.warning("an access point of an earlier try does not fit", access_point=found.id)
        try:
            self._aws.delete_access_point(found.id)
        except ProvisionerError as error:
            raise ProvisioningInBackground(
                f"access point {found.id} of an earlier try cannot be deleted: {error}"
            ) from error
        self._of(found.file_system).forget(found.id)
        raise ProvisioningFailed(
            f"access point {found.id} of an earlier try did not fit and is deleted: another one "
            "is made"
        )

    # -- deleting

    def delete(self, volume: PersistentVolume) -> None:
        """Delete the access point of a volume, its directory before it if that was promised."""
        handle = handle_of(volume)
        if handle is None:
            raise ProvisioningFailed(
                f"the volume's source is no access point of {CSI_DRIVER}: nothing is removed"
            )
        points = self._of(handle.file_system)
        points.ensure_listed()
        point = points.find(handle.access_point)
        if point is None:
            self._told_gone(volume, handle)
        else:
            self._delete(volume, point, points)
        self._known.gids(handle.file_system).release(volume.name)

    def _delete(self, volume: PersistentVolume, point: AccessPoint, points: AccessPoints) -> None:
        if not self._owner().has_made_for(volume.name, point.tags):
            raise ProvisioningFailed(
                f"the tags of access point {point.id} do not say that it was made for this volume "
                "by this provisioner: nothing is removed"
            )
        on_delete = on_delete_of(volume) or OnDelete.RETAIN
        if on_delete is not OnDelete.RETAIN:
            others = [other.id for other in points.overlapping(point)]
            others += self._known.overlapping(point.file_system, point.path, but=volume.name)
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

    # -- looking

    def refresh(self) -> None:
        """List again what has been listed: what others make and delete is seen now and then."""
        for points in self._all():
            if points.listed:
                try:
                    points.refresh()
                except ProvisionerError as error:
                    log.warning(
                        "access points cannot be listed",
                        file_system=points.file_system,
                        error=str(error),
                    )

    def counts(self) -> Mapping[str, int]:
        """By file system: how many access points it has, of those that have been listed."""
        return {points.file_system: len(points) for points in self._all() if points.listed}

    def of(self, file_system: str) -> AccessPoints:
        """Those of a file system of ours; ``Infeasible`` for another one."""
        return self._of(file_system)

    def _all(self) -> list[AccessPoints]:
        with self._lock:
            return list(self._points.values())

    def _of(self, file_system: str) -> AccessPoints:
        if file_system not in self._file_systems:
            raise Infeasible(
                f"file system {file_system} is none of this provisioner's, which are "
                f"{', '.join(self._file_systems)}"
            )
        owner = self._owner()
        with self._lock:
            if file_system not in self._points:
                self._points[file_system] = AccessPoints(
                    self._aws, file_system, owner=owner, gids=self._known.gids(file_system)
                )
            return self._points[file_system]
