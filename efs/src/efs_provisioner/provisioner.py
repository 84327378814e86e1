"""Volumes on Amazon EFS: directories or access points, as their class says.

Both modes have a durable intent on the claim: an access point needs it, for nothing can be written
beside it; for a directory it costs one request more than its record alone, and one process has one
way to begin. The records of directories are there all the same: they say whose directory is whose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import external_storage
from efs_provisioner.access_point_directories import AccessPointDirectories
from efs_provisioner.access_point_making import AccessPointMaker
from efs_provisioner.access_point_volumes import AccessPointVolumes
from efs_provisioner.access_points import AllAccessPoints
from efs_provisioner.aws import Aws
from efs_provisioner.aws_metrics import AwsMetrics
from efs_provisioner.directory_volumes import DirectoryVolumes
from efs_provisioner.facts import Facts
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.known_volumes import KnownVolumes
from efs_provisioner.parameters import EfsParameters
from efs_provisioner.settings import EfsSettings
from efs_provisioner.stored import place_of
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

_FIRST_LOOK_S: Final = 5.0
_SECOND_ROUND_S: Final = 1.0


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
        # What a crash has left is removed by the second round that finds it.
        self.reconcile_interval_s = _SECOND_ROUND_S

    # -- life

    def start(self) -> None:
        settings, context = self.settings, self.context
        metrics = AwsMetrics(context.metrics.registry, access_points=lambda: self._points.counts())
        aws = Aws(settings.aws_region, observe=metrics.observe)
        self._systems = systems = settings.read_file_systems().found(aws.dns_name)
        self._shares = shares_of(
            systems.values(),
            owner=lambda: self._find_owner().of_records(),
            call_limit_s=settings.call_timeout,
        )
        self._build(aws)
        context.watch_volumes(self._known.observe)
        shares = list(self._shares.values())
        if shares:
            self.records = JoinedRecords([share.records for share in shares])
            export_metrics(context.metrics, shares)
        self._is_started = True
        for share in shares:
            share.start()
        for share in shares:
            # Else the first claims would be told to wait for file systems that are fine.
            share.share.wait_looked_at(_FIRST_LOOK_S)
        log.info("serving", file_systems=", ".join(systems), mounted=", ".join(self._shares))

    def _build(self, aws: Aws) -> None:
        settings, systems = self.settings, self._systems
        facts = Facts(aws)
        known = KnownVolumes(
            file_systems=systems, place_of=lambda volume: place_of(volume, systems)
        )
        self._known = known
        self._points = AllAccessPoints(
            aws, file_systems=systems, owner=self._find_owner, known=known
        )
        self._directories = DirectoryVolumes(
            systems,
            self._shares,
            facts=facts,
            known=known,
            points=self._points,
            events=self.context.events,
            keep_archives_s=settings.archive_retention,
        )
        directories = AccessPointDirectories(
            systems, self._shares, keep_archives_s=settings.archive_retention
        )
        self._access_points = AccessPointVolumes(
            AccessPointMaker(
                settings=settings,
                context=self.context,
                aws=aws,
                facts=facts,
                known=known,
                points=self._points,
                owner=self._find_owner,
                directories=directories,
            )
        )

    def stop(self) -> None:
        if self._is_started:
            for share in self._shares.values():
                share.stop()

    def lead(self) -> None:
        self._points.lead()
        self._access_points.lead()

    def trouble(self) -> str | None:
        found = [
            problem
            for share in self._shares.values()
            for problem in (share.problem(), share.trash_problem())
            if problem
        ]
        return "; ".join(found) or None

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
        self.reconcile_interval_s = Provisioner.reconcile_interval_s
        # It is also called at once when we begin to lead: what a claim has just had listed is new.
        self._points.refresh(older_than_s=Provisioner.reconcile_interval_s / 2)
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
