"""Volumes for what has none: written down first, created several at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from external_storage import Lister, PersistentVolume, StorageClass, get_logger
from external_storage.kube.errors import KubeError
from local_volume_provisioner.decide import Action, Decision, View
from local_volume_provisioner.ledger import Ledger, Record, SavedClass, Use
from local_volume_provisioner.local_metrics import LocalMetrics
from local_volume_provisioner.scan import Candidate
from local_volume_provisioner.states import State
from local_volume_provisioner.volumes import NameTaken, VolumeApi

log = get_logger(__name__)

_AT_ONCE = 8
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
            if found is None:
                why = "there is no such StorageClass"
            elif found.reclaim_policy not in _POLICIES:
                why = f"its class's reclaimPolicy {found.reclaim_policy} is not Delete or Retain"
            else:
                ready.append((candidate, found))
                continue
            outcomes[view.path] = Decision(Action.NOTHING, State.INVALID, why)
        if ready:
            outcomes |= self._create_all(ready, api)
        return outcomes

    def _create_all(
        self, ready: Sequence[tuple[Candidate, StorageClass]], api: VolumeApi
    ) -> dict[str, Decision]:
        # Before any volume is made: none is ever there without us knowing its disk. A kill between
        # this and the volume leaves something that nobody has had, so it is simply offered again.
        self._ledger.write(_record(candidate, Use.OFFERING) for candidate, _ in ready)
        outcomes: dict[str, Decision] = {}
        made: list[Record] = []
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="offer") as pool:
            results = pool.map(lambda pair: self._create(pair[0], pair[1], api), ready)
            for (candidate, _), result in zip(ready, results, strict=True):
                if isinstance(result, str):
                    outcomes[candidate.path] = Decision(Action.OFFER, State.OFFERING, result)
                    continue
                record = _record(candidate, Use.OFFERED)
                made.append(msgspec.structs.replace(record, uid=result.uid))
                outcomes[candidate.path] = Decision(Action.NOTHING, State.AVAILABLE)
        self._ledger.write(made)
        return outcomes

    def _create(
        self, candidate: Candidate, storage_class: StorageClass, api: VolumeApi
    ) -> PersistentVolume | str:
        mode, metrics = candidate.class_config.mode.value, self._metrics
        metrics.requests.labels("create").inc()
        started = time.monotonic()
        try:
            volume = api.create(candidate, storage_class)
        except (KubeError, NameTaken) as error:
            metrics.requests_failed.labels("create").inc()
            log.warning("a volume cannot be created", path=candidate.path, error=str(error))
            return str(error)
        metrics.request_seconds.labels("create").observe(time.monotonic() - started)
        metrics.discovery_seconds.labels(mode).observe(time.monotonic() - started)
        metrics.discovered.labels(mode).inc()
        with self._lock:
            self._created[volume.uid] = (volume, self._clock() + _SEEN_AFTER_S)
        log.info("volume created", path=candidate.path, volume=volume.name)
        return volume


def _record(candidate: Candidate, use: Use) -> Record:
    return Record(
        path=candidate.path,
        saved_class=SavedClass.of(candidate.class_config),
        use=use,
        identity=candidate.identity,
    )
