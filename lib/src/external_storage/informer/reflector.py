"""List, then watch, for ever: the layer that no outage may end.

Three layers, the outer ones made of the inner: ``run`` never gives up and backs off; ``_session``
is one list and the watches that continue it; ``_watch_once`` is one connection.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from external_storage.kube.client import Client
from external_storage.kube.decoding import decoder
from external_storage.kube.errors import (
    Gone,
    KubeError,
    Status,
    StatusError,
    Unavailable,
    from_status,
)
from external_storage.kube.transport import Stream
from external_storage.kube.types import KubeObject, KubeStruct
from external_storage.logs import get_logger
from external_storage.workqueue.ratelimit import Backoff

T = TypeVar("T", bound=KubeObject)
T_contra = TypeVar("T_contra", bound=KubeObject, contravariant=True)

log = get_logger(__name__)

WATCH_TIMEOUT_S = (300, 600)
BACKOFF = Backoff(start_s=0.8, max_s=30.0, jitter=0.5)
HEALTHY_S = 120.0
_SHORTEST_WATCH_S = 1.0


class Sink(Protocol[T_contra]):
    """Where the reflector delivers; its methods must return quickly and must not raise."""

    def replace(self, items: Iterable[T_contra]) -> None:
        """The whole content as of one moment."""

    def apply(self, item: T_contra, deleted: bool) -> None:
        """One change."""


class WatchEvent(KubeStruct, Generic[T], frozen=True):
    """One line of a watch."""

    type: str
    object: T


class _ErrorEvent(msgspec.Struct):
    object: Status


_decode_error = msgspec.json.Decoder(_ErrorEvent).decode


class Reflector(Generic[T]):
    """Keeps a sink equal to what the API server holds of one kind.

    ``attempts`` and ``failures`` count sessions (list + watch) begun and ended by an error.
    """

    def __init__(
        self,
        client: Client,
        kind: type[T],
        sink: Sink[T],
        *,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._kind = kind
        self._sink = sink
        self._scope = {
            "namespace": namespace,
            "label_selector": label_selector,
            "field_selector": field_selector,
        }
        self._clock = clock
        event_type: Any = WatchEvent[kind]  # type: ignore[valid-type]
        self._decode = decoder(event_type).decode
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._resource_version = ""
        self._lines = 0
        self._log = log.bind(resource=kind.RESOURCE)
        self.attempts = 0
        self.failures = 0
        self.connected = False
        """Whether the last list succeeded and no error has come since."""

    def run(self) -> None:
        """List and watch until ``stop`` is called; returns only then."""
        in_a_row = 0
        while not self._stop.is_set():
            started = self._clock()
            self.attempts += 1
            try:
                self._session()
                continue
            except Gone as error:
                self._resource_version = ""
                self._log.info("resource version is gone, listing again", reason=str(error))
                # An API server that answers every watch with 410 must not be listed in a loop.
            except KubeError as error:
                if self._stop.is_set():
                    return
                self._log.warning("list or watch failed", error=str(error))
            except Exception:
                # A defect in a handler or in our decoding; the outage must still end by itself.
                self._resource_version = ""
                self._log.exception("list or watch failed unexpectedly")
            self.failures += 1
            self.connected = False
            in_a_row = 1 if self._clock() - started >= HEALTHY_S else in_a_row + 1
            self._stop.wait(BACKOFF.delay(in_a_row))

    def stop(self) -> None:
        """End ``run`` at once, from any thread."""
        self._stop.set()
        with self._lock:
            if self._stream is not None:
                self._stream.close()

    def _session(self) -> None:
        """One list, unless the last watch can be continued, and watches until one fails."""
        if not self._resource_version:
            self._list()
        while not self._stop.is_set():
            self._watch_once()
            self.connected = True

    def _list(self) -> None:
        items: list[T] = []
        version = ""
        for page in self._client.pages(self._kind, **self._scope):
            if self._stop.is_set():
                return
            items += page.items
            version = page.metadata.resource_version
        self._sink.replace(items)
        self._resource_version = version
        self.connected = True

    def _watch_once(self) -> None:
        """One watch connection; returns when the server ends it in good order."""
        stream = self._client.watch(
            self._kind,
            resource_version=self._resource_version,
            timeout_s=random.randint(*WATCH_TIMEOUT_S),
            **self._scope,
        )
        with self._lock:
            self._stream = stream
            if self._stop.is_set():
                stream.close()
        started, self._lines = self._clock(), 0
        try:
            stream.run(self._on_line)
        finally:
            with self._lock:
                self._stream = None
        if not self._lines and self._clock() - started < _SHORTEST_WATCH_S:
            # A proxy may answer like this for ever; asking again at once would be a busy loop.
            raise Unavailable("the watch ended as soon as it had begun")

    def _on_line(self, line: bytes) -> None:
        self._lines += 1
        try:
            event: WatchEvent[T] = self._decode(line)
        except msgspec.ValidationError:
            # An ERROR event holds a Status, which does not fit the kind.
            raise self._error_of(line) from None
        if event.type == "ERROR":
            raise self._error_of(line)
        if event.type != "BOOKMARK":
            self._sink.apply(event.object, event.type == "DELETED")
        self._resource_version = event.object.metadata.resource_version

    def _error_of(self, line: bytes) -> StatusError:
        status = _decode_error(line).object
        if not status.code:
            # Not an error but an object that does not fit: list again instead of meeting it again.
            raise ValueError(f"an object that is no {self._kind.KIND}: {line[:200]!r}")
        if status.code == 410:
            status.reason = "Expired"
        return from_status(status)
