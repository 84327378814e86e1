"""Events: what ``kubectl describe`` shows to the user of a claim.

Written behind the work by one thread, so that a slow or throttling API server costs the user's
volume nothing. An event that repeats raises the count of the one that is there.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    KubeError,
    NotFound,
    ServerError,
    Unavailable,
)
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.kube.types import Event, KubeObject
from external_storage.logs import get_logger
from external_storage.workqueue import Backoff

log = get_logger(__name__)

MAX_MESSAGE = 1024
_MAX_PENDING = 5000
_REMEMBERED = 4096
_TRIES = 5
_BACKOFF = Backoff(start_s=1.0, max_s=30.0)


class EventType(StrEnum):
    """The two types the API knows."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(slots=True)
class _Entry:
    """One event: what it is about, what it says, how often it has happened."""

    reference: dict[str, str]
    type: EventType
    reason: str
    message: str
    first: float
    last: float
    count: int = 1
    written: int = 0
    """How many of ``count`` the API server knows about."""
    name: str = ""
    tries: int = 0


class EventRecorder:
    """Records events about objects; never blocks and never raises."""

    def __init__(
        self,
        client: Client,
        component: str,
        *,
        instance: str = "",
        on_drop: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``component`` is shown as the source and stays the same over restarts."""
        self._client = client
        self._component = component
        self._instance = instance or component
        self._on_drop = on_drop
        self._clock = clock
        self._condition = threading.Condition()
        self._known: OrderedDict[str, _Entry] = OrderedDict()
        self._pending: OrderedDict[str, _Entry] = OrderedDict()
        self._stopping = threading.Event()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Write what is pending, for at most ``timeout_s``; what is left then is dropped."""
        deadline = time.monotonic() + timeout_s
        self.flush(timeout_s)
        self._stopping.set()
        with self._condition:
            left, self._pending = list(self._pending.values()), OrderedDict()
            self._condition.notify_all()
        for entry in left:
            self._drop(entry, "there was no time left to write it")
        if self._thread.is_alive():
            self._thread.join(max(deadline - time.monotonic(), 0.1))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything recorded so far is written; False if that takes longer."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._pending and not self._busy, timeout_s)

    def normal(self, about: KubeObject, reason: str, message: str) -> None:
        self.record(about, EventType.NORMAL, reason=reason, message=message)

    def warning(self, about: KubeObject, reason: str, message: str) -> None:
        self.record(about, EventType.WARNING, reason=reason, message=message)

    def record(self, about: KubeObject, kind: EventType, *, reason: str, message: str) -> None:
        """Note that something happened to ``about``; ``reason`` is one CamelCase word."""
        message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        identity = "\0".join((about.uid, kind, reason, message))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        now = self._clock()
        with self._condition:
            entry = self._known.get(digest)
            if entry is None:
                entry = _Entry(_reference(about), kind, reason, message, now, now)
                self._known[digest] = entry
            else:
                entry.count += 1
                entry.last = now
            self._known.move_to_end(digest)
            self._trim()
            if digest not in self._pending and len(self._pending) >= _MAX_PENDING:
                self._drop(entry, "too many events are waiting")
                return
            self._pending.setdefault(digest, entry)
            self._condition.notify_all()

    def _trim(self) -> None:
        excess = len(self._known) - _REMEMBERED
        for digest in list(itertools.islice(self._known, max(excess, 0))):
            # One that waits is kept: its count goes on.
            if digest not in self._pending:
                del self._known[digest]

    def _run(self) -> None:
        while True:
            with self._condition:
                self._busy = False
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._pending or self._stopping.is_set())
                if self._stopping.is_set():
                    return
                digest, entry = self._pending.popitem(last=False)
                self._busy = True
            self._try(digest, entry)

    def _try(self, digest: str, entry: _Entry) -> None:
        try:
            self._write(entry)
        except (Unavailable, ServerError) as error:
            entry.tries += 1
            if isinstance(error, ServerError) and entry.tries >= _TRIES:
                self._drop(entry, str(error))
                return
            # While nobody answers, all of them wait: only a full queue drops any.
            self._stopping.wait(_BACKOFF.delay(entry.tries))
            with self._condition:
                self._pending.setdefault(digest, entry)
        except KubeError as error:
            # The namespace is going away, or we have no right to write events.
            self._drop(entry, str(error))
        except Exception as error:
            log.exception("writing an event failed")
            self._drop(entry, str(error))

    def _write(self, entry: _Entry) -> None:
        count = entry.count
        if entry.written == count:
            return
        namespace = entry.reference.get("namespace") or "default"
        if entry.written:
            patch = {"count": count, "lastTimestamp": _timestamp(entry.last)}
            try:
                self._client.patch(
                    Event, entry.name, patch, namespace=namespace, content_type=STRATEGIC_PATCH
                )
            except NotFound:
                # The API server drops events after an hour: begin a new one.
                entry.written, entry.name = 0, ""
        if not entry.written:
            self._create(entry, count, namespace)
        entry.written, entry.tries = count, 0

    def _create(self, entry: _Entry, count: int, namespace: str) -> None:
        if not entry.name:
            # The time makes it a name that nobody has used; it stays for the tries that follow.
            about = entry.reference.get("name", "")[:200].rstrip("-.")
            entry.name = f"{about}.{time.time_ns():x}"
        fields = {
            "metadata": {"name": entry.name, "namespace": namespace},
            "involvedObject": entry.reference,
            "type": entry.type.value,
            "reason": entry.reason,
            "message": entry.message,
            "count": count,
            "firstTimestamp": _timestamp(entry.first),
            "lastTimestamp": _timestamp(entry.last),
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
        }
        try:
            self._client.create(Event, fields, namespace=namespace)
        except AlreadyExists:
            # An earlier try did arrive, only its answer was lost.
            log.debug("event was written already", event=entry.name)

    def _drop(self, entry: _Entry, why: str) -> None:
        entry.tries = 0
        log.warning(
            "event dropped", reason=entry.reason, about=entry.reference.get("name"), error=why
        )
        if self._on_drop is not None:
            self._on_drop()


def _reference(about: KubeObject) -> dict[str, str]:
    reference = {
        "kind": about.KIND,
        "apiVersion": about.API_VERSION,
        "namespace": about.namespace,
        "name": about.name,
        "uid": about.uid,
        "resourceVersion": about.metadata.resource_version,
    }
    return {key: value for key, value in reference.items() if value}


def _timestamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
