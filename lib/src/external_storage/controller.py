"""The controller: informers feed keys into queues, and workers take them out.

Keys are level-based: they say which object to look at, never what happened to it. What is decided
and done about a claim is in ``claims`` and ``provisioning``, about a volume in ``volumes``, about a
claim that grew in ``expansion``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from external_storage.author import Author
from external_storage.calls import Calls
from external_storage.capacity import CapacityPublisher
from external_storage.claims import has_intent, index_class, index_uid, requested_provisioner
from external_storage.events import EventRecorder
from external_storage.expansion import ExpansionWork
from external_storage.feed import Feed
from external_storage.informer import Informer
from external_storage.intents import Intents
from external_storage.kube.client import Client
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.own_node import OwnNode
from external_storage.persistent_volume import is_ours
from external_storage.provision_request import RequestBuilder
from external_storage.provisioner import Provisioner, VolumeHandler, works_alone
from external_storage.provisioning import ClaimWork
from external_storage.reconciler import Reconciler
from external_storage.settings import Settings
from external_storage.unfinished import UnfinishedAssets
from external_storage.volume_store import VolumeStore
from external_storage.volumes import VolumeWork, index_claim
from external_storage.workqueue import Backoff, Workers, WorkQueue

log = get_logger(__name__)

# Threads are made as they are needed: this many classes may use their whole share at once.
_BUSY_CLASSES = 64


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
        is_leader: Callable[[], bool] | None = None,
    ) -> None:
        """Does no work and no I/O; ``start`` does.

        With ``is_leader`` it is told by ``lead`` and ``follow`` when to begin and to end.
        """
        self.metrics = metrics or Metrics()
        self._provisioner = provisioner
        self._settings = settings
        self._is_leader = is_leader or (lambda: True)
        self._client = client.guarded(self._may_work) if is_leader is not None else client
        self._events = events
        self._calls = Calls()
        self._stopping = threading.Event()
        self._node = OwnNode(self._client, provisioner)
        self._starter = threading.Thread(target=self._start_workers, name="controller", daemon=True)
        self._build_informers()
        self._build_work()
        self.has_drained = True
        """Whether no work goes on in the background: before ``start`` and after a ``drain``."""
        if is_leader is not None:
            self._pause()
        self._export_gauges()

    def _build_informers(self) -> None:
        names = frozenset(self._settings.names)
        self._claims = Informer(
            self._client,
            PersistentVolumeClaim,
            indexes={"uid": index_uid, "class": index_class},
            # One with our intent is ours to the end, also when its class becomes another's.
            keep=lambda claim: (
                requested_provisioner(claim) in names
                or (self._provisioner.durable_intent and has_intent(claim))
            ),
        )
        self._volumes = Informer(
            self._client,
            PersistentVolume,
            indexes={"claim": index_claim},
            keep=lambda volume: is_ours(volume, names),
        )
        self._classes = Informer(self._client, StorageClass)
        self._informers: tuple[Informer[Any], ...] = (self._claims, self._volumes, self._classes)

    def _build_work(self) -> None:
        self._claim_queue = self._queue("claims")
        self._volume_queue = self._queue("volumes")
        self._expansion_queue = self._queue("expansions")
        self._queues = (self._claim_queue, self._volume_queue, self._expansion_queue)
        self._author = Author(
            provisioner=self._provisioner,
            calls=self._calls,
            events=self._events,
            timeout_s=self._settings.timeout,
        )
        common: dict[str, Any] = {
            "provisioner": self._provisioner,
            "settings": self._settings,
            "client": self._client,
            "author": self._author,
            "claims": self._claims.lister,
            "volumes": self._volumes.lister,
            "events": self._events,
            "metrics": self.metrics,
        }
        self._claim_work = self._build_claim_work(common)
        self._volume_work = VolumeWork(
            queue=self._volume_queue, node_labels=self._node.labels, **common
        )
        self._expansion_work = ExpansionWork(
            queue=self._expansion_queue,
            classes=self._classes.lister,
            is_mine=self._volume_work.is_mine,
            **common,
        )
        self._build_rounds()
        self._feed = self._build_feed()
        threads = _BUSY_CLASSES * self._settings.worker_threads
        self._workers = tuple(
            Workers(queue, work, max_threads=threads, abandon=self._calls.hanging)
            for queue, work in (
                (self._claim_queue, self._claim_work.work),
                (self._volume_queue, self._volume_work.work),
                (self._expansion_queue, self._expansion_work.work),
            )
        )

    def _build_claim_work(self, common: Mapping[str, Any]) -> ClaimWork:
        unfinished = UnfinishedAssets(
            provisioner=self._provisioner,
            client=self._client,
            author=self._author,
            metrics=self.metrics,
            may_work=self._may_work,
        )
        self._store = VolumeStore(
            self._client,
            undo=unfinished.undo,
            on_saved=self._publish,
            is_elsewhere=lambda volume: (
                self._provisioner.owns_assets and not self._provisioner.may_delete(volume)
            ),
        )
        return ClaimWork(
            queue=self._claim_queue,
            classes=self._classes.lister,
            store=self._store,
            requests=RequestBuilder(
                provisioner=self._provisioner,
                settings=self._settings,
                client=self._client,
                events=self._events,
            ),
            unfinished=unfinished,
            intents=Intents(self._client, namespace=self._client.namespace),
            # Of several nodes each has claims of its own: nobody else would take them.
            may_take=lambda: self._provisioner.node_name is not None or self._is_leader(),
            **common,
        )

    def _build_rounds(self) -> None:
        """What is done now and then."""
        self._reconciler = Reconciler(
            self._provisioner,
            self._volumes.lister,
            look_at_claim=lambda uid: self._claim_queue.add(uid, group=None),
            may_work=self._may_work,
        )
        self._capacity = CapacityPublisher(
            provisioner=self._provisioner,
            settings=self._settings,
            client=self._client,
            author=self._author,
            classes=self._classes.lister,
            metrics=self.metrics,
            is_leader=self._is_leader,
            is_mine=self._volume_work.is_mine,
            abandon=self._calls.hanging,
        )
        self._volumes.add_handler(self._capacity.on_volume)
        self._classes.add_handler(self._capacity.on_class)

    def _build_feed(self) -> Feed:
        feed = Feed(
            claims=self._claims.lister,
            volumes=self._volumes.lister,
            claim_work=self._claim_work,
            volume_work=self._volume_work,
            expansion_work=self._expansion_work,
            store=self._store,
            takes_keys=self._may_work,
        )
        self._claims.add_handler(feed.on_claim)
        self._volumes.add_handler(feed.on_volume)
        self._classes.add_handler(feed.on_class)
        return feed

    # -- life

    def start(self) -> None:
        """Start watching; work begins by itself once every informer has synced."""
        if works_alone(self._provisioner):
            self._resume()
        self._calls.start()
        for informer in self._informers:
            informer.start()
        self._starter.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more work and let the work in progress end; calls that hang are not waited for.

        Returns False if some of it did not end within ``timeout_s`` (default: the setting
        ``shutdown_timeout``); its threads are left behind.
        """
        drained = self.drain(timeout_s)
        for informer in self._informers:
            informer.reflector.stop()
        for informer in self._informers:
            informer.stop()
        self._calls.stop()
        return drained

    def drain(self, timeout_s: float | None = None) -> bool:
        """The first half of ``stop``: after it nothing is written any more."""
        limit = self._settings.shutdown_timeout if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        self.has_drained = False
        self._stopping.set()
        if self._starter.ident is not None:
            self._starter.join()
        # All of them first: what one does may be a reason for another to wait.
        for workers in self._workers:
            workers.finish()
        drained = self._reconciler.stop(max(deadline - time.monotonic(), 0.0))
        drained &= self._capacity.stop(max(deadline - time.monotonic(), 0.0))
        for workers in self._workers:
            drained &= workers.stop(max(deadline - time.monotonic(), 0.0))
        self.has_drained = drained and not self._calls.stuck()
        if not drained:
            log.warning("work was still in progress at the end of the shutdown timeout")
        return drained

    def lead(self) -> None:
        """This replica has the lease: work, beginning with what the other one has left."""
        if not works_alone(self._provisioner):
            self._publish_all()
        self._feed.start_afresh()
        self._provisioner.lead()
        self._resume()
        self._feed.replay()
        self._reconciler.soon()
        self._capacity.soon()

    def follow(self) -> None:
        """Another replica has the lease, or may have it: take no new work."""
        if not works_alone(self._provisioner):
            self._pause()

    def reconcile_soon(self) -> None:
        """Have the author's ``reconcile`` called as soon as may be."""
        self._reconciler.soon()

    def watch_volumes(self, handler: VolumeHandler) -> None:
        """Tell ``handler`` of each change of a volume; before ``start`` this is all of them."""
        self._volumes.add_handler(lambda change: handler(change.old, change.new))

    # -- health

    def dead(self) -> str | None:
        """Which informer's thread has ended though it never should, or None."""
        dead = ", ".join(i.kind.RESOURCE for i in self._informers if i.has_ended)
        return f"no longer watching {dead}" if dead else None

    def syncing(self) -> str | None:
        """Which kinds have not been listed since the start, or None."""
        missing = ", ".join(i.kind.RESOURCE for i in self._informers if not i.has_synced)
        return f"waiting for the first list of {missing}" if missing else None

    def disconnected(self) -> str | None:
        """Which kinds cannot be watched at this moment, or None."""
        broken = ", ".join(i.kind.RESOURCE for i in self._informers if not i.reflector.connected)
        return f"cannot watch {broken}" if broken else None

    def paused(self) -> str | None:
        """Why the provisioner takes no work at this moment, or None."""
        return self._provisioner.check()

    def stuck(self) -> str | None:
        """How many calls into the back end hang, or None."""
        count = self._calls.stuck()
        return f"{count} calls hang" if count else None

    # -- inside

    def _queue(self, name: str) -> WorkQueue[str]:
        backoff = Backoff(
            start_s=self._settings.retry_interval_start,
            max_s=self._settings.retry_interval_max,
            jitter=0.1,
        )
        return WorkQueue(name, backoff=backoff, group_limit=self._settings.worker_threads)

    def _may_work(self) -> bool:
        return works_alone(self._provisioner) or self._is_leader()

    def _pause(self) -> None:
        for queue in self._queues:
            queue.pause()

    def _resume(self) -> None:
        for queue in self._queues:
            queue.resume()

    def _start_workers(self) -> None:
        """Before all informers have synced, a claim whose volume is not known looks unserved."""
        for informer in self._informers:
            while not informer.wait_synced(0.2):
                if self._stopping.is_set():
                    return
        if not self._node.read(self._stopping):
            return
        log.info(
            "synced",
            claims=len(self._claims.lister),
            volumes=len(self._volumes.lister),
            classes=len(self._classes.lister),
        )
        if self._may_work():
            self._publish_all()
        for workers in self._workers:
            workers.start()
        self._reconciler.start()
        self._capacity.start()

    def _publish_all(self) -> None:
        """A crash between saving a volume and publishing its record is made good here."""
        if self._provisioner.records is None:
            return
        self._provisioner.records.read_again()
        for volume in self._volumes.lister.all():
            try:
                self._publish(volume.name)
            except Exception:
                log.exception("an asset record cannot be published", volume=volume.name)

    def _export_gauges(self) -> None:
        for queue in self._queues:
            self.metrics.watch_queue(queue)
        for name, help, read in (
            ("paused", "1 while the provisioner takes no work", lambda: bool(self.paused())),
            (
                "unsaved_volumes",
                "Volumes made in the backend and not saved yet",
                self._store.unsaved_count,
            ),
            (
                "open_calls",
                "Claims for which the backend may still be at work",
                self._claim_work.open_calls,
            ),
            (
                "stuck_calls",
                "Calls into the backend that overran their deadline by 30 s",
                self._calls.stuck,
            ),
            ("orphaned_assets", "Published assets without a volume", self._reconciler.orphans),
        ):
            self.metrics.gauge(f"external_storage_{name}", help, read)

    def _publish(self, volume_name: str) -> None:
        if self._provisioner.records is not None:
            self._provisioner.records.publish(volume_name)
