"""Exports kept as they should be: nodes come and go, and credentials are replaced."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from external_storage import (
    Deadline,
    EventRecorder,
    PersistentVolume,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
    get_logger,
)
from external_storage.kube.errors import KubeError
from external_storage.metrics import Metrics
from iscsi_targetd_provisioner.backend import Access, Backend, Export
from iscsi_targetd_provisioner.chap import AppliedChap, Chap
from iscsi_targetd_provisioner.credentials import Credentials
from iscsi_targetd_provisioner.fleet import Fleet, Place
from iscsi_targetd_provisioner.initiators import NodeInitiators
from iscsi_targetd_provisioner.names import Portal

log = get_logger(__name__)

ANN_INITIATORS = "iscsi.external-storage.dev/initiators"
"""On a volume: who may log in, separated by commas, or ``nodes``."""
FROM_NODES = "nodes"

_KEPT_PHASES = ("Available", "Bound")


@dataclass(slots=True, kw_only=True)
class ExportKeeper:
    """Compares what hosts export with what volumes say. One call of ``reconcile`` at a time."""

    fleet: Fleet
    nodes: NodeInitiators
    credentials: Credentials
    events: EventRecorder
    timeout_s: float
    withdraw_after_s: float
    """How long an initiator keeps its access when it is not wanted any more."""
    clock: Callable[[], float] = time.monotonic
    _applied: AppliedChap = field(default_factory=AppliedChap)
    _unwanted: dict[tuple[str, str], float] = field(default_factory=dict)
    """By volume and initiator: since when."""
    _failed: int = 0
    _bad_nodes: int = 0

    def note_chap(self, volume: str, chap: Chap) -> None:
        self._applied.note(volume, chap)

    def forget(self, volume: str) -> None:
        self._applied.forget(volume)

    def export_metrics(self, metrics: Metrics) -> None:
        metrics.gauge(
            "iscsi_targetd_exports_failed",
            "Volumes whose export is not what it should be",
            lambda: self._failed,
        )
        metrics.gauge(
            "iscsi_targetd_bad_initiators",
            "Nodes whose initiator name is malformed or another node's too",
            lambda: self._bad_nodes,
        )

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        """Have every volume exported to those who may have it now."""
        self.credentials.forget()
        names = {volume.name for volume in volumes}
        self._unwanted = {key: at for key, at in self._unwanted.items() if key[0] in names}
        self._bad_nodes = self.nodes.report()
        by_server: defaultdict[str, list[tuple[PersistentVolume, Place]]] = defaultdict(list)
        failed = 0
        for volume in volumes:
            if ANN_INITIATORS not in volume.metadata.annotations or not _is_kept(volume):
                # The original's volumes stay as it has exported them.
                continue
            try:
                place = self.fleet.place_of(volume)
            except ProvisioningFailed as error:
                failed += 1
                log.warning("a volume has no place", volume=volume.name, error=str(error))
            else:
                by_server[place.server.name].append((volume, place))
        for name, mine in by_server.items():
            failed += self._reconcile_server(name, mine)
        self._failed = failed

    def _reconcile_server(self, name: str, mine: list[tuple[PersistentVolume, Place]]) -> int:
        backend = self.fleet.servers[name].backend
        try:
            exports = {export.volume: export for export in backend.exports(self._deadline())}
        except ProvisionerError as error:
            log.warning("exports cannot be compared", server=name, error=str(error))
            return len(mine)
        failed = 0
        for number, (volume, place) in enumerate(mine):
            try:
                self._reconcile_volume(volume, place, exports.get(volume.name))
            except (ProvisionerError, KubeError) as error:
                failed += 1
                log.warning("an export cannot be mended", volume=volume.name, error=str(error))
                if isinstance(error, (Unchanged, ProvisioningInBackground)):
                    # The host is gone: no use in waiting for it once for each of its volumes.
                    return failed + len(mine) - number - 1
                self.events.warning(volume, "ExportFailed", str(error))
        return failed

    def _reconcile_volume(
        self, volume: PersistentVolume, place: Place, export: Export | None
    ) -> None:
        source, name, backend = volume.spec.iscsi, volume.name, place.server.backend
        assert source is not None
        if not backend.may_use(place.pool):
            # Its volumes are in no list: each would look as if it had lost its export.
            text = f"pool {place.pool} is not configured for server {place.server.name}"
            raise ProvisioningFailed(f"{text}: the export stays as it is")
        wanted = self._wanted(volume)
        if not wanted:
            # Nobody is less likely to be meant than a cluster whose nodes could not be read.
            raise ProvisioningFailed("no initiator is known for the volume: its export stays")
        if export is not None and export.target.lun != source.lun:
            text = f"the volume is exported under LUN {export.target.lun}, and says {source.lun}"
            raise ProvisioningFailed(f"{text}: it is left alone")
        chap = self.credentials.of_volume(volume)
        present = export.initiators if export is not None else frozenset()
        gone = self._gone(name, backend, export, wanted)
        access = _access(volume, (wanted | present) - gone, chap)
        if export is None or gone or wanted - present - self.nodes.refused:
            target = backend.export(place.pool, name, access, deadline=self._deadline())
            self.nodes.note_refused(target.refused)
            if (target.iqn, target.lun) != (source.iqn, source.lun):
                text = f"the host has exported it as {target.iqn}, LUN {target.lun}"
                raise ProvisioningFailed(f"{text}, and the volume says another: see to it")
            added = sorted(wanted - present - target.refused)
            log.info("export mended", volume=name, added=added, removed=sorted(gone))
        if chap is not None and not self._applied.is_applied(name, chap):
            kept = backend.set_auth(place.pool, name, access, deadline=self._deadline())
            log.info("CHAP credentials set again", volume=name, later=sorted(kept))
            if not kept:
                self._applied.note(name, chap)

    def _gone(
        self, name: str, backend: Backend, export: Export | None, wanted: frozenset[str]
    ) -> frozenset[str]:
        """Whose access is to end now. A Node object that is deleted and made again, or loses its
        annotation for a moment, must not cost its pods their disks."""
        if export is None or not backend.tells_sessions:
            return frozenset()
        now = self.clock()
        found = set()
        for initiator in export.initiators:
            key = (name, initiator)
            if initiator in wanted or initiator in export.logged_in:
                self._unwanted.pop(key, None)
            elif now - self._unwanted.setdefault(key, now) >= self.withdraw_after_s:
                del self._unwanted[key]
                found.add(initiator)
        return frozenset(found)

    def _wanted(self, volume: PersistentVolume) -> frozenset[str]:
        said = volume.metadata.annotations[ANN_INITIATORS]
        return self.nodes.names() if said == FROM_NODES else frozenset(_split(said))

    def _deadline(self) -> Deadline:
        return Deadline(time.monotonic() + self.timeout_s)


def _is_kept(volume: PersistentVolume) -> bool:
    return volume.status.phase in _KEPT_PHASES and volume.metadata.deletion_timestamp is None


def _access(volume: PersistentVolume, initiators: Iterable[str], chap: Chap | None) -> Access:
    """What the volume says itself: its class may have changed, or be gone."""
    source = volume.spec.iscsi
    assert source is not None
    portals = (source.target_portal, *source.portals)
    return Access(
        initiators=frozenset(initiators),
        lun=source.lun,
        portals=tuple(Portal.parse(text) for text in portals),
        iqn=source.iqn.removesuffix(f":{volume.name}".lower()),
        chap=chap,
    )


def _split(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",") if part.strip()]
