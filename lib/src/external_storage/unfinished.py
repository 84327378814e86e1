"""Assets that were begun and never published: whether somebody still wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from external_storage.assets import AssetRecord
from external_storage.author import Author
from external_storage.kube.client import Client
from external_storage.kube.errors import NotFound
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.provisioner import Provisioner

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedAssets:
    """Discards what a crash, or the deletion of a claim between two tries, has left behind.

    To be asked by the worker that holds the key of the claim: then no call for it is going on.
    """

    provisioner: Provisioner[Any, Any]
    client: Client
    author: Author
    metrics: Metrics

    def of_claim(self, uid: str) -> AssetRecord | None:
        """The record of what was begun for a claim."""
        records = self.provisioner.records
        return records.unfinished(uid) if records is not None else None

    def discard(self, record: AssetRecord) -> None:
        """Have the asset removed, unless the API server has its claim or its volume."""
        if self._is_wanted(record):
            return
        log.info("discarding an unfinished asset", asset=record.name, claim=record.claim)
        self.author.discard(record)
        self.metrics.discarded.inc()

    def _is_wanted(self, record: AssetRecord) -> bool:
        try:
            volume = self.client.get(PersistentVolume, record.name)
        except NotFound:
            pass
        else:
            reference = volume.spec.claim_ref
            if reference is not None and reference.uid == record.claim_uid:
                return True
        namespace, _, name = record.claim.partition("/")
        if not name:
            # Nobody can say where its claim was.
            return True
        try:
            claim = self.client.get(PersistentVolumeClaim, name, namespace=namespace)
        except NotFound:
            return False
        return claim.uid == record.claim_uid
