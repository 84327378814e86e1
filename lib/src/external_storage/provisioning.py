"""Working a claim: decide, call the author's code, save the volume, settle the outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from external_storage.author import Author
from external_storage.claims import (
    age_s,
    has_intent,
    is_terminating,
    populated_from,
    requested_provisioner,
    selected_node,
    should_provision,
    source_kind,
)
from external_storage.decision import skip
from external_storage.errors import (
    Ignored,
    Infeasible,
    ProvisioningInBackground,
    Reschedule,
    Unchanged,
    meant,
)
from external_storage.events import EventRecorder
from external_storage.informer import Lister
from external_storage.intents import ClaimGone, Intents
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.logs import Logger, get_logger
from external_storage.metrics import Metrics
from external_storage.outcome import LOST_LEASE_S, PAUSE_S, failure_event, log_failure, lost_lease
from external_storage.persistent_volume import UnfitVolume, build_volume, class_name
from external_storage.provision_request import RequestBuilder
from external_storage.provisioner import Provisioner, ProvisionRequest, instance_of
from external_storage.rescheduling import reschedule
from external_storage.settings import Settings
from external_storage.unfinished import UnfinishedAssets
from external_storage.volume_store import VolumeStore
from external_storage.workqueue import WorkQueue

log = get_logger(__name__)

Request = ProvisionRequest[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimWork:
    """Works one claim at a time for each worker that calls ``work``.

    What the last call for a claim left open is kept here until it is known how it ended: it goes
    on, with the very same request, whatever becomes of the claim, its class and the threshold.
    """

    provisioner: Provisioner[Any, Any]
    settings: Settings
    client: Client
    queue: WorkQueue[str]
    claims: Lister[PersistentVolumeClaim]
    volumes: Lister[PersistentVolume]
    classes: Lister[StorageClass]
    store: VolumeStore
    requests: RequestBuilder
    intents: Intents
    author: Author
    unfinished: UnfinishedAssets
    events: EventRecorder
    metrics: Metrics
    may_take: Callable[[], bool] = lambda: True
    """Whether new claims are ours to take, or another replica's."""
    clock: Callable[[], float] = time.monotonic
    _open: dict[str, Request] = field(default_factory=dict)
    """By claim UID: the request of a call whose end is not known."""
    _settled: set[str] = field(default_factory=set)
    """Claims with an intent whose last call is known to have ended, and to have left nothing."""
    _told: dict[str, str] = field(default_factory=dict)
    """What the user of a claim was told of why it waits: once, and not every few seconds."""
    _tried_with: dict[str, str] = field(default_factory=dict)
    """The version of the class that the last try of a claim was made with."""
    _changed: dict[str, str] = field(default_factory=dict)
    """The versions that we have made of claims: older ones, in the informer, are not to be used."""

    def start_afresh(self) -> None:
        """Another replica may have worked since: what was learnt of past tries is void."""
        for memory in (self._told, self._tried_with):
            memory.clear()
        self._settled.clear()

    # -- what others ask

    def needed(self, claim: PersistentVolumeClaim) -> bool:
        """Whether there may be anything to do for the claim in its present state."""
        return not claim.spec.volume_name or has_intent(claim)

    def was_tried_with(self, uid: str, storage_class: StorageClass) -> bool:
        """Whether the last try saw the class as it is: a worker may be faster than the news."""
        return self._tried_with.get(uid) == storage_class.metadata.resource_version

    def open_calls(self) -> int:
        """How many claims have a call whose end is not known."""
        return len(self._open)

    # -- one claim

    def work(self, uid: str) -> None:
        """Called by a worker with the UID of a claim, which may be gone."""
        found = self.claims.by_index("uid", uid)
        claim = found[0] if found else None
        if self.store.has_unsaved(uid):
            self._attempt(uid, claim, lambda: self._saved(self.store.save_again(uid), claim))
        elif uid in self._open:
            self._go_on(uid, claim)
        elif claim is None:
            self._gone(uid)
        elif self._is_unresolved(claim):
            self._attempt(uid, claim, lambda: self._resolve_intent(claim))
        elif self._needs_no_intent(claim):
            self._attempt(uid, claim, lambda: self._end_intent(claim))
        else:
            self._look_at(claim)

    def _look_at(self, claim: PersistentVolumeClaim) -> None:
        storage_class = self.classes.get(class_name(claim))
        decision = should_provision(
            claim,
            storage_class,
            names=self.settings.names,
            node_name=self.provisioner.node_name,
        )
        if decision.proceed and self._has_volume(claim):
            decision = skip("the volume is there, the binder has not come to it yet")
        if decision.proceed and claim.metadata.is_older_than(self._changed.get(claim.uid, "")):
            decision = skip("the claim has been changed by us, the watch has not come to it yet")
        if decision.proceed and not self.may_take():
            decision = skip("another replica takes new claims")
        if decision.proceed and not self.provisioner.accepts(claim):
            decision = skip("the claim is for another instance")
        if decision.proceed and (kind := populated_from(claim)) is not None:
            self._tell(claim, "LeftToPopulator", f"Left to a populator of volumes from {kind}")
            decision = skip("the volume is a populator's to fill")
        if not decision.proceed or storage_class is None:
            log.debug("claim left alone", claim=claim.key, reason=decision.reason)
            self.queue.forget(claim.uid)
        elif self._may_work(claim):
            self._tried_with[claim.uid] = storage_class.metadata.resource_version
            self._attempt(claim.uid, claim, lambda: self._provision(claim, storage_class))

    def _may_work(self, claim: PersistentVolumeClaim) -> bool:
        pause = self.provisioner.check()
        if pause is None:
            self._told.pop(claim.uid, None)
            return True
        self._tell(claim, "ProvisioningPaused", f"Waiting: {pause}")
        self.queue.add_after(claim.uid, PAUSE_S)
        return False

    def _tell(self, claim: PersistentVolumeClaim, reason: str, text: str) -> None:
        if self._told.get(claim.uid) != text:
            self._told[claim.uid] = text
            self.events.normal(claim, reason, text)

    def _has_volume(self, claim: PersistentVolumeClaim) -> bool:
        return self.store.was_saved(claim.uid) or bool(self.volumes.by_index("claim", claim.uid))

    def _gone(self, uid: str) -> None:
        """The claim is gone, and nothing that was begun for it is open."""
        record = self.unfinished.of_claim(uid)
        if record is None:
            self._forget(uid)
        elif self.provisioner.check() is not None:
            self.queue.add_after(uid, PAUSE_S)
        else:
            self._attempt(uid, None, lambda: self.unfinished.discard(record))

    def _forget(self, uid: str) -> None:
        self.queue.forget(uid)
        self.store.claim_seen(uid, None)
        self._settled.discard(uid)
        for memory in (self._told, self._tried_with, self._changed):
            memory.pop(uid, None)

    # -- provisioning

    def _provision(
        self, claim: PersistentVolumeClaim, storage_class: StorageClass
    ) -> PersistentVolume | None:
        """Make the asset, build the PersistentVolume and save it; None: not wanted any more."""
        if not self.store.still_wants_volume(claim):
            return None
        request = self.requests.build(claim, storage_class)
        if self.provisioner.durable_intent:
            try:
                claim = self.intents.begin(request, owner=instance_of(self.provisioner))
            except ClaimGone as error:
                log.info("claim is gone before anything was begun", reason=str(error))
                return None
            self._settled.discard(claim.uid)
        name = storage_class.provisioner
        self.events.normal(claim, "Provisioning", f"{name} is making a volume for this claim")
        return self._call(request, claim)

    def _call(self, request: Request, claim: PersistentVolumeClaim | None) -> PersistentVolume:
        """Call the author's code and save what it made."""
        uid = request.claim.uid
        try:
            made = self.author.provision(request)
        except (Exception, SystemExit) as error:
            cause = meant(error)
            if isinstance(cause, ProvisioningInBackground):
                self._open[uid] = request
            elif not (isinstance(cause, Unchanged) and uid in self._open):
                self._settle(uid)
            raise
        self._settle(uid)
        try:
            fields = build_volume(request, made)
        except UnfitVolume as error:
            self.store.discard(error.fields)
            raise
        # From here on the store keeps it, until it is saved or undone.
        return self._saved(self.store.save(uid, fields), claim or request.claim)

    def _go_on(self, uid: str, claim: PersistentVolumeClaim | None) -> None:
        """Ask again how a call ended, with the request that it was made with."""
        request = self._open[uid]
        if self.provisioner.check() is not None:
            self.queue.add_after(uid, PAUSE_S)
        else:
            self._attempt(uid, claim, lambda: self._call(request, claim))

    def _settle(self, uid: str) -> None:
        self._open.pop(uid, None)
        if self.provisioner.durable_intent:
            self._settled.add(uid)

    def _saved(
        self, volume: PersistentVolume, claim: PersistentVolumeClaim | None
    ) -> PersistentVolume:
        if claim is not None and self.provisioner.durable_intent:
            try:
                self.intents.end(claim)
            except KubeError as error:
                log.warning("an intent cannot be ended yet", claim=claim.key, error=str(error))
                self.queue.add_after(claim.uid, PAUSE_S)
        return volume

    # -- intents

    def _is_unresolved(self, claim: PersistentVolumeClaim) -> bool:
        """Whether a call was begun for the claim of which nobody here knows how it ended."""
        unknown = claim.uid not in self._settled
        return unknown and has_intent(claim) and self.provisioner.durable_intent

    def _needs_no_intent(self, claim: PersistentVolumeClaim) -> bool:
        """Whether ours can be ended; those of other provisioners are never settled here."""
        if not has_intent(claim) or claim.uid not in self._settled:
            return False
        # Bound says enough: its volume may be seen later than that, and brings nobody here again.
        is_bound = bool(claim.spec.volume_name)
        return is_bound or is_terminating(claim) or self._has_volume(claim)

    def _resolve_intent(self, claim: PersistentVolumeClaim) -> PersistentVolume | None:
        """After a restart: make the same call again, to learn how it ended."""
        intent = self.intents.read(claim)
        if intent is None:
            return self._without_note(claim)
        foreign = intent.storage_class.provisioner not in self.settings.names
        if foreign or intent.owner != instance_of(self.provisioner):
            log.debug("intent left alone", claim=claim.key, owner=intent.owner)
            return None
        if self._has_volume(claim):
            self._end_intent(claim)
            return None
        if not self._may_work(claim):
            return None
        self._open[claim.uid] = request = self.requests.again(claim, intent)
        return self._call(request, claim)

    def _without_note(self, claim: PersistentVolumeClaim) -> PersistentVolume | None:
        """Our finalizer without a note of ours: its user has changed it, or the key is lost. The
        claim is served as if nothing had been begun, by its class as it is."""
        if requested_provisioner(claim) not in self.settings.names:
            # The finalizer is the same for all provisioners that are built on this library.
            return None
        storage_class = self.classes.get(class_name(claim))
        if not is_terminating(claim):
            self._settled.add(claim.uid)
            self.queue.add_after(claim.uid, 0.0)
        elif self._has_volume(claim):
            self._end_intent(claim)
        elif storage_class is None or storage_class.provisioner not in self.settings.names:
            text = "What was begun for it is unknown: look in the back end, then drop the finalizer"
            self._tell(claim, "ProvisioningUnknown", text)
            self.queue.add_after(claim.uid, self.settings.retry_interval_max)
        elif self._may_work(claim):
            return self._call(self.requests.build(claim, storage_class), claim)
        return None

    def _end_intent(self, claim: PersistentVolumeClaim) -> None:
        self.intents.end(claim)
        # The informer may go on showing the intent for a moment: it must not be resolved again.
        self._settled.add(claim.uid)

    # -- outcomes

    def _attempt(
        self,
        uid: str,
        claim: PersistentVolumeClaim | None,
        call: Callable[[], PersistentVolume | None],
    ) -> None:
        started = self.clock()
        try:
            volume = call()
        except (Exception, SystemExit) as error:
            self._failed(uid, claim, meant(error))
        else:
            self._succeeded(uid, claim, volume, seconds=self.clock() - started)

    def _succeeded(
        self,
        uid: str,
        claim: PersistentVolumeClaim | None,
        volume: PersistentVolume | None,
        *,
        seconds: float,
    ) -> None:
        fields = self._fields(uid, claim)
        self.queue.forget(uid)
        if claim is None:
            self._forget(uid)
        if volume is None:
            return
        fields.info("volume saved", volume=volume.name, seconds=round(seconds, 3))
        if claim is None:
            return
        labels = (class_name(claim), source_kind(claim))
        self.metrics.provisioned.labels(*labels).inc()
        self.metrics.provision_seconds.labels(*labels).observe(seconds)
        self.metrics.claim_age_seconds.labels(labels[0]).observe(age_s(claim))
        self.events.normal(claim, "ProvisioningSucceeded", f"Volume {volume.name} is ready")

    def _failed(self, uid: str, claim: PersistentVolumeClaim | None, error: BaseException) -> None:
        """What each way to fail means for the claim's key, its user and the metrics."""
        fields = self._fields(uid, claim)
        if isinstance(error, Ignored):
            self.queue.forget(uid)
            fields.info("claim ignored", reason=str(error))
            return
        if lost_lease(error):
            self.queue.add_after(uid, LOST_LEASE_S)
            fields.info("claim left to the new leader", reason=str(error))
            return
        rescheduled = False
        if claim is not None and isinstance(error, Reschedule) and selected_node(claim):
            error, version = reschedule(self.client, claim, error)
            rescheduled = version is not None
            self._changed[uid] = version or ""
        slow = isinstance(error, (Infeasible, UnfitVolume))
        given_up = not rescheduled and self._is_enough(uid)
        if rescheduled:
            # The scheduler's answer is a change of the claim: it brings the key back.
            self.queue.forget(uid)
            delay = 0.0
        elif given_up:
            self.queue.give_up(uid)
            delay = float("inf")
        else:
            at_least = self.settings.retry_interval_max if slow else 0.0
            delay = self.queue.retry(uid, min_delay_s=at_least, counts=not self._goes_on(uid))
        log_failure(fields, "provisioning failed", error, retry_in_s=delay)
        if claim is not None:
            labels = (class_name(claim), source_kind(claim))
            self.metrics.provision_failed.labels(*labels).inc()
            tries = self.settings.failed_provision_threshold if given_up else 0
            kind, reason, text = failure_event(error, slow=slow, given_up_after=tries)
            self.events.record(claim, kind, reason=reason, message=text)

    def _is_enough(self, uid: str) -> bool:
        """Whether the threshold ends the tries; never while something may be left behind."""
        threshold = self.settings.failed_provision_threshold
        return 0 < threshold <= self.queue.tries(uid) + 1 and not self._goes_on(uid)

    def _goes_on(self, uid: str) -> bool:
        """Whether what was begun for the claim is not at its end, one way or the other."""
        return uid in self._open or self.store.has_unsaved(uid)

    def _fields(self, uid: str, claim: PersistentVolumeClaim | None) -> Logger:
        attempt = self.queue.failures(uid) + 1
        if claim is None:
            return log.bind(claim_uid=uid, attempt=attempt)
        return log.bind(claim=claim.key, storage_class=class_name(claim), attempt=attempt)
