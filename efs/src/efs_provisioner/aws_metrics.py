"""Metrics of what we ask of AWS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from external_storage.metrics import BUCKETS


class AwsMetrics:
    """Counts every attempt, so that throttling shows where retries hide it."""

    def __init__(
        self, registry: CollectorRegistry, *, access_points: Callable[[], Mapping[str, int]]
    ) -> None:
        """``access_points``: how many each file system has."""
        self._requests = Counter(
            "efs_provisioner_aws_requests",
            "Requests to AWS, each attempt counted; code is ok or AWS's own",
            ("operation", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "efs_provisioner_aws_request_duration_seconds",
            "Duration of requests to AWS, each attempt for itself",
            ("operation",),
            buckets=BUCKETS,
            registry=registry,
        )
        registry.register(_AccessPoints(access_points))

    def observe(self, operation: str, code: str, seconds: float) -> None:
        """The observer of ``Aws``."""
        self._requests.labels(operation, code).inc()
        self._seconds.labels(operation).observe(seconds)


class _AccessPoints(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def describe(self) -> Iterable[GaugeMetricFamily]:
        # Without it the registry would collect at once, before there is anything to count.
        yield self._family()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = self._family()
        for file_system, count in self._counts().items():
            family.add_metric((file_system,), count)
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "efs_provisioner_access_points",
            "Access points of a file system, ours and others', when last listed",
            labels=("file_system",),
        )
