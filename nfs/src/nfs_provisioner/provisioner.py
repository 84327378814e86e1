"""Volumes as directories of one file system, each exported by our own NFS server.

The order of steps is what makes a crash harmless. Up: record, directory, export; the record is
published once the PersistentVolume is saved. Down: export, directory into the trash, record. Every
step finds out by itself whether it has been done before.
"""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

from external_storage import (
    AssetRecords,
    CannotStart,
    Context,
    Ignored,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisioningFailed,
    ProvisionRequest,
    get_logger,
)
from external_storage.durable import replace_file
from external_storage.kube.types import Service
from nfs_provisioner.directories import VolumeDirectories
from nfs_provisioner.exportmgr import BusUnavailable, Busy, ExportError, ExportManager
from nfs_provisioner.exports import ExportFiles, ExportIds, Exports, Squash
from nfs_provisioner.ganesha import Ganesha, GaneshaError
from nfs_provisioner.ganesha_config import GaneshaConfig
from nfs_provisioner.settings import NfsParameters, NfsSettings

log = get_logger(__name__)

PROVISIONER_ID = "nfs.external-storage/provisioner-id"
"""Annotation of a volume: the identity of the instance that has its directory."""

_NFS_PORT = 2049
_EXPORT_ID = "exportId"
_TRASH_INTERVAL_S = 300.0
_BUS_TIMEOUT_S = 10.0


class NfsProvisioner(Provisioner[NfsSettings, NfsParameters]):
    """Serves volumes over NFSv4 from directories below one export root."""

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
        self._trash = _TrashCollector(self._directories)
        self._started = False

    # -- life

    def start(self) -> None:
        try:
            self._prepare()
        except (GaneshaError, ValueError) as error:
            raise CannotStart(str(error)) from error
        self._started = True
        self._reconcile_exports()
        self._export_metrics()
        self._trash.start()
        log.info("serving", volumes=len(self._ids.used()), identity=self._identity)

    def _prepare(self) -> None:
        """Everything up to a running server; ``ValueError`` for a state that cannot be used."""
        self._directories.prepare()
        self._files.prepare()
        self._identity = _identity(self._state_dir)
        records = AssetRecords(self._state_dir / "volumes")
        self.records = records
        # The files too, in case a record cannot be read: its volume keeps its id all the same.
        used = {export.name: export.export_id for export in self._files.load().values()}
        used |= {record.name: int(record.details[_EXPORT_ID]) for record in records.all()}
        self._ids = ExportIds(used)
        self._exports = Exports(
            self.settings.export_root, files=self._files, manager=self._manager, ids=self._ids
        )
        self._ganesha.start()

    def stop(self) -> None:
        self._started = False
        self._trash.stop()
        self._ganesha.stop()
        self._manager.close()

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
        export_id = self._ids.allocate(name)
        self._record(request, export_id)
        mode = 0o2777 if parameters.gid is None else 0o2770
        self._directories.create(name, mode=mode, gid=parameters.gid)
        squash = Squash.ROOT_ID_SQUASH if parameters.root_squash else Squash.NO_ROOT_SQUASH
        export = self._exports.describe(name, export_id, squash=squash)
        try:
            self._exports.publish(export)
        except ExportError as error:
            # Left as it is: the record says what was begun, and the next try goes on from here.
            raise ProvisioningFailed(f"the volume cannot be exported yet: {error}") from error
        return ProvisionedVolume(
            source={"nfs": {"server": server, "path": export.pseudo}},
            mount_options=self._mount_options(),
            gid=parameters.gid,
            annotations={PROVISIONER_ID: self._identity},
        )

    def delete(self, volume: PersistentVolume) -> None:
        name = volume.name
        self._refuse_foreign(volume)
        assert self.records is not None
        record = self.records.get(name)
        if record is not None:
            try:
                self._exports.withdraw(name, int(record.details[_EXPORT_ID]))
            except (BusUnavailable, Busy) as error:
                raise ProvisioningFailed(f"the export cannot be removed yet: {error}") from error
        if self._directories.trash(name) is not None:
            self._trash.wake()
        self.records.forget(name)
        # Last: as long as the record names the id, no other volume may get it.
        self._ids.release(name)

    # -- inside

    def _record(self, request: ProvisionRequest[NfsParameters], export_id: int) -> None:
        assert self.records is not None
        known = self.records.get(request.volume_name)
        if known is None or known.details.get(_EXPORT_ID) != export_id:
            self.records.begin(
                request.volume_name,
                owner=self._identity,
                claim_uid=request.claim.uid,
                details={_EXPORT_ID: export_id},
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

    def _refuse_foreign(self, volume: PersistentVolume) -> None:
        owner = volume.metadata.annotations.get(PROVISIONER_ID)
        if owner is None:
            raise ProvisioningFailed(
                f"volume {volume.name} has no annotation {PROVISIONER_ID}: nothing is removed"
            )
        if owner != self._identity:
            raise Ignored(f"the volume belongs to the instance {owner}")

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
            self._exports.reconcile()
        except ExportError as error:
            # The server has read the files itself: what it serves is right or nearly so.
            log.warning("exports could not be reconciled", error=str(error))


class _TrashCollector:
    """Empties the trash behind the deletes, so that a big tree does not hold up its delete."""

    def __init__(self, directories: VolumeDirectories) -> None:
        self._directories = directories
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trash", daemon=True)

    def start(self) -> None:
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        self._wanted.set()

    def stop(self) -> None:
        """Does not wait for a big tree: what is left is removed after the next start."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wanted.wait(_TRASH_INTERVAL_S)
            self._wanted.clear()
            if self._stopping.is_set():
                return
            try:
                self._directories.empty_trash()
            except OSError as error:
                log.warning("the trash cannot be emptied", error=str(error))


def _identity(state_dir: Path) -> str:
    """The name of this instance, made once and kept with the data it owns."""
    path = state_dir / "identity"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        identity = str(uuid.uuid4())
        replace_file(path, identity + "\n")
        return identity
