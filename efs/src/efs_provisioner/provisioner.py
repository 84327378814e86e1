"""Volumes on Amazon EFS: directories or access points, as their class says.

Both modes have a durable intent on the claim: an access point needs it, for nothing can be written
beside it; for a directory it costs one request more than its record alone, and one process has one
way to begin. The records of directories are there all the same: they say whose directory is whose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import external_storage
from efs_provisioner.access_point_directories import AccessPointDirectories
from efs_provisioner.access_point_volumes import AccessPointVolumes
from efs_provisioner.aws import Aws
from efs_provisioner.aws_metrics import AwsMetrics
from efs_provisioner.directory_volumes import DirectoryVolumes
from efs_provisioner.facts import Facts
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.known_volumes import KnownVolumes
from efs_provisioner.parameters import EfsParameters
from efs_provisioner.settings import EfsSettings
from efs_provisioner.tags import Owner
from external_storage import (
    AssetRecord,
    Context,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisioningFailed,
    ProvisionRequest,
    get_logger,
)
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.types import KubeObject
from external_storage.shares import JoinedRecords, Share, ShareDirectories, export_metrics

log = get_logger(__name__)


class Namespace(KubeObject, frozen=True):
    """Only its UID is read."""

    API_VERSION = "v1"
    KIND = "Namespace"
    RESOURCE = "namespaces"


class EfsProvisioner(Provisioner[EfsSettings, EfsParameters]):
    """Makes volumes on Amazon EFS: directories, mounted by NFS, or access points."""

    durable_intent = True

    def __init__(self, settings: EfsSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._lock = threading.Lock()
        self._owner: Owner | None = None
        self._is_started = False

    # -- life

    def start(self) -> None:
        settings, context = self.settings, self.context
        metrics = AwsMetrics(
            context.metrics.registry, access_points=lambda: self._access_points.counts()
        )
        aws = Aws(settings.aws_region, observe=metrics.observe)
        systems = settings.read_file_systems().found(aws.dns_name)
        self._shares = shares_of(
            systems.values(),
            owner=lambda: self._find_owner().of_records(),
            call_limit_s=settings.call_timeout,
        )
        facts = Facts(aws)
        self._known = KnownVolumes(
            context.client,
            names=settings.names,
            file_systems=systems,
            file_system_of=lambda volume: self._directories.file_system_of(volume),
        )
        self._directories = DirectoryVolumes(
            systems,
            self._shares,
            facts=facts,
            known=self._known,
            keep_archives_s=settings.archive_retention,
        )
        self._access_points = AccessPointVolumes(
            settings,
            context,
            aws=aws,
            facts=facts,
            known=self._known,
            file_systems=tuple(systems),
            owner=self._find_owner,
            directories=AccessPointDirectories(
                systems, self._shares, keep_archives_s=settings.archive_retention
            ),
        )
        self._start_parts()
        log.info(
            "serving",
            file_systems=", ".join(systems),
            mounted=", ".join(self._shares),
            region=aws.region,
        )

    def _start_parts(self) -> None:
        shares = list(self._shares.values())
        if shares:
            self.records = JoinedRecords([share.records for share in shares])
            export_metrics(self.context.metrics, shares)
        for share in shares:
            share.start()
        self._known.start()
        self._is_started = True

    def stop(self) -> None:
        if not self._is_started:
            return
        self._known.stop()
        for share in self._shares.values():
            share.stop()

    def check(self) -> str | None:
        return self._known.problem() if self._is_started else "it has not been started"

    # -- work

    def provision(self, request: ProvisionRequest[EfsParameters]) -> ProvisionedVolume:
        if request.parameters.is_access_point:
            return self._access_points.provision(request)
        return self._directories.provision(request)

    def delete(self, volume: PersistentVolume) -> None:
        if volume.spec.csi is not None:
            self._access_points.delete(volume)
        else:
            self._directories.delete(volume)

    def discard(self, record: AssetRecord) -> None:
        self._directories.discard(record)

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        self._access_points.refresh()
        for share in self._shares.values():
            if share.problem() is None:
                share.tidy()

    # -- inside

    def _find_owner(self) -> Owner:
        with self._lock:
            if self._owner is None:
                self._owner = owner_of(self.settings, self.context.client)
            return self._owner


def owner_of(settings: EfsSettings, client: Client) -> Owner:
    """Who we are to AWS; ``ProvisioningFailed`` if the cluster cannot be told."""
    cluster = settings.cluster
    if not cluster:
        try:
            cluster = client.get(Namespace, "kube-system").uid
        except KubeError as error:
            raise ProvisioningFailed(
                f"the UID of the namespace kube-system cannot be read: {error}; allow it, or name "
                "the cluster by --cluster"
            ) from error
    return Owner(cluster, settings.names)


def shares_of(
    systems: Iterable[FileSystem],
    *,
    owner: Callable[[], external_storage.Owner],
    call_limit_s: float,
) -> dict[str, ShareDirectories]:
    """Of the file systems that are mounted here, by id; nothing is started."""
    shares = {}
    for system in systems:
        if system.mount_point is None or not system.server:
            log.info("a file system is not mounted: no directories", file_system=system.id)
            continue
        share = Share(
            system.id,
            server=system.server,
            path=system.path,
            mount_point=system.mount_point,
            expected=system.expected(),
            call_limit_s=call_limit_s,
        )
        shares[system.id] = ShareDirectories(share, owner=owner)
    return shares
