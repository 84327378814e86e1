"""iSCSI volumes on storage hosts: a volume, its export, its PersistentVolume, and back.

Nothing can be written beside the asset: a finalizer on the claim (``durable_intent``) makes sure
that what was begun is asked about again. Up: volume, export. Down: export, volume. Each step finds
its own work on the host, and a failed try is undone before it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from external_storage import (
    AvailableCapacity,
    Context,
    Deadline,
    Expanded,
    Infeasible,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionedVolume,
    Provisioner,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    ProvisionRequest,
    StorageClass,
    Unchanged,
    get_logger,
)
from external_storage.kube.errors import KubeError
from external_storage.kube.quantity import from_bytes
from external_storage.kube.types import ObjectMeta
from iscsi_targetd_provisioner.backend import Access, Target, Volume, begun
from iscsi_targetd_provisioner.credentials import Credentials
from iscsi_targetd_provisioner.exports import ANN_INITIATORS, FROM_NODES, ExportKeeper
from iscsi_targetd_provisioner.fleet import (
    ANN_POOL,
    ANN_SERVER,
    OLD_INITIATORS,
    OLD_NAME,
    OLD_POOL,
    Fleet,
    Place,
    build_fleet,
)
from iscsi_targetd_provisioner.initiators import ANNOTATION, NodeInitiators
from iscsi_targetd_provisioner.luns import KnownLuns
from iscsi_targetd_provisioner.names import Portal, is_volume_name
from iscsi_targetd_provisioner.observing import Observations
from iscsi_targetd_provisioner.servers import Server
from iscsi_targetd_provisioner.settings import IscsiTargetdParameters, IscsiTargetdSettings
from iscsi_targetd_provisioner.targetd import CHAP_OFF, Targetd

log = get_logger(__name__)

Request = ProvisionRequest[IscsiTargetdParameters]

_NODES_WAIT_S = 30.0
_XFS_MIN = 300 << 20
"""mkfs.xfs makes none that is smaller, since xfsprogs 5.19."""


class IscsiTargetdProvisioner(Provisioner[IscsiTargetdSettings, IscsiTargetdParameters]):
    """Makes iSCSI volumes on storage hosts, over targetd or over SSH."""

    durable_intent = True
    supports_block = True
    access_modes = frozenset({"ReadWriteOnce", "ReadWriteOncePod", "ReadOnlyMany"})

    def __init__(self, settings: IscsiTargetdSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.reconcile_interval_s = settings.reconcile_interval
        self._observations = Observations(context.metrics.registry)
        self._nodes = NodeInitiators(
            context.client, context.events, on_change=context.reconcile_soon
        )
        self._credentials = Credentials(
            client=context.client,
            namespace=context.namespace,
            file=settings.session_chap_credential_file_path,
        )
        self._fleet = Fleet({}, "")
        self._luns = KnownLuns()

    # -- life

    def start(self) -> None:
        self._fleet = build_fleet(self.settings, self._observations, owner=self.context.owner)
        self._luns.default = self._fleet.default
        self.context.watch_volumes(self._luns.changed)
        self._keeper = ExportKeeper(
            fleet=self._fleet,
            nodes=self._nodes,
            credentials=self._credentials,
            events=self.context.events,
            timeout_s=self.settings.timeout,
            withdraw_after_s=self.settings.withdraw_after,
        )
        self._keeper.export_metrics(self.context.metrics)
        self._nodes.start()
        log.info("storage hosts", servers=", ".join(sorted(self._fleet.servers)))

    def stop(self) -> None:
        self._nodes.stop()
        self._fleet.close()

    def trouble(self) -> str | None:
        return self._observations.trouble()

    # -- work

    def provision(self, request: Request) -> ProvisionedVolume:
        name, asked = request.volume_name, request.parameters
        if not is_volume_name(name):
            raise Infeasible(f"{name!r} cannot be the name of an iSCSI volume: see the template")
        try:
            place, access = self._plan(request)
        except Exception as error:
            self._undo_earlier(request, error)
            raise
        volume, target = self._make(place, request, access)
        if access.chap is not None and not place.server.backend.enforces_chap:
            log.warning("CHAP is not enforced", server=place.server.name)
            self.context.events.warning(request.storage_class, "ChapNotEnforced", CHAP_OFF)
        return ProvisionedVolume(
            source={"iscsi": self._source(asked, target, access)},
            capacity=volume.size,
            annotations=_annotations(place, name, access, from_nodes=not asked.initiators),
        )

    def delete(self, volume: PersistentVolume) -> None:
        place = self._fleet.place_of(volume)
        backend = place.server.backend
        backend.unexport(place.pool, volume.name, deadline=self.deadline)
        backend.destroy(place.pool, volume.name, deadline=self.deadline)
        self._keeper.forget(volume.name)

    def expand(self, volume: PersistentVolume, capacity: int) -> Expanded:
        place = self._fleet.place_of(volume)
        name, source = volume.name, volume.spec.iscsi
        grown = place.server.backend.resize(place.pool, name, capacity, deadline=self.deadline)
        reference = volume.spec.claim_ref
        if reference is not None and source is not None:
            meta = ObjectMeta(name=reference.name, namespace=reference.namespace, uid=reference.uid)
            text = (
                "The node-agent of the pod's node grows the device and its file system. Without "
                f"it, on that node: iscsiadm -m node -T {source.iqn} -R, then "
                f"{_grow_command(volume)}"
            )
            self.context.events.normal(PersistentVolumeClaim(metadata=meta), "NodeStep", text)
        return Expanded(grown.size, node_step=True)

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        if self._nodes.wait_known(_NODES_WAIT_S):
            self._keeper.reconcile(volumes)

    def available_capacity(self, storage_class: StorageClass) -> Iterable[AvailableCapacity]:
        asked = IscsiTargetdParameters.from_class(storage_class.parameters)
        free = [pool.free for _, pool in self._fleet.pools(asked, self.deadline)]
        return [AvailableCapacity(capacity=sum(free), maximum_volume_size=max(free, default=0))]

    # -- inside

    def _plan(self, request: Request) -> tuple[Place, Access]:
        """Whatever may be missing on our side, before the host is asked to make anything."""
        name, asked = request.volume_name, request.parameters
        self._check_size(request)
        chap = self._credentials.of_class(asked)
        initiators = frozenset(i.lower() for i in asked.initiators) or self._node_initiators()
        place = self._fleet.choose(name, request.capacity, asked, request.deadline)
        access = Access(
            initiators=initiators,
            portals=_portals(asked, place.server),
            iqn=asked.iqn or place.server.iqn,
            chap=chap,
            avoid=self._luns.of_others(place.server.name, name),
        )
        if not access.iqn:
            raise Infeasible(f"the class has no iqn, and server {place.server.name} neither")
        place.server.backend.check_access(name, access)
        return place, access

    def _check_size(self, request: Request) -> None:
        file_system = request.parameters.fs_type or self.settings.default_fs
        block = request.claim.spec.volume_mode == "Block"
        if file_system == "xfs" and not block and request.capacity < _XFS_MIN:
            raise Infeasible(
                f"xfs cannot be made on {from_bytes(request.capacity)}: ask for "
                f"{from_bytes(_XFS_MIN)}, or give the class another fsType, such as ext4"
            )

    def _undo_earlier(self, request: Request, error: Exception) -> None:
        """This call has made nothing. One before it may have, of which the answer was lost."""
        if isinstance(error, Unchanged):
            # Not an end: what is open stays open.
            return
        name, deadline = request.volume_name, request.deadline
        try:
            found = self._fleet.find(name, request.parameters, deadline)
        except Infeasible:
            # No server at all is meant: none has been asked.
            return
        except ProvisionerError as unknown:
            text = f"{error}; whether an earlier try has left anything is not known: {unknown}"
            raise ProvisioningInBackground(text) from unknown
        for place in found:
            self._undo(place, name, deadline)

    def _node_initiators(self) -> frozenset[str]:
        if not self._nodes.wait_known(min(self.deadline.remaining(), _NODES_WAIT_S)):
            raise Unchanged("the nodes of the cluster are not known yet")
        found = self._nodes.names()
        if not found:
            raise ProvisioningFailed(
                f"the class names no initiators, and no node has the annotation {ANNOTATION}: run "
                "the node-agent, or annotate the nodes"
            )
        return found

    def _make(self, place: Place, request: Request, access: Access) -> tuple[Volume, Target]:
        name, backend, deadline = request.volume_name, place.server.backend, request.deadline
        try:
            volume = backend.create(place.pool, name, request.capacity, deadline=deadline)
            with begun():
                target = backend.export(place.pool, name, access, deadline=deadline)
        except (Unchanged, ProvisioningInBackground):
            raise
        except Exception:
            self._undo(place, name, deadline)
            raise
        self._nodes.note_refused(target.refused)
        if access.chap is not None:
            self._keeper.note_chap(name, access.chap)
        return volume, target

    def _undo(self, place: Place, name: str, deadline: Deadline) -> None:
        """Leave nothing of a failed try, nor of those before it, or say that something is left."""
        backend = place.server.backend
        try:
            if self.context.client.find(PersistentVolume, name) is not None:
                # Saved by an earlier call: the volume may be in use.
                return
            for volume in backend.find(name, deadline):
                backend.unexport(volume.pool, name, deadline=deadline)
                backend.destroy(volume.pool, name, deadline=deadline)
        except (ProvisionerError, KubeError) as error:
            text = f"a failed try cannot be undone yet: {error}"
            log.warning("a failed volume could not be undone", volume=name, error=str(error))
            raise ProvisioningInBackground(text) from error

    def _source(
        self, asked: IscsiTargetdParameters, target: Target, access: Access
    ) -> dict[str, object]:
        first, *more = access.portals
        source: dict[str, object] = {
            "targetPortal": str(first),
            "iqn": target.iqn,
            "lun": target.lun,
            "fsType": asked.fs_type or self.settings.default_fs,
            "readOnly": asked.readonly,
            "chapAuthDiscovery": asked.chap_auth_discovery,
            "chapAuthSession": asked.chap_auth_session,
        }
        if more:
            source["portals"] = [str(portal) for portal in more]
        if asked.iscsi_interface:
            source["iscsiInterface"] = asked.iscsi_interface
        if asked.chap_secret_name:
            secret = self._credentials.secret_of_class(asked)
            source["secretRef"] = {"name": secret.name, "namespace": secret.namespace}
        elif asked.chap_auth_session or asked.chap_auth_discovery:
            name = self.context.name.replace("/", "-")
            source["secretRef"] = {"name": f"{name}-chap-secret"}
        return source


def _portals(asked: IscsiTargetdParameters, server: Server) -> tuple[Portal, ...]:
    texts = (asked.target_portal, *asked.portals) if asked.target_portal else ()
    found = tuple(Portal.parse(text) for text in texts) or server.portals
    if not found:
        raise Infeasible(f"the class has no targetPortal, and server {server.name} no portals")
    return tuple(dict.fromkeys(found))


def _annotations(place: Place, name: str, access: Access, *, from_nodes: bool) -> dict[str, str]:
    initiators = ",".join(sorted(access.initiators))
    notes = {
        ANN_SERVER: place.server.name,
        ANN_POOL: place.pool,
        ANN_INITIATORS: FROM_NODES if from_nodes else initiators,
    }
    if isinstance(place.server.backend, Targetd):
        # With these, the original could take the volume back.
        notes |= {OLD_NAME: name, OLD_POOL: place.pool, OLD_INITIATORS: initiators}
    return notes


def _grow_command(volume: PersistentVolume) -> str:
    source = volume.spec.iscsi
    if volume.spec.volume_mode == "Block" or source is None:
        return "nothing more: a block volume has no file system"
    if source.fs_type == "xfs":
        return "xfs_growfs MOUNTPOINT"
    return "resize2fs DEVICE"
