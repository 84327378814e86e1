"""What is told of every request to a storage host: for metrics, and to know who is in trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram

from external_storage import ProvisionerError, ProvisioningInBackground, Unchanged

Observer = Callable[[str, ProvisionerError | None, float], None]
"""Told of a request when it is over: its name, how it failed, seconds."""

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 120)


def unobserved(_what: str, _error: ProvisionerError | None, _seconds: float) -> None:
    """For who does not want to know."""


@contextmanager
def observed(observer: Observer, what: str) -> Iterator[None]:
    """Around one request."""
    started = time.monotonic()
    failure: ProvisionerError | None = None
    try:
        yield
    except ProvisionerError as error:
        failure = error
        raise
    finally:
        observer(what, failure, time.monotonic() - started)


class Observations:
    """Metrics by server and request, and the last trouble of each server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("server", "request")
        self._requests = Counter(
            "iscsi_targetd_backend_requests",
            "Requests to storage hosts",
            (*labels, "outcome"),
            registry=registry,
        )
        self._seconds = Histogram(
            "iscsi_targetd_backend_request_seconds",
            "Duration of requests to storage hosts",
            labels,
            buckets=_BUCKETS,
            registry=registry,
        )
        self._lock = threading.Lock()
        self._trouble: dict[str, str] = {}

    def of(self, server: str) -> Observer:
        """The observer of one server."""

        def observe(what: str, error: ProvisionerError | None, seconds: float) -> None:
            lost = isinstance(error, (Unchanged, ProvisioningInBackground))
            outcome = "ok" if error is None else "lost" if lost else "refused"
            self._requests.labels(server, what, outcome).inc()
            self._seconds.labels(server, what).observe(seconds)
            with self._lock:
                if error is not None and lost:
                    self._trouble[server] = str(error)
                else:
                    self._trouble.pop(server, None)

        return observe

    def trouble(self) -> str | None:
        """Why some servers did not answer the last time, or None."""
        with self._lock:
            return "; ".join(self._trouble.values()) or None
