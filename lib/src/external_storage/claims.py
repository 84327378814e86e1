"""Claims: which of them we provision (pure), and doing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from external_storage.decision import PROCEED, Decision, skip
from external_storage.events import EventRecorder
from external_storage.fields import Problems
from external_storage.informer import Lister
from external_storage.kube import quantity
from external_storage.kube.names import (
    ANN_BETA_STORAGE_PROVISIONER,
    ANN_SELECTED_NODE,
    ANN_STORAGE_PROVISIONER,
    BINDING_WAIT,
    MODE_BLOCK,
)
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.logs import Logger, get_logger
from external_storage.metrics import Metrics
from external_storage.outcome import PAUSE_S, log_failure
from external_storage.parameters import Parameters
from external_storage.persistent_volume import UnfitVolume, build_volume, class_name
from external_storage.provisioner import (
    Deadline,
    Ignored,
    Infeasible,
    Provisioner,
    ProvisioningInBackground,
    ProvisionRequest,
    Unchanged,
)
from external_storage.settings import Settings
from external_storage.volume_store import VolumeStore
from external_storage.workqueue import WorkQueue

log = get_logger(__name__)


def requested_provisioner(claim: PersistentVolumeClaim) -> str:
    """The provisioner that the controller manager has asked to serve the claim."""
    annotations = claim.metadata.annotations
    if ANN_STORAGE_PROVISIONER in annotations:
        return annotations[ANN_STORAGE_PROVISIONER]
    return annotations.get(ANN_BETA_STORAGE_PROVISIONER, "")


def selected_node(claim: PersistentVolumeClaim) -> str | None:
    """The node that the scheduler chose for the first pod with the claim."""
    return claim.metadata.annotations.get(ANN_SELECTED_NODE) or None


def volume_name(claim: PersistentVolumeClaim) -> str:
    """The name of the claim's volume to be: unique for ever, as the UID is."""
    return f"pvc-{claim.uid}"


def should_provision(
    claim: PersistentVolumeClaim, storage_class: StorageClass | None, *, provisioner_name: str
) -> Decision:
    """Whether the claim waits for a volume of ours at this moment."""
    if claim.metadata.deletion_timestamp is not None:
        return skip("the claim is being deleted")
    if claim.spec.volume_name:
        return skip("the claim has a volume")
    if requested_provisioner(claim) != provisioner_name:
        return skip("the claim is for another provisioner")
    if storage_class is None:
        return skip("the class does not exist; the claim is woken when it does")
    if storage_class.provisioner != provisioner_name:
        return skip("the class is for another provisioner")
    if storage_class.volume_binding_mode == BINDING_WAIT and selected_node(claim) is None:
        return skip("no node has been selected")
    return PROCEED


def why_refused(claim: PersistentVolumeClaim, *, supports_block: bool) -> str | None:
    """What the claim asks for that no provisioner, or not this one, can give; None if nothing."""
    spec = claim.spec
    if spec.volume_mode == MODE_BLOCK and not supports_block:
        return "volumeMode Block is not supported: use Filesystem"
    if spec.selector is not None:
        return "spec.selector is not supported: a new volume cannot be picked by labels"
    if spec.volume_attributes_class_name:
        return "spec.volumeAttributesClassName is not supported"
    if spec.data_source is not None or spec.data_source_ref is not None:
        return "spec.dataSource and spec.dataSourceRef are not supported"
    return None


def worth_another_try(old: PersistentVolumeClaim, new: PersistentVolumeClaim) -> bool:
    """Whether a change of the claim may make a failed try succeed; other updates may not cut a
    back-off short."""
    return (
        old.spec != new.spec
        or selected_node(old) != selected_node(new)
        or class_name(old) != class_name(new)
        or requested_provisioner(old) != requested_provisioner(new)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimWork:
    """Works one claim: decide, call the author's code, save the volume, settle the outcome."""

    name: str
    provisioner: Provisioner[Any, Any]
    settings: Settings
    queue: WorkQueue[str]
    claims: Lister[PersistentVolumeClaim]
    volumes: Lister[PersistentVolume]
    classes: Lister[StorageClass]
    store: VolumeStore
    events: EventRecorder
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    _told_pause: dict[str, str] = field(default_factory=dict)
    _tried_with: dict[str, str] = field(default_factory=dict)
    """The version of the class that the last try of a claim was made with."""

    def work(self, uid: str) -> None:
        """Called by a worker with the UID of a claim, which may be gone."""
        found = self.claims.by_index("uid", uid)
        claim = found[0] if found else None
        if self.store.has_unsaved(uid):
            self._attempt(uid, claim, lambda: self.store.save_again(uid))
        elif claim is None:
            self._gone(uid)
        else:
            self._look_at(claim)

    def _gone(self, uid: str) -> None:
        self.queue.forget(uid)
        self.store.claim_seen(uid, None)
        self._told_pause.pop(uid, None)
        self._tried_with.pop(uid, None)

    def was_tried_with(self, uid: str, storage_class: StorageClass) -> bool:
        """Whether the last try saw the class as it is: a worker may be faster than the news."""
        return self._tried_with.get(uid) == storage_class.metadata.resource_version

    def _look_at(self, claim: PersistentVolumeClaim) -> None:
        storage_class = self.classes.get(class_name(claim))
        decision = should_provision(claim, storage_class, provisioner_name=self.name)
        if decision.proceed and self._has_volume(claim):
            decision = skip("the volume is there, the binder has not come to it yet")
        if decision.proceed and not self.provisioner.accepts(claim):
            decision = skip("the claim is for another instance")
        if not decision.proceed or storage_class is None:
            log.debug("claim left alone", claim=claim.key, reason=decision.reason)
            self.queue.forget(claim.uid)
            return
        pause = self.provisioner.check()
        if pause is not None:
            if self._told_pause.get(claim.uid) != pause:
                # Once for each reason and not every few seconds: many claims may be waiting.
                self._told_pause[claim.uid] = pause
                self.events.normal(claim, "ProvisioningPaused", f"Waiting: {pause}")
            self.queue.add_after(claim.uid, PAUSE_S)
            return
        self._told_pause.pop(claim.uid, None)
        self._tried_with[claim.uid] = storage_class.metadata.resource_version
        self._attempt(claim.uid, claim, lambda: self._provision(claim, storage_class))

    def _has_volume(self, claim: PersistentVolumeClaim) -> bool:
        return self.store.was_saved(claim.uid) or bool(self.volumes.by_index("claim", claim.uid))

    def _provision(
        self, claim: PersistentVolumeClaim, storage_class: StorageClass
    ) -> PersistentVolume | None:
        """Make the asset, build the PersistentVolume and save it; None: not wanted any more."""
        if not self.store.still_wants_volume(claim):
            return None
        request = self._request(claim, storage_class)
        self.events.normal(claim, "Provisioning", f"{self.name} is making a volume for this claim")
        made = self.provisioner.provision(request)
        try:
            fields = build_volume(request, made)
        except UnfitVolume as error:
            self.store.discard(error.fields)
            raise
        return self.store.save(claim.uid, fields)

    def _request(
        self, claim: PersistentVolumeClaim, storage_class: StorageClass
    ) -> ProvisionRequest[Parameters]:
        refusal = why_refused(claim, supports_block=self.provisioner.supports_block())
        if refusal is not None:
            raise Infeasible(refusal)
        try:
            parameters = self.provisioner.parameters_type.from_class(storage_class.parameters)
        except Problems as error:
            raise Infeasible(f"class {storage_class.name!r}: {error}") from error
        return ProvisionRequest(
            volume_name=volume_name(claim),
            claim=claim,
            storage_class=storage_class,
            parameters=parameters,
            capacity=quantity.to_bytes(claim.spec.resources.requests.get("storage", "0")),
            selected_node=selected_node(claim),
            deadline=Deadline(self.clock() + self.settings.timeout, self.clock),
        )

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
            self._failed(uid, claim, error)
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
        if volume is None:
            return
        fields.info("volume saved", volume=volume.name, seconds=round(seconds, 3))
        if claim is None:
            self._gone(uid)
            return
        labels = (class_name(claim), _source_kind(claim))
        self.metrics.provisioned.labels(*labels).inc()
        self.metrics.provision_seconds.labels(*labels).observe(seconds)
        self.metrics.claim_age_seconds.labels(labels[0]).observe(_age_s(claim))
        self.events.normal(claim, "ProvisioningSucceeded", f"Volume {volume.name} is ready")

    def _failed(self, uid: str, claim: PersistentVolumeClaim | None, error: BaseException) -> None:
        """What each way to fail means for the claim's key, its user and the metrics."""
        fields = self._fields(uid, claim)
        if isinstance(error, Ignored):
            self.queue.forget(uid)
            fields.info("claim ignored", reason=str(error))
            return
        slow = isinstance(error, (Infeasible, UnfitVolume))
        at_least = self.settings.retry_interval_max if slow else 0.0
        delay = self.queue.retry(uid, min_delay_s=at_least)
        log_failure(fields, "provisioning failed", error, retry_in_s=delay)
        if claim is None:
            return
        self.metrics.provision_failed.labels(class_name(claim), _source_kind(claim)).inc()
        text = (str(error) or type(error).__name__).rstrip(".")
        if isinstance(error, (ProvisioningInBackground, Unchanged)):
            self.events.normal(claim, "ProvisioningInProgress", text)
        elif slow:
            advice = "It is tried again when the claim or its class changes, else only slowly."
            self.events.warning(claim, "ProvisioningFailed", f"{text}. {advice}")
        else:
            self.events.warning(claim, "ProvisioningFailed", text)

    def _fields(self, uid: str, claim: PersistentVolumeClaim | None) -> Logger:
        attempt = self.queue.failures(uid) + 1
        if claim is None:
            return log.bind(claim_uid=uid, attempt=attempt)
        return log.bind(claim=claim.key, storage_class=class_name(claim), attempt=attempt)


def _source_kind(claim: PersistentVolumeClaim) -> str:
    return claim.spec.data_source.kind if claim.spec.data_source is not None else ""


def _age_s(claim: PersistentVolumeClaim) -> float:
    created = claim.metadata.creation_timestamp
    if created is None:
        return 0.0
    return max((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds(), 0.0)


def index_uid(claim: PersistentVolumeClaim) -> tuple[str, ...]:
    """Index function: claims by UID, the key of the claim queue."""
    return (claim.uid,)


def index_class(claim: PersistentVolumeClaim) -> tuple[str, ...]:
    """Index function: claims without a volume by class, to be woken when the class changes."""
    return () if claim.spec.volume_name else (class_name(claim),)
