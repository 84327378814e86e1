"""Volumes for what has none: written down first, created several at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from external_storage import Lister, PersistentVolume, StorageClass, get_logger
from external_storage.kube.errors import KubeError, ServerError, StatusError
from local_volume_provisioner import records
from local_volume_provisioner.cleaning import guard
from local_volume_provisioner.decide import Action, Decision, View
from local_volume_provisioner.ledger import Ledger, Record, Use
from local_volume_provisioner.local_metrics import LocalMetrics
from local_volume_provisioner.scan import Candidate, Kind
from local_volume_provisioner.states import State
from local_volume_provisioner.volumes import Made, NameTaken, VolumeApi

log = get_logger(__name__)

_AT_ONCE = 8
_TOGETHER = 32
"""Written down in one go: so many are in doubt after a kill between that and their volumes."""
_SEEN_AFTER_S = 60.0
"""By then the watch has shown a new volume, or it is gone again."""
_POLICIES = ("Delete", "Retain")


class Offers:
    """Creates volumes, and remembers them until the watch shows them."""

    def __init__(
        self,
        ledger: Ledger,
        classes: Lister[StorageClass],
        metrics: LocalMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._classes = classes
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._created: dict[str, tuple[PersistentVolume, float]] = {}

    def seen(self, volume: PersistentVolume) -> None:
        """The watch has told something of this volume."""
        with self._lock:
            self._created.pop(volume.uid, None)

    def remember(self, volumes: Iterable[PersistentVolume]) -> None:
        """They are there, whatever the watch shows at first."""
        with self._lock:
            until = self._clock() + _SEEN_AFTER_S
            self._created |= {volume.uid: (volume, until) for volume in volumes}

    def not_seen_yet(self) -> list[PersistentVolume]:
        now = self._clock()
        with self._lock:
            self._created = {u: c for u, c in self._created.items() if c[1] > now}
            return [volume for volume, _ in self._created.values()]

    def make(self, views: Sequence[View], api: VolumeApi) -> dict[str, Decision]:
        """What has become of each, by path."""
        outcomes: dict[str, Decision] = {}
        ready: list[tuple[Candidate, StorageClass]] = []
        for view in views:
            candidate = view.candidate
            assert candidate is not None  # else it would not have been decided to offer it
            found = self._classes.get(candidate.class_config.name)
            if candidate.kind is Kind.DEVICE and (why := why_not_free(candidate, view.record)):
                outcomes[view.path] = Decision(Action.NOTHING, State.BUSY, why)
                continue
            if found is None:
                why = "there is no such StorageClass"
            elif found.reclaim_policy not in _POLICIES:
                why = f"its class's reclaimPolicy {found.reclaim_policy} is not Delete or Retain"
            else:
                ready.append((candidate, found))
                continue
            outcomes[view.path] = Decision(Action.NOTHING, State.INVALID, why)
        known = {view.path: view.record for view in views}
        for start in range(0, len(ready), _TOGETHER):
            outcomes |= self._create_all(ready[start : start + _TOGETHER], known, api)
        return outcomes

    def _create_all(
        self,
        ready: Sequence[tuple[Candidate, StorageClass]],
        known: Mapping[str, Record | None],
        api: VolumeApi,
    ) -> dict[str, Decision]:
        # Before any volume is made: none is ever there without us knowing its disk.
        offering = {c.path: records.of_candidate(c, Use.OFFERING, api.cluster) for c, _ in ready}
        self._ledger.write(offering.values())
        outcomes: dict[str, Decision] = {}
        made: list[Record] = []
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="offer") as pool:
            results = pool.map(lambda pair: self._create(pair[0], pair[1], api), ready)
            for (candidate, _), result in zip(ready, results, strict=True):
                path, record = candidate.path, offering[candidate.path]
                if isinstance(result, Exception):
                    outcomes[path] = Decision(Action.OFFER, State.OFFERING, str(result))
                    if _has_done_nothing(result):
                        self._ledger.swap(record, known[path], path)
                    continue
                outcomes[path] = Decision(Action.NOTHING, State.AVAILABLE)
                if result.is_new:
                    made.append(records.noted(record, result.volume, api.cluster))
                else:
                    # It tells itself of which disk it is, and whether it has been used.
                    self._ledger.swap(record, None, path)
        self._ledger.write(made)
        return outcomes

    def _create(
        self, candidate: Candidate, storage_class: StorageClass, api: VolumeApi
    ) -> Made | Exception:
        mode, metrics = candidate.class_config.mode.value, self._metrics
        metrics.requests.labels("create").inc()
        started = time.monotonic()
        try:
            made = api.create(candidate, storage_class)
        except (KubeError, NameTaken) as error:
            metrics.requests_failed.labels("create").inc()
            log.warning("a volume cannot be created", path=candidate.path, error=str(error))
            return error
        metrics.request_seconds.labels("create").observe(time.monotonic() - started)
        metrics.discovery_seconds.labels(mode).observe(time.monotonic() - started)
        metrics.discovered.labels(mode).inc()
        self.remember([made.volume])
        log.info("volume created", path=candidate.path, volume=made.volume.name)
        return made


def why_not_free(candidate: Candidate, record: Record | None) -> str:
    """What keeps a device that discovery takes for free from being offered; empty: nothing."""
    # What was a volume before has been cleaned, in whatever way its class says. Of anything else
    # the content is asked first: who is about to use a volume group would find its disk taken.
    return ("" if record else guard.why_anothers(candidate)) or guard.why_in_use(candidate)


def _has_done_nothing(error: Exception) -> bool:
    """Whether the server has said that there is no volume; after others there may be one."""
    return isinstance(error, NameTaken) or (
        isinstance(error, StatusError) and not isinstance(error, ServerError)
    )
