"""The controller: informers feed keys into queues, and workers take them out.

Keys are level-based: they say which object to look at, never what happened to it. What is decided
and done about a claim is in ``claims``, about a volume in ``volumes``.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from external_storage.assets import AssetState
from external_storage.claims import (
    ClaimWork,
    index_class,
    index_uid,
    requested_provisioner,
    worth_another_try,
)
from external_storage.events import EventRecorder
from external_storage.informer import Change, Informer
from external_storage.kube.client import Client
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.persistent_volume import class_name
from external_storage.provisioner import Provisioner
from external_storage.settings import Settings
from external_storage.volume_store import VolumeStore
from external_storage.volumes import VolumeWork, index_claim, is_ours
from external_storage.workqueue import Backoff, Workers, WorkQueue

log = get_logger(__name__)

# Threads are made as they are needed: this many classes may use their whole share at once.
_BUSY_CLASSES = 16


class PublishedAsset(Exception):
    """An asset that was to be undone belongs to a volume that was saved once."""


class ProvisionController:
    """Provisions claims and deletes volumes of one provisioner name, with one ``Provisioner``."""

    def __init__(
        self,
        client: Client,
        provisioner: Provisioner[Any, Any],
        settings: Settings,
        *,
        events: EventRecorder,
        metrics: Metrics | None = None,
    ) -> None:
        """Does no work and no I/O; ``start`` does."""
        self.name = settings.provisioner_name
        self.metrics = metrics or Metrics()
        self._provisioner = provisioner
        self._settings = settings
        self._stopping = threading.Event()
        self._starter = threading.Thread(
            target=self._start_workers, name="controller-start", daemon=True
        )
        self._build_informers(client)
        self._claim_queue = self._queue("claims")
        self._volume_queue = self._queue("volumes")
        self._store = VolumeStore(client, undo=self._undo, on_saved=self._publish)
        self._build_work(client, events)
        threads = _BUSY_CLASSES * settings.worker_threads
        self._workers = (
            Workers(self._claim_queue, self._claim_work.work, max_threads=threads),
            Workers(self._volume_queue, self._volume_work.work, max_threads=threads),
        )
        self._export_gauges()

    def _build_informers(self, client: Client) -> None:
        self._claims = Informer(
            client,
            PersistentVolumeClaim,
            indexes={"uid": index_uid, "class": index_class},
            keep=lambda claim: requested_provisioner(claim) == self.name,
        )
        self._volumes = Informer(
            client,
            PersistentVolume,
            indexes={"claim": index_claim},
            keep=lambda volume: is_ours(volume, self.name),
        )
        self._classes = Informer(client, StorageClass)
        self._informers: tuple[Informer[Any], ...] = (self._claims, self._volumes, self._classes)
        self._claims.add_handler(self._on_claim)
        self._volumes.add_handler(self._on_volume)
        self._classes.add_handler(self._on_class)

    def _build_work(self, client: Client, events: EventRecorder) -> None:
        self._claim_work = ClaimWork(
            name=self.name,
            provisioner=self._provisioner,
            settings=self._settings,
            queue=self._claim_queue,
            claims=self._claims.lister,
            volumes=self._volumes.lister,
            classes=self._classes.lister,
            store=self._store,
            events=events,
            metrics=self.metrics,
        )
        self._volume_work = VolumeWork(
            name=self.name,
            provisioner=self._provisioner,
            client=client,
            queue=self._volume_queue,
            claims=self._claims.lister,
            volumes=self._volumes.lister,
            events=events,
            metrics=self.metrics,
        )

    # -- life

    def start(self) -> None:
        """Start watching; work begins by itself once every informer has synced."""
        for informer in self._informers:
            informer.start()
        self._starter.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more work and let the work in progress end.

        Returns False if some of it did not end within ``timeout_s`` (default: the setting
        ``shutdown_timeout``); its threads are left behind.
        """
        limit = self._settings.shutdown_timeout if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        self._stopping.set()
        if self._starter.ident is not None:
            self._starter.join()
        drained = True
        for workers in self._workers:
            drained &= workers.stop(max(deadline - time.monotonic(), 0.0))
        for informer in self._informers:
            informer.reflector.stop()
        for informer in self._informers:
            informer.stop()
        if not drained:
            log.warning("work was still in progress at the end of the shutdown timeout")
        return drained

    @property
    def has_synced(self) -> bool:
        """Whether every informer has seen the whole cluster once."""
        return all(informer.has_synced for informer in self._informers)

    # -- health

    def dead(self) -> str | None:
        """Which informer's thread has ended though it never should, or None."""
        dead = [i.kind.RESOURCE for i in self._informers if i.has_ended]
        return f"no longer watching {', '.join(dead)}" if dead else None

    def syncing(self) -> str | None:
        """Which kinds have not been listed since the start, or None."""
        missing = [i.kind.RESOURCE for i in self._informers if not i.has_synced]
        return f"waiting for the first list of {', '.join(missing)}" if missing else None

    def disconnected(self) -> str | None:
        """Which kinds cannot be watched at this moment, or None."""
        broken = [i.kind.RESOURCE for i in self._informers if not i.reflector.connected]
        return f"cannot watch {', '.join(broken)}" if broken else None

    def paused(self) -> str | None:
        """Why the provisioner takes no work at this moment, or None."""
        return self._provisioner.check()

    # -- inside

    def _queue(self, name: str) -> WorkQueue[str]:
        backoff = Backoff(
            start_s=self._settings.retry_interval_start,
            max_s=self._settings.retry_interval_max,
            jitter=0.1,
        )
        return WorkQueue(name, backoff=backoff, group_limit=self._settings.worker_threads)

    def _start_workers(self) -> None:
        """Before all informers have synced, a claim whose volume is not known looks unserved."""
        for informer in self._informers:
            while not informer.wait_synced(0.2):
                if self._stopping.is_set():
                    return
        log.info(
            "synced",
            claims=len(self._claims.lister),
            volumes=len(self._volumes.lister),
            classes=len(self._classes.lister),
        )
        self._publish_all()
        for workers in self._workers:
            workers.start()

    def _publish_all(self) -> None:
        """A crash between saving a volume and publishing its record is made good here."""
        for volume in self._volumes.lister.all():
            try:
                self._publish(volume.name)
            except Exception:
                log.exception("an asset record cannot be published", volume=volume.name)

    def _export_gauges(self) -> None:
        for queue in (self._claim_queue, self._volume_queue):
            prefix = f"external_storage_{queue.name}_queue"
            self.metrics.gauge(f"{prefix}_depth", "Keys ready to be worked", queue.__len__)
            self.metrics.gauge(f"{prefix}_waiting", "Keys in a back-off", queue.waiting)
            self.metrics.gauge(f"{prefix}_in_progress", "Keys being worked", queue.working)
            self.metrics.gauge(
                f"{prefix}_oldest_seconds", "Age of the oldest ready key", queue.oldest_age_s
            )
        self.metrics.gauge(
            "external_storage_paused",
            "1 while the provisioner takes no work",
            lambda: self.paused() is not None,
        )
        self.metrics.gauge(
            "external_storage_unsaved_volumes",
            "Volumes made in the backend and not saved yet",
            self._store.unsaved_count,
        )

    def _undo(self, volume: PersistentVolume) -> None:
        """Remove an asset whose volume is not saved; never one that has been in use."""
        records = self._provisioner.records
        record = records.get(volume.name) if records is not None else None
        if record is not None and record.state is AssetState.PUBLISHED:
            raise PublishedAsset(f"the asset of {volume.name} has been published: it is kept")
        self._provisioner.delete(volume)

    def _publish(self, volume_name: str) -> None:
        if self._provisioner.records is not None:
            self._provisioner.records.publish(volume_name)

    # -- what the informers tell; called on their threads, so only keys are queued here

    def _on_claim(self, change: Change[PersistentVolumeClaim]) -> None:
        claim = change.new or change.old
        assert claim is not None
        self._store.claim_seen(claim.uid, change.new)
        group = class_name(claim)
        if change.new is None or claim.metadata.deletion_timestamp is not None:
            # A released volume may have been left alone because this claim still seemed to want it.
            for volume in self._volumes.lister.by_index("claim", claim.uid):
                self._volume_queue.add(volume.name, group=volume.spec.storage_class_name)
            self._claim_queue.add(claim.uid, group=group)
        elif claim.spec.volume_name:
            return
        elif change.old is not None and worth_another_try(change.old, claim):
            self._claim_queue.wake(claim.uid, group=group)
        else:
            self._claim_queue.add(claim.uid, group=group)

    def _on_class(self, change: Change[StorageClass]) -> None:
        if change.new is None:
            return
        for claim in self._claims.lister.by_index("class", change.new.name):
            if not self._claim_work.was_tried_with(claim.uid, change.new):
                self._claim_queue.wake(claim.uid, group=change.new.name)

    def _on_volume(self, change: Change[PersistentVolume]) -> None:
        old, volume = change.old, change.new
        if volume is not None:
            group = volume.spec.storage_class_name
            if old is not None and old.spec != volume.spec:
                self._volume_queue.wake(volume.name, group=group)
            elif self._volume_work.needed(volume):
                self._volume_queue.add(volume.name, group=group)
        elif old is not None:
            self._volume_work.volume_gone(old)
            self._store.volume_gone(old)
            for claim in self._claims_of(old):
                self._claim_queue.add(claim.uid, group=class_name(claim))

    def _claims_of(self, volume: PersistentVolume) -> list[PersistentVolumeClaim]:
        reference = volume.spec.claim_ref
        return self._claims.lister.by_index("uid", reference.uid) if reference else []
