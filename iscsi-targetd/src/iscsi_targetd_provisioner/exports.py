"""Exports kept as they should be: nodes come and go, and credentials are replaced."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from external_storage import (
    Deadline,
    EventRecorder,
    PersistentVolume,
    ProvisionerError,
    ProvisioningFailed,
    get_logger,
)
from external_storage.kube.errors import KubeError
from external_storage.metrics import Metrics
from iscsi_targetd_provisioner.backend import Access, Export
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
    _applied: AppliedChap = field(default_factory=AppliedChap)
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
        for volume, place in mine:
            try:
                self._reconcile_volume(volume, place, exports.get(volume.name))
            except (ProvisionerError, KubeError) as error:
                failed += 1
                log.warning("an export cannot be mended", volume=volume.name, error=str(error))
                self.events.warning(volume, "ExportFailed", str(error))
        return failed

    def _reconcile_volume(
        self, volume: PersistentVolume, place: Place, export: Export | None
    ) -> None:
        wanted = self._wanted(volume)
        if not wanted:
            # Nobody is less likely to be meant than a cluster whose nodes could not be read.
            raise ProvisioningFailed("no initiator is known for the volume: its export stays")
        chap = self.credentials.of_volume(volume)
        access = _access(volume, wanted, chap)
        name, backend = volume.name, place.server.backend
        present = export.initiators if export is not None else frozenset()
        logged_in = export.logged_in if export is not None else frozenset()
        if export is None or wanted - present or present - wanted - logged_in:
            backend.export(place.pool, name, access, deadline=self._deadline())
            added, removed = sorted(wanted - present), sorted(present - wanted - logged_in)
            log.info("export mended", volume=name, added=added, removed=removed)
        elif chap is not None and not self._applied.is_applied(name, chap):
            backend.set_auth(place.pool, name, access, deadline=self._deadline())
            log.info("CHAP credentials set again", volume=name)
        if chap is not None:
            self._applied.note(name, chap)

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
        portals=tuple(Portal.parse(text) for text in portals),
        iqn=source.iqn.removesuffix(f":{volume.name}".lower()),
        chap=chap,
    )


def _split(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",") if part.strip()]
