"""Expansion: claims of expandable classes whose request grew.

What comes next is decided in ``expansion_state`` from what the claim and its volume say, so that
any replica can go on with what another has begun; here it is done. Each step is a patch that is
refused if the object is not the one that was read: then it is read and decided on again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from external_storage.author import Author
from external_storage.errors import (
    Ignored,
    Infeasible,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
    VolumeInUse,
    meant,
)
from external_storage.events import EventRecorder
from external_storage.expansion_state import (
    Do,
    Status,
    Step,
    claim_patch,
    next_step,
    should_expand,
    sizes_of,
    volume_patch,
    wants_more,
    why_not_begun,
)
from external_storage.informer import Lister
from external_storage.kube import quantity
from external_storage.kube.client import Client
from external_storage.kube.errors import Conflict, NotFound
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.logs import Logger, get_logger
from external_storage.metrics import Metrics
from external_storage.outcome import LOST_LEASE_S, PAUSE_S, log_failure, lost_lease
from external_storage.persistent_volume import class_name
from external_storage.provisioner import Expanded, Provisioner, overrides
from external_storage.settings import Settings
from external_storage.workqueue import WorkQueue

log = get_logger(__name__)

_MAX_STEPS = 25
"""Of one run. Five are usual; conflicts and requests that change on the way add to them."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """One run through the steps: the objects as last read or written, and the author's answers."""

    claim: PersistentVolumeClaim
    volume: PersistentVolume
    started: float
    expanded: Expanded | None = None
    refused: int | None = None
    refusal: Infeasible | None = None
    for_the_node: bool = False
    """Whether it was begun because the kubelet could not do its part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionWork:
    """Works the claims that are Bound and want to be larger."""

    provisioner: Provisioner[Any, Any]
    settings: Settings
    client: Client
    author: Author
    queue: WorkQueue[str]
    claims: Lister[PersistentVolumeClaim]
    volumes: Lister[PersistentVolume]
    classes: Lister[StorageClass]
    events: EventRecorder
    metrics: Metrics
    is_mine: Callable[[PersistentVolume], bool]
    clock: Callable[[], float] = time.monotonic
    _failed_at: dict[str, int] = field(default_factory=dict)
    """By claim UID: the allocated size at which the last call failed, and is known to have ended.
    After a restart, or when another replica has led, that is not known: the call is made again
    before a smaller one."""
    _told: dict[str, str] = field(default_factory=dict)
    """What the user of a claim was told of why it waits: once, and not every few seconds."""

    def needed(self, claim: PersistentVolumeClaim) -> bool:
        """Whether there may be anything to do for the claim in its present state."""
        return wants_more(claim)

    def start_afresh(self) -> None:
        """Another replica may have worked the claims: what was known of their calls may be old."""
        self._failed_at.clear()
        self._told.clear()

    def work(self, uid: str) -> None:
        """Called by a worker with the UID of a claim, which may be gone."""
        found = self.claims.by_index("uid", uid)
        if not found or not wants_more(found[0]):
            self._forget(uid)
            return
        claim = found[0]
        volume = self.volumes.get(claim.spec.volume_name)
        if volume is not None and not self.is_mine(volume):
            log.debug("claim not expanded", claim=claim.key, reason="another instance's volume")
            self.queue.forget(uid)
            return
        try:
            self._look_at(claim)
        except (Exception, SystemExit) as error:
            self._failed(claim, meant(error))

    # -- deciding

    def _look_at(self, cached: PersistentVolumeClaim) -> None:
        """What the watch has shown may be old, and the back end is not to be asked for nothing:
        both objects are read once more before anything is done."""
        run = self._read(cached)
        if run is None:
            self._forget(cached.uid)
        elif not overrides(self.provisioner, "expand"):
            self._cannot(run.claim)
        elif not self._waits(run.claim):
            self._told.pop(cached.uid, None)
            self._carry_out(run)

    def _read(self, claim: PersistentVolumeClaim) -> _Run | None:
        """Claim and volume as the API server has them, if the volume is still to be grown."""
        found = self.client.live(claim)
        if found is None or not wants_more(found):
            return None
        volume = self.client.find(PersistentVolume, found.spec.volume_name)
        if volume is None:
            return None
        decision = should_expand(found, volume, names=self.settings.names)
        if not decision.proceed or not self.is_mine(volume):
            log.debug("claim not expanded", claim=claim.key, reason=decision.reason)
            return None
        return _Run(claim=found, volume=volume, started=self.clock())

    def _cannot(self, claim: PersistentVolumeClaim) -> None:
        name = class_name(claim)
        text = (
            f"{self.settings.provisioner_name} cannot expand volumes: the claim keeps its size. "
            f"Set allowVolumeExpansion to false on class {name}, so that it is not asked to"
        )
        if self._told.get(claim.uid) != text:
            self._told[claim.uid] = text
            self.events.warning(claim, "VolumeResizeFailed", text)
        self.queue.give_up(claim.uid)

    def _waits(self, claim: PersistentVolumeClaim) -> bool:
        """Whether nothing may be done at this moment; the user is told once for each reason."""
        delay_s: float = self.settings.retry_interval_max
        reason = why_not_begun(claim, self.classes.get(class_name(claim)))
        if reason is None:
            delay_s, reason = PAUSE_S, self.provisioner.check()
        if reason is None:
            return False
        if self._told.get(claim.uid) != reason:
            self._told[claim.uid] = reason
            self.events.normal(claim, "ResizingPaused", f"Waiting: {reason}")
        self.queue.add_after(claim.uid, delay_s)
        return True

    def _forget(self, uid: str) -> None:
        self.queue.forget(uid)
        self._failed_at.pop(uid, None)
        self._told.pop(uid, None)

    # -- doing

    def _carry_out(self, run: _Run) -> None:
        for _ in range(_MAX_STEPS):
            step = next_step(
                sizes_of(run.claim, run.volume),
                failed=self._failed_at.get(run.claim.uid),
                refused=run.refused,
                expanded=run.expanded,
            )
            if step.do is Do.NOTHING:
                log.debug("nothing to expand", claim=run.claim.key, reason=step.reason)
                self._ended(run)
                return
            if step.do is Do.ASK:
                self._ask(run, step.size)
                continue
            try:
                self._write(run, step)
            except (Conflict, NotFound):
                if not self._read_again(run):
                    self._forget(run.claim.uid)
                    return
        raise ProvisioningFailed(f"no end after {_MAX_STEPS} steps: who else changes the claim?")

    def _read_again(self, run: _Run) -> bool:
        """What was read has changed, or was changed by a patch whose answer was lost."""
        found = self._read(run.claim)
        if found is not None:
            run.claim, run.volume = found.claim, found.volume
        return found is not None

    def _write(self, run: _Run, step: Step) -> None:
        match step.do:
            case Do.RECORD:
                patch = volume_patch(run.volume, step.size)
                run.volume = self.client.patch(PersistentVolume, run.volume.name, patch)
            case Do.MARK:
                sizes = sizes_of(run.claim, run.volume)
                run.for_the_node |= sizes.status == Status.NODE_INFEASIBLE
                self._change(run, step)
                text = f"Volume {run.volume.name} is being grown to {_text(step.size)}"
                self.events.normal(run.claim, "Resizing", text)
            case Do.REFUSE:
                self._change(run, step)
            case Do.FINISH | Do.AWAIT_NODE:
                self._change(run, step)
                self._succeeded(run, step)

    def _change(self, run: _Run, step: Step) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        run.claim = self.client.patch(
            PersistentVolumeClaim,
            run.claim.name,
            claim_patch(run.claim, step, now=now, message=str(run.refusal or "")),
            namespace=run.claim.namespace,
            subresource="status",
            content_type=STRATEGIC_PATCH,
        )

    def _ask(self, run: _Run, size: int) -> None:
        """Have the asset grown, and note what is known of the call's end if it fails."""
        uid, allocated = run.claim.uid, sizes_of(run.claim, run.volume).allocated
        assert allocated is not None
        try:
            expanded = self.author.expand(run.volume, size)
            if expanded.capacity < size:
                raise ProvisioningFailed(
                    f"expand gave {expanded.capacity} bytes, {size} were asked for"
                )
        except (Exception, SystemExit) as error:
            cause = meant(error)
            if isinstance(cause, ProvisioningInBackground):
                self._failed_at.pop(uid, None)
            elif not isinstance(cause, Unchanged):
                self._failed_at[uid] = allocated
            if not isinstance(cause, Infeasible):
                raise
            run.refused, run.refusal = allocated, cause
        else:
            self._failed_at.pop(uid, None)
            run.expanded = expanded

    # -- outcomes

    def _succeeded(self, run: _Run, step: Step) -> None:
        claim, volume = run.claim, run.volume.name
        seconds = self.clock() - run.started
        size = _text(step.size)
        log.info("volume expanded", claim=claim.key, volume=volume, size=size, then=step.do.value)
        self.metrics.expanded.labels(class_name(claim)).inc()
        self.metrics.expand_seconds.labels(class_name(claim)).observe(seconds)
        if step.do is Do.AWAIT_NODE:
            text = f"Volume {volume} has {size}; the file system is grown on the node"
            self.events.normal(claim, "FileSystemResizeRequired", text)
        else:
            self.events.normal(claim, "VolumeResizeSuccessful", f"Volume {volume} has {size}")

    def _ended(self, run: _Run) -> None:
        if run.refusal is not None:
            raise run.refusal
        if run.for_the_node:
            # The kubelet may try again, and may fail again: not at its speed for ever.
            self.queue.retry(run.claim.uid, min_delay_s=self.settings.retry_interval_max)
        else:
            self.queue.forget(run.claim.uid)

    def _failed(self, claim: PersistentVolumeClaim, error: BaseException) -> None:
        """What each way to fail means for the claim's key, its user and the metrics."""
        fields = self._fields(claim)
        if lost_lease(error):
            self.queue.add_after(claim.uid, LOST_LEASE_S)
            fields.info("expansion left to the new leader", reason=str(error))
            return
        if isinstance(error, Ignored):
            self.queue.give_up(claim.uid)
            fields.info("expansion ignored until the request changes", reason=str(error))
            return
        slow = isinstance(error, Infeasible)
        at_least = self.settings.retry_interval_max if slow else 0.0
        delay = self.queue.retry(claim.uid, min_delay_s=at_least)
        text = (str(error) or type(error).__name__).rstrip(".")
        if isinstance(error, VolumeInUse):
            fields.info("volume in use", reason=text)
            self.events.normal(claim, "VolumeInUse", text)
            return
        log_failure(fields, "expansion failed", error, retry_in_s=delay)
        if isinstance(error, (ProvisioningInBackground, Unchanged)):
            self.events.normal(claim, "Resizing", text)
            return
        self.metrics.expand_failed.labels(class_name(claim)).inc()
        if slow:
            text += ". It is tried again when the claim asks for another size, else only slowly"
        self.events.warning(claim, "VolumeResizeFailed", text)

    def _fields(self, claim: PersistentVolumeClaim) -> Logger:
        attempt = self.queue.failures(claim.uid) + 1
        return log.bind(claim=claim.key, storage_class=class_name(claim), attempt=attempt)


def _text(size: int) -> str:
    return quantity.from_bytes(size)
