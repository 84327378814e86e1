"""Volumes on record that the watch does not show: gone for good, or only out of its sight.

The watch is of one label. Who takes that off a volume, renames the node or restores a backup makes
a volume vanish that somebody may be writing to.
"""

from __future__ import annotations

from external_storage import PersistentVolume, get_logger
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from local_volume_provisioner.ledger import Ledger, Record, Use
from local_volume_provisioner.names import LABEL_NODE
from local_volume_provisioner.volumes import VolumeApi

log = get_logger(__name__)


class Whereabouts:
    """Asks for each of them by name, once: a UID that is gone does not come again."""

    def __init__(self, client: Client, ledger: Ledger) -> None:
        self._client = client
        self._ledger = ledger
        self._gone: set[str] = set()

    def find(self, record: Record) -> PersistentVolume | None:
        """Its volume as the server has it now; None if it is gone. Raises KubeError."""
        if not record.uid or not record.volume or record.uid in self._gone:
            return None
        found = self._client.find(PersistentVolume, record.volume)
        if found is not None and found.uid == record.uid:
            return found
        self._gone.add(record.uid)
        return None

    def bring_back(
        self, volumes: dict[str, PersistentVolume], api: VolumeApi
    ) -> tuple[list[PersistentVolume], dict[str, str]]:
        """Those of this node, with our label again; and what is to be told of the others, by path.

        Args:
            volumes: those that the watch shows, by path.
            api: of this node.
        """
        back: list[PersistentVolume] = []
        doubts: dict[str, str] = {}
        for record in self._ledger.all():
            if record.path in volumes or record.use is Use.RETIRED:
                continue
            try:
                found = self.find(record)
                if found is None:
                    continue
                if api.is_here(found):
                    back.append(api.adopt(found))
                    log.warning("a volume had lost our label", volume=found.name)
                else:
                    label = found.metadata.labels.get(LABEL_NODE, "none")
                    text = (
                        f"its volume {found.name} is still there, for another node (label {label})"
                    )
                    doubts[record.path] = text
            except KubeError as error:
                text = f"whether its volume {record.volume} is still there cannot be asked: {error}"
                doubts[record.path] = text
        return back, doubts
