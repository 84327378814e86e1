"""The part of the provisioner that makes access points, upon EFS and without a control plane."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import msgspec

from efs_provisioner.access_point_directories import AccessPointDirectories
from efs_provisioner.access_point_making import AccessPointMaker
from efs_provisioner.access_point_volumes import AccessPointVolumes
from efs_provisioner.access_points import AllAccessPoints
from efs_provisioner.aws import Aws
from efs_provisioner.facts import Facts
from efs_provisioner.known_volumes import KnownVolumes
from efs_provisioner.parameters import EfsParameters
from efs_provisioner.settings import EfsSettings
from efs_provisioner.stored import place_of
from efs_provisioner.tags import Owner
from external_storage import (
    Context,
    PersistentVolume,
    ProvisionedVolume,
    ProvisionRequest,
)
from external_storage.deadline import NEVER
from external_storage.kube.names import INTENT_FINALIZER
from external_storage.metrics import Metrics
from external_storage.testing import builders

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs

Request = ProvisionRequest[EfsParameters]


class Cluster:
    """What the API server would be asked, and told."""

    def __init__(self) -> None:
        self.saved: set[str] = set()
        self.warnings: list[str] = []

    def find(self, _kind: object, name: str) -> str | None:
        return name if name in self.saved else None

    def warning(self, _about: object, _reason: str, text: str) -> None:
        self.warnings.append(text)


@cache
def _aws(_url: str) -> Aws:
    """One for all tests: boto3 takes a third of a second for each client."""
    return Aws("us-east-1")


class Rig:
    """The volumes of one process; another process has the same settings and no memory."""

    def __init__(self, efs: FaultyEfs, *file_systems: str, cluster: str = "one") -> None:
        self.efs = efs
        self.cluster = Cluster()
        self.settings = EfsSettings.from_texts(
            {
                "provisioner_name": builders.PROVISIONER,
                "file_system_id": ",".join(file_systems),
                "aws_region": "us-east-1",
                "tags": "team:storage",
            }
        )
        client = cast(Any, self.cluster)
        aws = _aws(efs.url)
        names = self.settings.names
        owner = Owner(cluster, names)
        self.known = KnownVolumes(
            file_systems=file_systems, place_of=lambda volume: place_of(volume, {})
        )
        self.points = AllAccessPoints(
            aws, file_systems=file_systems, owner=lambda: owner, known=self.known
        )
        self.volumes = AccessPointVolumes(
            AccessPointMaker(
                settings=self.settings,
                context=Context(
                    name=builders.PROVISIONER,
                    namespace="default",
                    client=client,
                    events=client,
                    metrics=Metrics(),
                ),
                aws=aws,
                facts=Facts(aws),
                known=self.known,
                points=self.points,
                owner=lambda: owner,
                directories=AccessPointDirectories({}, {}, keep_archives_s=None),
            )
        )

    def provision(self, request: Request) -> ProvisionedVolume:
        return self.volumes.provision(request)

    def made(self) -> dict[str, Any]:
        """The only access point there is."""
        [found] = self.efs.access_points()
        return found


def request(
    name: str = "data",
    *,
    claim_uid: str | None = None,
    after_restart: bool = False,
    access_modes: tuple[str, ...] = ("ReadWriteMany",),
    **given: Any,
) -> Request:
    """Of a claim; ``after_restart`` with the intent of a process that is gone."""
    claim = builders.claim(name=name, namespace="team", uid=claim_uid)
    spec = msgspec.structs.replace(claim.spec, access_modes=access_modes)
    claim = msgspec.structs.replace(claim, spec=spec)
    if after_restart:
        meta = msgspec.structs.replace(claim.metadata, finalizers=(INTENT_FINALIZER,))
        claim = msgspec.structs.replace(claim, metadata=meta)
    return ProvisionRequest(
        volume_name=f"pvc-{claim.uid}",
        claim=claim,
        storage_class=builders.storage_class(),
        parameters=EfsParameters.from_class({"provisioningMode": "efs-ap", **given}),
        capacity=1 << 30,
        selected_node=None,
        deadline=NEVER,
    )


def saved(name: str, made: ProvisionedVolume) -> PersistentVolume:
    """The volume as the library saves it."""
    fields = {
        "metadata": {"name": name, "annotations": dict(made.annotations)},
        "spec": dict(made.source),
    }
    return msgspec.convert(fields, PersistentVolume)
