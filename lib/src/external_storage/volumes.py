"""Volumes: which of them we delete (pure), and doing it; the finalizer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from external_storage.author import Author
from external_storage.decision import PROCEED, Decision, skip
from external_storage.errors import Ignored, VolumeInUse, meant
from external_storage.events import EventRecorder
from external_storage.informer import Lister
from external_storage.kube.client import Client
from external_storage.kube.errors import Conflict, NotFound
from external_storage.kube.names import (
    FINALIZER,
    PHASE_AVAILABLE,
    PHASE_BOUND,
    PHASE_FAILED,
    PHASE_RELEASED,
    POLICY_DELETE,
)
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.kube.types import (
    NodeSelectorRequirement,
    PersistentVolume,
    PersistentVolumeClaim,
)
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.outcome import LOST_LEASE_S, PAUSE_S, log_failure, lost_lease
from external_storage.persistent_volume import is_ours
from external_storage.provisioner import Provisioner
from external_storage.settings import Settings
from external_storage.workqueue import WorkQueue

log = get_logger(__name__)


def should_delete(
    volume: PersistentVolume, claim: PersistentVolumeClaim | None, *, names: Collection[str]
) -> Decision:
    """Whether the asset of the volume is to be removed; ``claim`` is the one it was made for.

    A volume is Failed when somebody else could not recycle or delete it; its claim is gone then.
    """
    if not is_ours(volume, names):
        return skip("the volume is another provisioner's")
    if volume.status.phase not in (PHASE_RELEASED, PHASE_FAILED):
        return skip("the volume is not released")
    if volume.spec.persistent_volume_reclaim_policy != POLICY_DELETE:
        return skip("the reclaim policy keeps the volume")
    if volume.metadata.deletion_timestamp is not None and not has_finalizer(volume):
        return skip("the volume is being deleted and nothing of ours is left to do")
    if volume.spec.claim_ref is None or not volume.spec.claim_ref.uid:
        # An admin is giving it to somebody else: the phase is only not there yet.
        return skip("the volume is kept for another claim")
    if claim is not None and still_wanted(volume, claim):
        return skip("the volume is marked released while its claim still wants it")
    return PROCEED


def still_wanted(volume: PersistentVolume, claim: PersistentVolumeClaim) -> bool:
    """Whether the very claim that the volume was made for is there and not on its way out."""
    reference = volume.spec.claim_ref
    return (
        reference is not None
        and claim.uid == reference.uid
        and claim.metadata.deletion_timestamp is None
        and claim.spec.volume_name in ("", volume.name)
    )


def has_finalizer(volume: PersistentVolume) -> bool:
    return FINALIZER in volume.metadata.finalizers


def finalizer_change(volume: PersistentVolume) -> bool | None:
    """True: add the finalizer; False: remove it; None: it is as it should be.

    It keeps a volume that is deleted before its claim until the asset is removed. A volume whose
    asset we are not to remove must not be held back by it.
    """
    deletes = volume.spec.persistent_volume_reclaim_policy == POLICY_DELETE
    if has_finalizer(volume):
        return None if deletes and not is_abandoned(volume) else False
    wanted = (
        deletes
        and volume.status.phase == PHASE_BOUND
        and volume.metadata.deletion_timestamp is None
    )
    return True if wanted else None


def is_abandoned(volume: PersistentVolume) -> bool:
    """Whether the volume was deleted while it was free for any claim. Nobody released it, so the
    reclaim policy does not speak of it: the object goes, and the asset stays."""
    return volume.status.phase == PHASE_AVAILABLE and volume.metadata.deletion_timestamp is not None


def serves_node(volume: PersistentVolume, labels: Mapping[str, str], *, name: str = "") -> bool:
    """Whether the node of this name and with these labels is among those that the volume is
    restricted to; False for a volume without restriction."""
    affinity = volume.spec.node_affinity
    if affinity is None or affinity.required is None:
        return False
    fields = {"metadata.name": name}
    return any(
        (term.match_expressions or term.match_fields)
        and all(_matches(wanted, labels) for wanted in term.match_expressions)
        and all(_matches(wanted, fields) for wanted in term.match_fields)
        for term in affinity.required.node_selector_terms
    )


def _matches(wanted: NodeSelectorRequirement, labels: Mapping[str, str]) -> bool:
    value = labels.get(wanted.key)
    match wanted.operator:
        case "In":
            return value in wanted.values
        case "NotIn":
            return value not in wanted.values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeWork:
    """Works one volume: keep its finalizer right, and carry a released one to its end.

    Every step of a deletion may be repeated after a crash.
    """

    provisioner: Provisioner[Any, Any]
    settings: Settings
    client: Client
    author: Author
    queue: WorkQueue[str]
    claims: Lister[PersistentVolumeClaim]
    volumes: Lister[PersistentVolume]
    events: EventRecorder
    metrics: Metrics
    node_labels: Callable[[], Mapping[str, str] | None] = lambda: None
    """The labels of the only node that we serve, if there is one."""
    clock: Callable[[], float] = time.monotonic
    _deleted: set[str] = field(default_factory=set)
    """UIDs of volumes that are gone, though the informer may still show them."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def needed(self, volume: PersistentVolume) -> bool:
        """Whether there is anything to do for the volume in its present state."""
        decision = should_delete(volume, self.claim_of(volume), names=self.settings.names)
        return decision.proceed or finalizer_change(volume) is not None

    def volume_gone(self, volume: PersistentVolume) -> None:
        """The informer shows that the volume is gone: no need to remember it."""
        with self._lock:
            self._deleted.discard(volume.uid)

    def claim_of(self, volume: PersistentVolume) -> PersistentVolumeClaim | None:
        """The claim the volume was made for, if the informer still has it."""
        reference = volume.spec.claim_ref
        found = self.claims.by_index("uid", reference.uid) if reference else []
        return found[0] if found else None

    def work(self, name: str) -> None:
        """Called by a worker with the name of a volume, which may be gone."""
        volume = self.volumes.get(name)
        if volume is None or volume.uid in self._deleted:
            self.queue.forget(name)
            return
        claim = self.claim_of(volume)
        decision = should_delete(volume, claim, names=self.settings.names)
        if not decision.proceed:
            log.debug("volume left alone", volume=name, reason=decision.reason)
            self._attempt(volume, lambda: self._keep_finalizer(volume), deleting=False)
        elif not self.is_mine(volume):
            log.debug("volume left alone", volume=name, reason="it is another instance's")
            self.queue.forget(name)
        elif self.provisioner.check() is not None:
            self.queue.add_after(name, PAUSE_S)
        else:
            self._attempt(volume, lambda: self._delete(volume), deleting=True)

    def is_mine(self, volume: PersistentVolume) -> bool:
        """Whether the volume is this instance's to delete and expand."""
        node = self.node_labels()
        name = self.provisioner.node_name or ""
        if node is not None and not serves_node(volume, node, name=name):
            return False
        return self.provisioner.may_delete(volume)

    def _keep_finalizer(self, volume: PersistentVolume) -> bool:
        change = finalizer_change(volume)
        if change is not None and self.is_mine(volume):
            if is_abandoned(volume):
                text = "Deleted while no claim had it: the data is kept in the back end"
                self.events.warning(volume, "AssetKept", text)
            self._set_finalizer(volume, present=change)
        return False

    def _delete(self, cached: PersistentVolume) -> bool:
        """Remove the asset, then the object, then let go of it; False if it is not to be after all.

        What the watch has shown may be old, and nothing brings removed data back: the volume and
        its claim are read once more from the API server and decided on again.
        """
        volume = self._read_again(cached)
        if volume is None:
            return False
        if self.provisioner.records is not None:
            # It was saved once, also if that could not be written down then: its end is that of a
            # volume, not that of a try.
            self.provisioner.records.publish(volume.name)
        self.author.delete(volume)
        if volume.metadata.deletion_timestamp is None:
            try:
                self.client.delete(PersistentVolume, volume.name, uid=volume.uid)
            except (NotFound, Conflict):
                if self.client.live(volume) is not None:
                    raise
                # Gone, or another volume has its name by now: either way this one is no more.
                self._remember(volume)
                return True
        if has_finalizer(volume):
            self._set_finalizer(volume, present=False)
        self._remember(volume)
        return True

    def _read_again(self, cached: PersistentVolume) -> PersistentVolume | None:
        """The volume as the API server has it now, if it is still to be deleted."""
        volume = self.client.live(cached)
        if volume is None:
            self._remember(cached)
            return None
        claim = self._read_claim(volume)
        decision = should_delete(volume, claim, names=self.settings.names)
        if not decision.proceed:
            log.info("volume kept at a second look", volume=volume.name, reason=decision.reason)
            return None
        return volume

    def _read_claim(self, volume: PersistentVolume) -> PersistentVolumeClaim | None:
        reference = volume.spec.claim_ref
        if reference is None:
            return None
        return self.client.find(
            PersistentVolumeClaim, reference.name, namespace=reference.namespace
        )

    def _set_finalizer(self, volume: PersistentVolume, *, present: bool) -> None:
        """Add or remove our finalizer without touching those of others; a volume that is gone or
        replaced needs neither."""
        key = "finalizers" if present else "$deleteFromPrimitiveList/finalizers"
        # The UID makes it a precondition: Conflict if another object has taken the name.
        patch = {"metadata": {"uid": volume.uid, key: [FINALIZER]}}
        try:
            self.client.patch(PersistentVolume, volume.name, patch, content_type=STRATEGIC_PATCH)
        except (NotFound, Conflict):
            # The API server says 409 of two who write at once, too.
            if self.client.live(volume) is not None:
                raise

    def _remember(self, volume: PersistentVolume) -> None:
        with self._lock:
            self._deleted.add(volume.uid)
            shown = self.volumes.get(volume.name)
            if shown is None or shown.uid != volume.uid:
                # The watch was faster than we: nobody would come to forget it.
                self._deleted.discard(volume.uid)

    def _attempt(
        self, volume: PersistentVolume, call: Callable[[], bool], *, deleting: bool
    ) -> None:
        started = self.clock()
        try:
            deleted = call()
        except (Exception, SystemExit) as error:
            self._failed(volume, meant(error), deleting=deleting)
            return
        self.queue.forget(volume.name)
        if deleted:
            seconds = self.clock() - started
            labels = volume.spec.storage_class_name
            log.info("volume deleted", volume=volume.name, seconds=round(seconds, 3))
            self.metrics.deleted.labels(labels).inc()
            self.metrics.delete_seconds.labels(labels).observe(seconds)

    def _failed(self, volume: PersistentVolume, error: BaseException, *, deleting: bool) -> None:
        """What each way to fail means for the volume's key, its admin and the metrics."""
        fields = log.bind(volume=volume.name, attempt=self.queue.failures(volume.name) + 1)
        if isinstance(error, Ignored):
            self.queue.forget(volume.name)
            fields.info("volume ignored", reason=str(error))
            return
        if lost_lease(error):
            self.queue.add_after(volume.name, LOST_LEASE_S)
            fields.info("volume left to the new leader", reason=str(error))
            return
        in_use = isinstance(error, VolumeInUse)
        given_up = deleting and not in_use and self._is_enough(volume)
        if given_up:
            self.queue.give_up(volume.name)
            delay = float("inf")
        else:
            delay = self.queue.retry(volume.name, counts=not in_use)
        if in_use:
            fields.info("volume in use", reason=str(error))
            self.events.normal(volume, "VolumeInUse", str(error))
            return
        log_failure(fields, "work on a volume failed", error, retry_in_s=delay)
        if deleting:
            self.metrics.delete_failed.labels(volume.spec.storage_class_name).inc()
            text = str(error) or type(error).__name__
            if given_up:
                tries = self.settings.failed_delete_threshold
                text += f". Given up after {tries} tries, until the volume changes"
            self.events.warning(volume, "VolumeFailedDelete", text)

    def _is_enough(self, volume: PersistentVolume) -> bool:
        threshold = self.settings.failed_delete_threshold
        return 0 < threshold <= self.queue.tries(volume.name) + 1


def changed(old: PersistentVolume, new: PersistentVolume) -> bool:
    """Whether a change of the volume may make failed work succeed, or ask for other work."""
    return (
        old.spec != new.spec
        or old.status.phase != new.status.phase
        or (old.metadata.deletion_timestamp is None) != (new.metadata.deletion_timestamp is None)
    )


def index_claim(volume: PersistentVolume) -> tuple[str, ...]:
    """Index function: volumes by the UID of the claim they were made for."""
    return (volume.spec.claim_ref.uid,) if volume.spec.claim_ref is not None else ()
