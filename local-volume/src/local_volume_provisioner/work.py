"""The cleaning of one path, from a worker thread: decided anew on fresh facts, done, told."""

from __future__ import annotations

import time
from collections.abc import Callable

from external_storage import EventRecorder, Lister, PersistentVolume, WorkQueue, get_logger
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.types import KubeObject
from local_volume_provisioner import records
from local_volume_provisioner.cleaning.guard import Refused
from local_volume_provisioner.cleaning.machine import Cleaner, CleaningFailed, Progress, Stopped
from local_volume_provisioner.config import ClassConfig
from local_volume_provisioner.decide import Action, View, decide
from local_volume_provisioner.local_metrics import LocalMetrics
from local_volume_provisioner.reconcile import Reconciler
from local_volume_provisioner.records import Release
from local_volume_provisioner.requests import Request, Requests, Wish
from local_volume_provisioner.scan import Kind
from local_volume_provisioner.views import Failures
from local_volume_provisioner.volumes import delete

log = get_logger(__name__)

_TELL_EVERY_S = 600.0


class CleaningWork:
    """What the workers of the queue call."""

    def __init__(
        self,
        *,
        client: Client,
        events: EventRecorder,
        metrics: LocalMetrics,
        reconciler: Reconciler,
        cleaner: Cleaner,
        volumes: Lister[PersistentVolume],
        failures: Failures,
        requests: Requests,
        queue: WorkQueue[str],
        wake: Callable[[], None],
    ) -> None:
        self._client = client
        self._events = events
        self._metrics = metrics
        self._reconciler = reconciler
        self._cleaner = cleaner
        self._volumes = volumes
        self._failures = failures
        self._requests = requests
        self._queue = queue
        self._wake = wake

    def do(self, path: str) -> None:
        """Clean what is at ``path``, or delete the volume of what has been cleaned."""
        try:
            view = self._look(path)
            if view is not None:
                self._do(view)
        except KubeError as error:
            # Nothing is lost: what has been cleaned is on record, and is not cleaned again.
            log.warning("the API server cannot be asked", path=path, error=str(error))
            self._queue.retry(path)
        except Stopped:
            log.info("cleaning interrupted, to be continued", path=path)
            self._queue.forget(path)
            self._wake()
        else:
            self._wake()

    def _look(self, path: str) -> View | None:
        known = self._at(path)
        live = self._client.live(known) if known is not None else None
        return self._reconciler.look_again(path, live)

    def _at(self, path: str) -> PersistentVolume | None:
        """The volume at a path, as far as it is known."""
        last = self._reconciler.last
        shown = sorted(self._shown(path), key=lambda volume: volume.status.phase != "Bound")
        if shown:
            return shown[0]
        return last.volumes.get(path) if last is not None else None

    def _do(self, view: View) -> None:
        action = decide(view).action
        if action is Action.CLEAN:
            if not self._clean(view):
                return
            # That may have taken hours: somebody may have taken it back into service.
            again = self._look(view.path)
            view, action = (again, decide(again).action) if again is not None else (view, action)
        if view.volume is not None and action is Action.REMOVE:
            self._delete(view.volume)
        self._queue.forget(view.path)

    def _clean(self, view: View) -> bool:
        candidate, config = view.candidate, _config(view)
        assert candidate is not None  # else it would not have been decided to clean it
        about = self._about(view)
        method = "delete files" if candidate.kind is Kind.MOUNT else str(config.method)
        text = f"cleaning {view.path}: {method}"
        if candidate.kind is Kind.DEVICE:
            text += f" ({config.method.leaves})"
        self._events.normal(about, "CleaningStarted", text)
        log.info("cleaning", path=view.path, method=method)
        started = time.monotonic()
        of = Release.of(view.volume, view.cluster)
        try:
            self._cleaner.clean(
                candidate,
                config,
                known=view.record,
                uid=of.uid,
                claim=of.claim,
                cluster=of.cluster,
                wanted=lambda: self._is_wanted(view),
                tell=_Teller(self._events, about, view.path, self._metrics),
            )
        except (CleaningFailed, Refused) as error:
            self._failed(view, str(error), config)
            return False
        self._failures.forget(view.path)
        seconds = time.monotonic() - started
        size = candidate.size
        mode = config.mode.value
        self._metrics.cleaned(mode, size=size, method=method, seconds=seconds)
        self._events.normal(about, "Cleaned", f"{view.path}: {method}, in {seconds:.0f} s")
        log.info("cleaned", path=view.path, method=method, seconds=round(seconds, 1))
        return True

    def _failed(self, view: View, why: str, config: ClassConfig) -> None:
        self._failures.note(view.path, why)
        # An approval is for one try: else what fails would be tried for ever.
        self._requests.remove(Request(Wish.CLEAN, view.path))
        self._metrics.cleaning_failed(config.mode.value)
        wait = self._queue.retry(view.path)
        log.warning("cleaning failed", path=view.path, error=why, retry_s=round(wait))
        self._events.warning(self._about(view), "CleaningFailed", f"{view.path}: {why}")
        self._wake()

    def _delete(self, volume: PersistentVolume) -> None:
        self._metrics.requests.labels("delete").inc()
        started = time.monotonic()
        mode = volume.spec.volume_mode or "Filesystem"
        try:
            delete(self._client, volume)
        except KubeError:
            self._metrics.requests_failed.labels("delete").inc()
            self._metrics.delete_failed.labels(mode, "process").inc()
            raise
        self._metrics.request_seconds.labels("delete").observe(time.monotonic() - started)
        self._metrics.deleted.labels(mode, "process").inc()
        log.info("volume deleted", volume=volume.name)

    def _is_wanted(self, view: View) -> bool:
        """Between two steps: nobody has taken the volume back into service, or put one in its
        place. Deleted by hand it is as dirty as before."""
        shown = self._shown(view.path)
        of = view.volume
        if of is None:
            return not shown
        try:
            # Not shown: deleted, or without our label.
            live = None if shown else self._client.live(of)
        except KubeError:
            return False
        return all(
            now.uid == of.uid
            and now.status.phase == "Released"
            and records.claim_uid(now) == records.claim_uid(of)
            for now in (*shown, *([live] if live is not None else []))
        )

    def _shown(self, path: str) -> list[PersistentVolume]:
        found = self._volumes.all()
        return [v for v in found if v.spec.local is not None and v.spec.local.path == path]

    def _about(self, view: View) -> KubeObject:
        assert self._reconciler.last is not None
        return view.volume or self._reconciler.last.node.node


class _Teller:
    """Counts what is wiped, and has a long wipe heard of."""

    def __init__(
        self, events: EventRecorder, about: KubeObject, path: str, metrics: LocalMetrics
    ) -> None:
        self._events = events
        self._about = about
        self._path = path
        self._metrics = metrics
        self._told = time.monotonic()
        self._done: int | None = None

    def __call__(self, progress: Progress) -> None:
        if self._done is not None:
            self._metrics.bytes_wiped.inc(max(progress.done - self._done, 0))
        self._done = progress.done
        if time.monotonic() - self._told >= _TELL_EVERY_S and progress.total:
            self._told = time.monotonic()
            text = f"{self._path}: {progress.ratio:.0%} done"
            self._events.normal(self._about, "Cleaning", text)


def _config(view: View) -> ClassConfig:
    if view.config is not None:
        return view.config
    assert view.record is not None
    return view.record.saved_class.config()
