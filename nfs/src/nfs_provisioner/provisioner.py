"""Volumes as directories of one file system, each exported by our own NFS server.

The order of steps is what makes a crash harmless. Up: record, directory, export; the record is
published once the PersistentVolume is saved. Down: export, directory into the trash, record. Every
step finds out by itself whether it has been done before.
"""

from __future__ import annotations

from collections.abc import Mapping

from external_storage import (
    AssetRecord,
    AssetRecords,
    AssetState,
    CannotStart,
    Context,
    DamagedRecord,
    Ignored,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisioningFailed,
    ProvisionRequest,
    Records,
    Service,
    get_logger,
)
from nfs_provisioner import file_handles
from nfs_provisioner.directories import RootInUse, VolumeDirectories
from nfs_provisioner.export_details import DetailsError, ExportDetails, details_of
from nfs_provisioner.export_files import PSEUDO_ROOT, Export, ExportFiles, Squash
from nfs_provisioner.export_ids import ExportIds, ExportIdsExhausted
from nfs_provisioner.exportmgr import ExportError, ExportManager
from nfs_provisioner.exports import Exports
from nfs_provisioner.ganesha import Ganesha, GaneshaError
from nfs_provisioner.ganesha_config import GaneshaConfig
from nfs_provisioner.identity import find_identity
from nfs_provisioner.settings import NfsParameters, NfsSettings
from nfs_provisioner.trash import TrashCollector

log = get_logger(__name__)

PROVISIONER_ID = "nfs.external-storage/provisioner-id"
"""Annotation of a volume: the identity of the instance that has its directory."""

_NFS_PORT = 2049
_BUS_TIMEOUT_S = 10.0


class NfsProvisioner(Provisioner[NfsSettings, NfsParameters]):
    """Serves volumes over NFSv4 from directories below one export root."""

    owns_assets = True

    def __init__(self, settings: NfsSettings, context: Context) -> None:
        super().__init__(settings, context)
        state = settings.export_root / ".state"
        config = GaneshaConfig(
            state_dir=state,
            run_dir=settings.run_dir,
            port=settings.nfs_port,
            bind_address=settings.bind_address,
            grace_period_s=settings.grace_period,
            lease_lifetime_s=settings.lease_lifetime,
        )
        self._state_dir = state
        self._directories = VolumeDirectories(settings.export_root, state)
        self._files = ExportFiles(state)
        self._manager = ExportManager(config.bus_address, timeout_s=_BUS_TIMEOUT_S)
        self._ganesha = Ganesha(
            config, before_start=self._files.load, on_restart=self._reconcile_exports
        )
        self._trash = TrashCollector(self._directories)
        self._started = False
        self._damaged = 0
        self._unserved = 0

    # -- life

    def start(self) -> None:
        try:
            self._prepare()
            self._ganesha.start()
        except (GaneshaError, RootInUse, ValueError) as error:
            raise CannotStart(str(error)) from error
        self._started = True
        self._reconcile_exports()
        self._export_metrics()
        self._trash.start()
        log.info("serving", volumes=len(self._ids.used()), identity=self._identity)

    def _prepare(self) -> None:
        """Everything before the server starts. One volume's damage must not keep it from that."""
        self._directories.prepare()
        if problem := file_handles.problem(self.settings.export_root):
            raise CannotStart(problem)
        self._files.prepare()
        self._identity = find_identity(self._state_dir / "identity", self.context, self._server)
        self.records = AssetRecords(self._state_dir / "volumes")
        exports = self._files.load()
        self._ids = ExportIds({export.name: export.export_id for export in exports.values()})
        self._exports = Exports(
            self.settings.export_root, files=self._files, manager=self._manager, ids=self._ids
        )
        for record in self.records.all():
            try:
                self._restore(record, exports)
            except (DetailsError, ValueError, OSError) as error:
                self._damaged += 1
                log.error("volume not served", volume=record.name, error=str(error))

    def _restore(self, record: AssetRecord, exports: Mapping[str, Export]) -> None:
        """Reserve a volume's export id, and write its export file again if that is lost."""
        details = details_of(record)
        if record.name in exports:
            return
        self._ids.claim(record.name, details.export_id)
        if self._directories.exists(record.name):
            export = self._describe(record.name, details)
            self._files.write(export)
            log.warning("export file written again from its record", volume=record.name)

    def stop(self) -> None:
        self._started = False
        self._trash.stop()
        self._ganesha.stop()
        self._manager.close()
        self._directories.release()

    def check(self) -> str | None:
        if not self._started:
            return "the NFS server has not been started"
        return self._ganesha.serving() or self._ganesha.manageable()

    def data_path(self) -> str | None:
        return self._ganesha.serving()

    # -- work

    def provision(self, request: ProvisionRequest[NfsParameters]) -> ProvisionedVolume:
        name, parameters = request.volume_name, request.parameters
        server = self._server()
        try:
            self._make(request)
        except (ExportError, ExportIdsExhausted, OSError) as error:
            self._undo(name)
            raise ProvisioningFailed(f"the volume cannot be exported: {_reason(error)}") from error
        return ProvisionedVolume(
            source={"nfs": {"server": server, "path": _pseudo(name)}},
            mount_options=self._mount_options(),
            gid=parameters.gid,
            annotations={PROVISIONER_ID: self._identity},
        )

    def delete(self, volume: PersistentVolume) -> None:
        self._refuse_foreign(volume)
        self._remove(volume.name)

    def may_delete(self, volume: PersistentVolume) -> bool:
        # One without the annotation is looked at: its admin is told why nothing is removed.
        return volume.metadata.annotations.get(PROVISIONER_ID) in (None, self._identity)

    def discard(self, record: AssetRecord) -> None:
        self._remove(record.name)

    # -- inside

    def _remove(self, name: str) -> None:
        try:
            export_id = self._ids.of(name)
            if export_id is not None:
                self._exports.withdraw(name, export_id)
            if self._directories.trash(name) is not None:
                self._trash.wake()
            self._records().forget(name)
        except (ExportError, OSError) as error:
            raise ProvisioningFailed(f"the volume cannot be removed: {_reason(error)}") from error
        # Last: as long as the record names the id, no other volume may get it.
        self._ids.release(name)

    def _make(self, request: ProvisionRequest[NfsParameters]) -> None:
        name, parameters = request.volume_name, request.parameters
        squash = Squash.ROOT_ID_SQUASH if parameters.root_squash else Squash.NO_ROOT_SQUASH
        details = ExportDetails(self._ids.allocate(name), squash)
        self._record(request, details)
        mode = 0o2777 if parameters.gid is None else 0o2770
        self._directories.create(name, mode=mode, gid=parameters.gid)
        self._exports.publish(self._describe(name, details))

    def _undo(self, name: str) -> None:
        """Take back what a failed try has made; never a directory with something in it."""
        try:
            record = self._records().get(name)
            if record is not None and record.state is AssetState.PUBLISHED:
                return
            export_id = self._ids.of(name)
            if export_id is not None:
                self._exports.withdraw(name, export_id)
            if self._directories.remove_empty(name):
                self._records().forget(name)
                self._ids.release(name)
        except (DamagedRecord, ExportError, OSError) as error:
            # What is left has its record, and the next try of the claim goes on from it.
            log.warning("a failed volume could not be undone", volume=name, error=str(error))

    def _record(self, request: ProvisionRequest[NfsParameters], details: ExportDetails) -> None:
        known = self._records().get(request.volume_name)
        wanted = details.as_json()
        if known is None or known.details != wanted:
            self._records().begin(
                request.volume_name,
                claim=request.claim,
                owner=self._identity,
                details=wanted,
            )

    def _records(self) -> Records:
        if self.records is None:
            raise ProvisioningFailed("the NFS server has not been started")
        return self.records

    def _describe(self, name: str, details: ExportDetails) -> Export:
        return self._exports.describe(name, details.export_id, squash=details.squash)

    def _refuse_foreign(self, volume: PersistentVolume) -> None:
        """Raise unless the volume is really the one whose directory we would remove.

        Everything on a volume can be written by whoever may write volumes: its name alone must not
        move a directory to the trash.
        """
        name, owner = volume.name, volume.metadata.annotations.get(PROVISIONER_ID)
        if owner is None:
            raise ProvisioningFailed(f"no annotation {PROVISIONER_ID}: nothing is removed")
        if owner != self._identity:
            raise Ignored(f"the volume belongs to the instance {owner}")
        path = volume.spec.nfs.path if volume.spec.nfs is not None else "none"
        if path != _pseudo(name):
            raise ProvisioningFailed(
                f"the volume's path {path} is not {_pseudo(name)}: nothing is removed"
            )
        record = self._records().get(name)
        if record is None and self._directories.exists(name):
            raise ProvisioningFailed(f"the directory {name} has no record: nothing is removed")
        if record is not None and record.owner != self._identity:
            raise ProvisioningFailed(
                f"the record of {name} names another owner: nothing is removed"
            )

    def _export_metrics(self) -> None:
        metrics, ganesha = self.context.metrics, self._ganesha
        metrics.counter(
            "nfs_provisioner_ganesha_restarts",
            "How often NFS-Ganesha was started again after it had ended",
            lambda: ganesha.ganesha_restarts,
        )
        metrics.counter(
            "nfs_provisioner_bus_restarts",
            "How often dbus-daemon was started again after it had ended",
            lambda: ganesha.bus_restarts,
        )
        metrics.gauge(
            "nfs_provisioner_exports",
            "Volumes that have an export id",
            lambda: len(self._ids.used()),
        )
        metrics.gauge(
            "nfs_provisioner_exports_failed",
            "Volumes that are not served: damaged record, missing directory, refused export",
            lambda: self._damaged + self._unserved,
        )
        metrics.gauge(
            "nfs_provisioner_trash_entries",
            "Directories of deleted volumes that are not removed yet",
            self._directories.trash_entries,
        )

    def _server(self) -> str:
        if self.settings.server_hostname:
            return self.settings.server_hostname
        context = self.context
        service = context.client.get(
            Service, self.settings.service_name, namespace=context.namespace
        )
        address = service.spec.cluster_ip
        if not address or address == "None":
            raise ProvisioningFailed(
                f"service {context.namespace}/{self.settings.service_name} has no cluster IP: "
                "volumes need an address that stays; use a Service that is not headless"
            )
        return address

    def _mount_options(self) -> tuple[str, ...]:
        if self.settings.service_name or self.settings.nfs_port == _NFS_PORT:
            return ()
        return (f"port={self.settings.nfs_port}",)

    def _reconcile_exports(self) -> None:
        if not self._started:
            return
        try:
            report = self._exports.reconcile()
            self._unserved = len(report.missing) + len(report.failed)
        except ExportError as error:
            # The server has read the files itself: what it serves is right or nearly so.
            log.warning("exports could not be reconciled", error=str(error))


def _pseudo(name: str) -> str:
    return f"{PSEUDO_ROOT}/{name}"


def _reason(error: Exception) -> str:
    """Without paths of ours: users read it in an event."""
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)
