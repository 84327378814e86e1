"""Assets that were begun and never published: whether somebody still wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from external_storage.assets import AssetRecord, AssetState
from external_storage.author import Author
from external_storage.kube.client import Client
from external_storage.kube.errors import NotAllowed
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.provisioner import Provisioner

log = get_logger(__name__)


class PublishedAsset(Exception):
    """An asset that was to be undone belongs to a volume that was saved once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedAssets:
    """Discards what a crash, or the deletion of a claim between two tries, has left behind.

    To be asked by the worker that holds the key of the claim: then no call for it is going on.
    """

    provisioner: Provisioner[Any, Any]
    client: Client
    author: Author
    metrics: Metrics
    may_work: Callable[[], bool]
    """False while another replica may be at work in the same back end."""

    def of_claim(self, uid: str) -> AssetRecord | None:
        """The record of what was begun for a claim."""
        records = self.provisioner.records
        return records.unfinished(uid) if records is not None else None

    def discard(self, record: AssetRecord) -> None:
        """Have the asset removed, unless the API server has its claim or a volume of its name."""
        if self.client.find(PersistentVolume, record.name) is not None:
            # Whoever it is for by now: somebody's data is in the asset.
            if self.provisioner.records is not None:
                self.provisioner.records.publish(record.name)
            return
        if self._has_claim(record):
            return
        log.info("discarding an unfinished asset", asset=record.name, claim=record.claim)
        self.author.discard(record)
        self.metrics.discarded.inc()

    def undo(self, volume: PersistentVolume) -> None:
        """Remove an asset whose volume is not saved; never one that has been in use."""
        records = self.provisioner.records
        record = records.get(volume.name) if records is not None else None
        if record is not None and record.state is AssetState.PUBLISHED:
            raise PublishedAsset(f"the asset of {volume.name} has been published: it is kept")
        if not self.may_work():
            raise NotAllowed("another replica may be making this volume")
        self.author.delete(volume)

    def _has_claim(self, record: AssetRecord) -> bool:
        namespace, _, name = record.claim.partition("/")
        if not name:
            # Nobody can say where its claim was.
            return True
        claim = self.client.find(PersistentVolumeClaim, name, namespace=namespace)
        return claim is not None and claim.uid == record.claim_uid
