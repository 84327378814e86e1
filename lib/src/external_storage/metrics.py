"""Metrics: the names and labels of the Go library, and what it left out.

Each set has a registry of its own, so that several controllers can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from external_storage.workqueue import WorkQueue

# The Go library's buckets end at 10 s; storage back ends take longer than that.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one controller."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        claims, volumes = "controller_persistentvolumeclaim", "controller_persistentvolume"
        by_source, by_class = ("class", "source"), ("class",)
        self.provisioned = self._counter(f"{claims}_provision", "Claims provisioned", by_source)
        self.provision_failed = self._counter(
            f"{claims}_provision_failed", "Tries to provision a claim that failed", by_source
        )
        self.provision_seconds = self._histogram(
            f"{claims}_provision_duration_seconds", "Duration of successful tries", by_source
        )
        self.claim_age_seconds = self._histogram(
            f"{claims}_age_at_provision_seconds",
            "Age of a claim when its volume was saved",
            by_class,
        )
        self.discarded = self._counter(
            "external_storage_assets_discarded", "Unfinished assets removed", ()
        )
        self.deleted = self._counter(f"{volumes}_delete", "Volumes deleted", by_class)
        self.delete_failed = self._counter(
            f"{volumes}_delete_failed", "Tries to delete a volume that failed", by_class
        )
        self.delete_seconds = self._histogram(
            f"{volumes}_delete_duration_seconds", "Duration of successful deletes", by_class
        )
        expansions = "external_storage_expansion"
        self.expanded = self._counter(f"{expansions}s", "Volumes grown", by_class)
        self.expand_failed = self._counter(
            f"{expansions}s_failed", "Tries to grow a volume that failed", by_class
        )
        self.expand_seconds = self._histogram(
            f"{expansions}_duration_seconds", "Duration of successful expansions", by_class
        )
        self.api_requests = self._counter(
            "external_storage_api_requests",
            "Requests to the API server",
            ("verb", "resource", "code"),
        )
        self.events_dropped = self._counter(
            "external_storage_events_dropped", "Events that could not be written", ()
        )

    def watch_queue(self, queue: WorkQueue[str]) -> None:
        """Gauges of one work queue."""
        prefix = f"external_storage_{queue.name}_queue"
        self.gauge(f"{prefix}_depth", "Keys ready to be worked", queue.__len__)
        self.gauge(f"{prefix}_waiting", "Keys in a back-off", queue.waiting)
        self.gauge(f"{prefix}_in_progress", "Keys being worked", queue.working)
        self.gauge(f"{prefix}_oldest_seconds", "Age of the oldest ready key", queue.oldest_age_s)
        self.counter(f"{prefix}_retries", "Tries that failed", queue.retries)

    def observe_request(self, verb: str, resource: str, code: str, _seconds: float) -> None:
        """The client's observer."""
        self.api_requests.labels(verb, resource, code).inc()

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A gauge whose value is asked for when the metrics are read."""
        self.registry.register(_Asked(name, help, read))

    def counter(self, name: str, help: str, read: Callable[[], float]) -> None:
        """As ``gauge``, for a number that only grows; ``_total`` is added to its name."""
        self.registry.register(_Asked(name, help, read, family=CounterMetricFamily))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(name, help, labels, buckets=BUCKETS, registry=self.registry)


class _Asked(Collector):
    def __init__(
        self,
        name: str,
        help: str,
        read: Callable[[], float],
        *,
        family: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
    ) -> None:
        self._name, self._help, self._read, self._family = name, help, read, family

    def collect(self) -> Iterable[Metric]:
        yield self._family(self._name, self._help, value=self._read())
