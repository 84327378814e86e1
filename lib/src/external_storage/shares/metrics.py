"""Metrics of shares, each with the label ``share``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from external_storage.metrics import Metrics
from external_storage.shares.directories import ShareDirectories

_Read = Callable[[ShareDirectories], float | None]

_GAUGES: dict[str, tuple[str, _Read]] = {
    "available": ("1 while claims of the share are served", lambda on: on.problem() is None),
    "stuck_workers": ("Killed processes that hang in the kernel", lambda on: on.share.stuck),
    "trash_entries": ("Deleted directories not removed yet", lambda on: on.trash_entries()),
    "size_bytes": (
        "Size of the file system, by the server's word",
        lambda on: on.share.facts.size if on.share.facts else None,
    ),
    "free_bytes": (
        "What can still be written to it",
        lambda on: on.share.facts.free if on.share.facts else None,
    ),
}
_KILLS = "Processes killed because the server did not answer in time"


def export_metrics(metrics: Metrics, shares: Sequence[ShareDirectories]) -> None:
    """Gauges and counters of ``external_storage_share_*``."""
    metrics.registry.register(_ShareCollector(tuple(shares)))


class _ShareCollector(Collector):
    def __init__(self, shares: tuple[ShareDirectories, ...]) -> None:
        self._shares = shares

    def collect(self) -> Iterable[Metric]:
        prefix = "external_storage_share"
        for name, (help, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"{prefix}_{name}", help, labels=["share"])
            for on in self._shares:
                if (value := read(on)) is not None:
                    gauge.add_metric([on.share.name], float(value))
            yield gauge
        kills = CounterMetricFamily(f"{prefix}_worker_kills", _KILLS, labels=["share"])
        for on in self._shares:
            kills.add_metric([on.share.name], on.share.kills)
        yield kills
