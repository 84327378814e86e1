"""Metrics: the reference's names, with gauges that stay right, and what it left out."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from external_storage.kube import quantity
from external_storage.kube.types import PersistentVolume
from external_storage.metrics import Metrics
from local_volume_provisioner.cleaning.machine import Progress
from local_volume_provisioner.states import State

_PREFIX = "local_volume_provisioner"
_BUCKETS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400)
_CAPACITY_STEP = 500 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What is asked when the metrics are read."""

    volumes: Callable[[], Iterable[PersistentVolume]]
    states: Callable[[], Tally[State]]
    progress: Callable[[], Mapping[str, Progress]]
    config_is_good: Callable[[], bool]
    brake_s: Callable[[], float]


class LocalMetrics:
    """The agent's own."""

    def __init__(self, metrics: Metrics, sources: Sources) -> None:
        self._metrics = metrics
        volume = f"{_PREFIX}_persistentvolume"
        by_mode, by_type = ("mode",), ("mode", "type")
        self.discovered = self._counter(f"{volume}_discovery", "Volumes created", by_mode)
        self.discovery_seconds = self._histogram(
            f"{volume}_discovery_duration_seconds", "Time to create a volume", by_mode
        )
        self.deleted = self._counter(f"{volume}_delete", "Volumes cleaned and deleted", by_type)
        self.delete_failed = self._counter(
            f"{volume}_delete_failed", "Tries to clean or delete that failed", by_type
        )
        self.delete_seconds = self._histogram(
            f"{volume}_delete_duration_seconds",
            "Time to clean a volume",
            (*by_type, "capacity", "cleanup_command"),
        )
        self.requests = self._counter(
            f"{_PREFIX}_apiserver_requests", "Creates and deletes of volumes", ("method",)
        )
        self.requests_failed = self._counter(
            f"{_PREFIX}_apiserver_requests_failed", "Those that failed", ("method",)
        )
        self.request_seconds = self._histogram(
            f"{_PREFIX}_apiserver_requests_duration_seconds", "Their duration", ("method",)
        )
        self.passes = self._histogram(f"{_PREFIX}_pass_duration_seconds", "One look at all", ())
        self.bytes_wiped = self._counter(f"{_PREFIX}_bytes_wiped", "Bytes wiped, all passes", ())
        self._succeeded = self._failed = 0
        metrics.registry.register(_Gauges(sources))
        metrics.gauge(
            f"{_PREFIX}_proctable_succeeded",
            "Cleanings that succeeded since the start",
            lambda: self._succeeded,
        )
        metrics.gauge(
            f"{_PREFIX}_proctable_failed",
            "Cleanings that failed since the start",
            lambda: self._failed,
        )

    def cleaned(self, mode: str, *, size: int, method: str, seconds: float) -> None:
        self._succeeded += 1
        capacity = f"{-(-size // _CAPACITY_STEP) * 500}G"
        self.delete_seconds.labels(mode, "process", capacity, method).observe(seconds)

    def cleaning_failed(self, mode: str) -> None:
        self._failed += 1
        self.delete_failed.labels(mode, "process").inc()

    def _counter(self, name: str, help: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, help, labels, registry=self._metrics.registry)

    def _histogram(self, name: str, help: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(name, help, labels, buckets=_BUCKETS, registry=self._metrics.registry)


class _Gauges(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        sources = self._sources
        capacity = GaugeMetricFamily(
            f"{_PREFIX}_persistentvolume_capacity_bytes", "Of all volumes", labels=["mode"]
        )
        sums: Tally[str] = Tally()
        for volume in sources.volumes():
            size = quantity.to_bytes(volume.spec.capacity.get("storage", "0"))
            sums[volume.spec.volume_mode or "Filesystem"] += size
        for mode, size in sums.items():
            capacity.add_metric([mode], size)
        states = GaugeMetricFamily(f"{_PREFIX}_entries", "Entries by state", labels=["state"])
        count = sources.states()
        for state in State:
            states.add_metric([state.value], count[state])
        cleaning = GaugeMetricFamily(
            f"{_PREFIX}_clean_progress_ratio", "Of what is being cleaned", labels=["path"]
        )
        running = sources.progress()
        for path, progress in running.items():
            cleaning.add_metric([path], progress.ratio)
        yield from (capacity, states, cleaning)
        yield GaugeMetricFamily(
            f"{_PREFIX}_proctable_running", "Cleanings that run", value=len(running)
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}_config_good", "0: the last reload was refused", sources.config_is_good()
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}_brake_seconds", "How long the brake holds", sources.brake_s()
        )
