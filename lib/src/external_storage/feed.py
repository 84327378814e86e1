"""From what the informers tell to keys in the queues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from external_storage.claims import worth_another_try
from external_storage.expansion import ExpansionWork
from external_storage.expansion_state import request_changed
from external_storage.informer import Change, Lister
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.persistent_volume import class_name
from external_storage.provisioning import ClaimWork
from external_storage.volume_store import VolumeStore
from external_storage.volumes import VolumeWork, changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Handlers for the informers; they run on the informers' threads, so they only queue keys."""

    claims: Lister[PersistentVolumeClaim]
    volumes: Lister[PersistentVolume]
    claim_work: ClaimWork
    volume_work: VolumeWork
    expansion_work: ExpansionWork
    store: VolumeStore
    takes_keys: Callable[[], bool] = lambda: True
    """False on a standby, whose queues would only grow: what it has let pass, ``replay`` finds."""

    def start_afresh(self) -> None:
        """Forget what became of past tries: another replica may have worked since."""
        self.claim_work.start_afresh()
        self.expansion_work.start_afresh()

    def replay(self) -> None:
        """Have all that is there looked at."""
        for claim in self.claims.all():
            if self.claim_work.needed(claim):
                self.claim_work.queue.wake(claim.uid, group=class_name(claim))
            if self.expansion_work.needed(claim):
                self.expansion_work.queue.wake(claim.uid, group=class_name(claim))
        for volume in self.volumes.all():
            if self.volume_work.needed(volume):
                self.volume_work.queue.wake(volume.name, group=volume.spec.storage_class_name)

    def on_claim(self, change: Change[PersistentVolumeClaim]) -> None:
        claim = change.new or change.old
        assert claim is not None
        self.store.claim_seen(claim.uid, change.new)
        if not self.takes_keys():
            return
        group = class_name(claim)
        if change.new is None or claim.metadata.deletion_timestamp is not None:
            # A released volume may have been left alone because this claim still seemed to want it.
            for volume in self.volumes.by_index("claim", claim.uid):
                self.volume_work.queue.add(volume.name, group=volume.spec.storage_class_name)
        if change.new is None:
            self.claim_work.queue.wake(claim.uid, group=group)
            self.expansion_work.queue.wake(claim.uid, group=group)
            return
        if change.old is not None and request_changed(change.old, claim):
            self.expansion_work.queue.wake(claim.uid, group=group)
        elif self.expansion_work.needed(claim):
            self.expansion_work.queue.add(claim.uid, group=group)
        if not self.claim_work.needed(claim):
            return
        if change.old is not None and worth_another_try(change.old, claim):
            self.claim_work.queue.wake(claim.uid, group=group)
        else:
            self.claim_work.queue.add(claim.uid, group=group)

    def on_class(self, change: Change[StorageClass]) -> None:
        if change.new is None or not self.takes_keys():
            return
        for claim in self.claims.by_index("class", change.new.name):
            if not self.claim_work.was_tried_with(claim.uid, change.new):
                self.claim_work.queue.wake(claim.uid, group=change.new.name)

    def on_volume(self, change: Change[PersistentVolume]) -> None:
        old, volume = change.old, change.new
        if volume is None and old is not None:
            self.volume_work.volume_gone(old)
            self.store.volume_gone(old)
        if not self.takes_keys():
            return
        if volume is not None:
            group = volume.spec.storage_class_name
            if old is not None and changed(old, volume):
                self.volume_work.queue.wake(volume.name, group=group)
            elif self.volume_work.needed(volume):
                self.volume_work.queue.add(volume.name, group=group)
        elif old is not None:
            self.volume_work.queue.wake(old.name, group=old.spec.storage_class_name)
            for claim in self._claims_of(old):
                self.claim_work.queue.add(claim.uid, group=class_name(claim))

    def _claims_of(self, volume: PersistentVolume) -> list[PersistentVolumeClaim]:
        reference = volume.spec.claim_ref
        return self.claims.by_index("uid", reference.uid) if reference else []
