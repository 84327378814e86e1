"""Making the access point of a claim, or finding the one that an earlier try has made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from efs_provisioner import access_point_path, tags
from efs_provisioner.access_point_directories import AccessPointDirectories
from efs_provisioner.access_points import AccessPoints, AllAccessPoints
from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.aws_errors import TokenUsed
from efs_provisioner.facts import Facts
from efs_provisioner.known_volumes import DirectoryTaken, KnownVolumes
from efs_provisioner.parameters import EfsParameters, OnDelete
from efs_provisioner.settings import EfsSettings
from efs_provisioner.tags import CLAIM_UID, Owner
from external_storage import (
    Context,
    Infeasible,
    PersistentVolume,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    ProvisionRequest,
    Unchanged,
    get_logger,
)
from external_storage.gid_allocator import GidsExhausted
from external_storage.path_template import BadExpansion

log = get_logger(__name__)

_GOING: Final = frozenset({"deleting", "deleted"})
_PERMISSIONS: Final = "700"
_READ_ONLY: Final = "ReadOnlyMany"

Request = ProvisionRequest[EfsParameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
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

    @staticmethod
    def of(request: Request, *, remove: bool) -> Plan:
        """What the class gives for the claim; ``Infeasible``.

        ``remove``: the directory of a deleted access point, if the class does not say.
        """
        if _READ_ONLY in request.claim.spec.access_modes:
            raise Infeasible(f"the EFS CSI driver does not mount {_READ_ONLY}: ask for another")
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
        by_default = OnDelete.DELETE if remove else OnDelete.RETAIN
        return Plan(request=request, path=path, on_delete=parameters.on_delete or by_default)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPointMaker:
    """Safe to use from threads. Raises ``ProvisioningInBackground`` and ``Unchanged`` when an
    access point may be there, else it has made none."""

    settings: EfsSettings
    context: Context
    aws: Aws
    facts: Facts
    known: KnownVolumes
    points: AllAccessPoints
    owner: Callable[[], Owner]
    directories: AccessPointDirectories

    def make(self, plan: Plan) -> AccessPoint:
        """On the file system of the class, else on the one with the fewest that can be used."""
        wanted = plan.parameters.file_system_id
        refused: list[ProvisionerError] = []
        usable: list[AccessPoints] = []
        for id in [wanted] if wanted else self.points.file_systems:
            points = self.points.of(id)
            try:
                points.ensure_listed()
            except (ProvisioningFailed, Infeasible) as error:
                refused.append(error)
            else:
                usable.append(points)
        for points in sorted(usable, key=len):
            try:
                made = self._make_on(points, plan)
            except (ProvisioningFailed, Infeasible) as error:
                # One that is full, going or not for us to use stops no claim that may go elsewhere.
                refused.append(error)
                continue
            # Of a try on another file system, of which nobody knew the end, something was kept.
            self.known.release(plan.name, but=made.file_system)
            return made
        passing = [error for error in refused if not isinstance(error, Infeasible)]
        raise (passing or refused)[-1]

    def _make_on(self, points: AccessPoints, plan: Plan) -> AccessPoint:
        self._ask_before(points, plan)
        parameters, table = plan.parameters, self.known.gids(points.file_system)
        if not parameters.allocates_gid:
            gid = parameters.gid or 0
            self.known.share_gid(points.file_system, gid)
            return self._create(points, plan, gid=gid)
        low, high = parameters.gid_range
        try:
            with table.reserve(plan.name, minimum=low, maximum=high) as gid:
                return self._create(points, plan, gid=gid)
        except GidsExhausted as error:
            raise ProvisioningFailed(
                f"every group from {low} to {high} is taken on file system {points.file_system}: "
                "delete volumes, or widen gidRangeStart and gidRangeEnd"
            ) from error

    def _ask_before(self, points: AccessPoints, plan: Plan) -> None:
        """What must be known and may be refused, while nothing has been made."""
        file_system = points.file_system
        if plan.parameters.az:
            self.facts.address(file_system, plan.parameters.az)
        if plan.parameters.enforce_zone_affinity:
            self.facts.affinity(file_system)
        if plan.on_delete is not OnDelete.RETAIN:
            self.directories.check(file_system, plan.path)
        self.known.begin(plan.name, file_system, plan.path)
        self.directories.refuse_taken(file_system, plan.path, volume=plan.name)
        if others := points.in_the_way(plan.path, volume=plan.name):
            raise DirectoryTaken(
                f"access points lead to {plan.path} or to one below or above it: "
                f"{', '.join(others[:3])}; delete them, or choose another path"
            )

    def _create(self, points: AccessPoints, plan: Plan, *, gid: int) -> AccessPoint:
        request, parameters = plan.request, plan.parameters
        provisioner = request.storage_class.provisioner
        owner = self.owner()
        wanted = {**tags.parse(self.settings.tags), **tags.parse(parameters.tags)}
        wanted |= owner.tags(plan.name, claim=request.claim, provisioner=provisioner)
        if len(wanted) > tags.MAX_TAGS:
            raise Infeasible(
                f"{len(wanted)} tags, ours, those of --tags and those of the class together: AWS "
                f"takes {tags.MAX_TAGS}"
            )
        try:
            made = self.aws.create_access_point(
                token=owner.token(request.claim.uid, provisioner=provisioner),
                file_system=points.file_system,
                path=plan.path,
                uid=gid if parameters.uid is None else parameters.uid,
                gid=gid,
                permissions=parameters.directory_perms or _PERMISSIONS,
                tags=wanted,
            )
        except TokenUsed as used:
            return self._adopt(used.access_point_id, plan, gid=gid)
        points.add(made)
        return made

    # -- adopting

    def _adopt(self, id: str, plan: Plan, *, gid: int) -> AccessPoint:
        """The access point that an earlier try has made, whatever file system that was on."""
        try:
            found = self.aws.find_access_point(id)
        except ProvisionerError as error:
            raise ProvisioningInBackground(
                f"access point {id} of an earlier try cannot be looked at: {error}"
            ) from error
        if found is None or found.state in _GOING:
            raise ProvisioningFailed(f"access point {id} of an earlier try is being deleted")
        uid = plan.request.claim.uid
        made = self.owner().has_made_for(plan.name, found.tags)
        if not made or found.tags.get(CLAIM_UID) != uid:
            raise Infeasible(
                f"access point {id} has the token of this claim and not its tags: it is not "
                "touched; look at who has changed them"
            )
        if found.file_system not in self.points.file_systems:
            raise ProvisioningInBackground(
                f"access point {id} of an earlier try is on file system {found.file_system}, "
                "which this provisioner does not have any more"
            )
        points = self.points.of(found.file_system)
        if found.path != plan.path or not self._fits(found, plan, gid):
            self._discard(found, plan)
        points.add(found)
        log.info("adopted an access point", access_point=id, volume=plan.name)
        return found

    def _fits(self, found: AccessPoint, plan: Plan, gid: int) -> bool:
        """Whether its group and its directory can be this volume's: another may have got them."""
        if plan.parameters.allocates_gid:
            table = self.known.gids(found.file_system)
            if found.gid is None or not table.take(plan.name, found.gid):
                return False
        elif found.gid != gid:
            return False
        try:
            self.known.begin(plan.name, found.file_system, found.path)
        except DirectoryTaken:
            return False
        return True

    def _discard(self, found: AccessPoint, plan: Plan) -> None:
        """Delete one that no volume has led to, so nobody has mounted it; the next try makes
        another one. Raises always."""
        if self.context.client.find(PersistentVolume, plan.name) is not None:
            raise Unchanged(f"volume {plan.name} is there already")
        log.warning("an access point of an earlier try does not fit", access_point=found.id)
        try:
            self.aws.delete_access_point(found.id)
        except ProvisionerError as error:
            raise ProvisioningInBackground(
                f"access point {found.id} of an earlier try cannot be deleted: {error}"
            ) from error
        self.points.of(found.file_system).forget(found.id)
        raise ProvisioningFailed(
            f"access point {found.id} of an earlier try did not fit and is deleted: another one "
            "is made"
        )
