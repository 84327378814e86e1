"""How much is in each volume: counted now and then, slowly, in the background, for the metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from external_storage import PersistentVolume, ProvisionerError, get_logger
from external_storage.metrics import Metrics
from external_storage.shares import Usage
from nfs_client_provisioner.ledger import Place
from nfs_client_provisioner.shares import Mounted, Servers

log = get_logger(__name__)

_STALE_S = 1800.0
"""A replica that has not been told to count for so long does not lead any more."""
_LABELS = ("server", "namespace", "claim", "volume")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One volume to be counted."""

    name: str
    labels: tuple[str, ...]
    mounted: Mounted
    place: Place


class UsageCounter(Collector):
    """One thread that goes through the volumes; the standby's has nothing to do."""

    def __init__(
        self,
        servers: Servers,
        *,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``interval_s``: between the beginnings of two rounds; 0: never."""
        self._servers = servers
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._volumes: list[_Wanted] = []
        self._found: dict[str, tuple[tuple[str, ...], Usage]] = {}
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._last = float("-inf")
        self._told = float("-inf")
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        if self._interval_s:
            self._thread.start()

    def stop(self) -> None:
        """Does not wait for a big tree: nothing is lost by it."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def soon(self, volumes: Sequence[PersistentVolume]) -> None:
        """Count these volumes, once the interval is over and then again and again; forget those
        that are not among them. To be called by the leader, every ten minutes."""
        wanted = list(self._known(volumes))
        names = {one.name for one in wanted}
        with self._lock:
            self._volumes, self._told = wanted, self._clock()
            self._found = {name: found for name, found in self._found.items() if name in names}
        self._wanted.set()

    # -- metrics

    def export(self, metrics: Metrics) -> None:
        """Add the gauges of the volumes to ``metrics``."""
        metrics.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Without it the registry would collect once, to learn the names."""
        return self._families()

    def collect(self) -> Iterable[Metric]:
        size, files = self._families()
        with self._lock:
            found = list(self._found.values()) if self._is_leading() else []
        for labels, usage in found:
            size.add_metric(labels, usage.bytes)
            files.add_metric(labels, usage.files)
        return (size, files)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(
                "nfs_client_volume_used_bytes",
                "Bytes allocated in the directory of a volume, when it was last counted",
                labels=_LABELS,
            ),
            GaugeMetricFamily(
                "nfs_client_volume_files",
                "Files and directories in the directory of a volume, when it was last counted",
                labels=_LABELS,
            ),
        )

    # -- inside

    def _known(self, volumes: Sequence[PersistentVolume]) -> Iterable[_Wanted]:
        for volume in volumes:
            found = self._servers.find(volume)
            if found is not None:
                mounted, place = found
                claim = volume.spec.claim_ref
                namespace, name = (claim.namespace, claim.name) if claim else ("", "")
                labels = (mounted.server.name, namespace, name, volume.name)
                yield _Wanted(volume.name, labels, mounted, place)

    def _run(self) -> None:
        while not self._stopping.is_set():
            left_s = max(self._last + self._interval_s - self._clock(), 0.0)
            self._wanted.wait(left_s if self._is_leading() else None)
            self._wanted.clear()
            now = self._clock()
            is_over = now - self._last >= self._interval_s
            if self._stopping.is_set() or not (is_over and self._is_leading()):
                continue
            self._last = now
            try:
                self._round()
            except Exception:
                log.exception("usage cannot be counted")

    def _is_leading(self) -> bool:
        return self._clock() - self._told < _STALE_S

    def _round(self) -> None:
        with self._lock:
            volumes = list(self._volumes)
        for one in volumes:
            if self._stopping.is_set() or not self._is_leading():
                return
            try:
                usage = one.mounted.directories.usage(one.place.path, stop=self._stopping.is_set)
            except (OSError, ProvisionerError) as error:
                log.debug("usage not counted", volume=one.name, error=str(error))
                continue
            if usage is not None:
                with self._lock:
                    self._found[one.name] = (one.labels, usage)
