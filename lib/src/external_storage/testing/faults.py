"""Faults of ``FaultProxy`` as data: which requests they are for, and what they do to them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

from external_storage.testing.processes import is_running
from external_storage.testing.requestlog import ProxiedRequest

_POLL_S: Final = 0.02
_KILL_LIMIT_S: Final = 30.0
_REASONS: Final = {
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer on its way to the client; of a watch, only its head."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    cut_at: int | None = None
    """Close the connection after so many bytes of the body."""


def status_object(status: int, *, reason: str = "") -> dict[str, object]:
    """The Status object of an injected error."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": "injected by the fault proxy",
        "reason": reason or _REASONS.get(status, ""),
        "code": status,
    }


def json_answer(status: int, body: object, *, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer with ``body`` as JSON on one line."""
    head = {"Content-Type": "application/json", **(headers or {})}
    return Answer(
        status=status, headers=tuple(head.items()), body=json.dumps(body).encode() + b"\n"
    )


class Cut(Exception):
    """Close the client's connection now, without another byte."""


class Fault:
    """What is done to a request; this one does nothing.

    ``closing`` is set when the proxy goes down: a fault that waits then raises ``Cut``.
    """

    label: ClassVar[str] = ""

    def before(self, request: ProxiedRequest, closing: threading.Event) -> Answer | None:
        """Called before the server is asked, which it is not if an answer is returned."""
        return None

    def after(self, answer: Answer, closing: threading.Event) -> Answer:
        """Called with the server's answer; returns what the client is to get."""
        return answer


@dataclass(frozen=True, slots=True)
class Fail(Fault):
    """An error in place of an answer; the server is not asked."""

    status: int
    reason: str = ""
    retry_after_s: int | None = None
    label = "fail"

    def before(self, request: ProxiedRequest, closing: threading.Event) -> Answer | None:
        exists = self.status == 409 and request.verb == "create"
        status = status_object(
            self.status, reason=self.reason or ("AlreadyExists" if exists else "")
        )
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return json_answer(self.status, status, headers=headers)


@dataclass(frozen=True, slots=True)
class FailAfter(Fault):
    """An error in place of the answer of the server, which has done what it was asked."""

    status: int
    reason: str = ""
    label = "fail_after"

    def after(self, answer: Answer, closing: threading.Event) -> Answer:
        return json_answer(self.status, status_object(self.status, reason=self.reason))


@dataclass(frozen=True, slots=True)
class CutConnection(Fault):
    """The connection is closed: before the server is asked, after that, or amid its answer."""

    first: bool
    half: bool
    label = "cut"

    def before(self, request: ProxiedRequest, closing: threading.Event) -> Answer | None:
        if self.first:
            raise Cut
        return None

    def after(self, answer: Answer, closing: threading.Event) -> Answer:
        if not self.half:
            raise Cut
        return replace(answer, cut_at=len(answer.body) // 2)


@dataclass(frozen=True, slots=True)
class Delay(Fault):
    """The request, or the server's answer to it, is held."""

    until: float | threading.Event
    first: bool
    label = "delay"

    def before(self, request: ProxiedRequest, closing: threading.Event) -> Answer | None:
        if self.first:
            self._hold(closing)
        return None

    def after(self, answer: Answer, closing: threading.Event) -> Answer:
        if not self.first:
            self._hold(closing)
        return answer

    def _hold(self, closing: threading.Event) -> None:
        if isinstance(self.until, threading.Event):
            while not self.until.wait(_POLL_S):
                if closing.is_set():
                    raise Cut
        elif closing.wait(self.until):
            raise Cut


@dataclass(frozen=True, slots=True)
class Kill(Fault):
    """The client is killed, and dead when its connection is closed."""

    target: int | Callable[[], object]
    first: bool
    label = "kill"

    def before(self, request: ProxiedRequest, closing: threading.Event) -> Answer | None:
        if self.first:
            self._kill()
        return None

    def after(self, answer: Answer, closing: threading.Event) -> Answer:
        self._kill()
        return answer

    def _kill(self) -> None:
        if not isinstance(self.target, int):
            self.target()
            raise Cut
        os.kill(self.target, signal.SIGKILL)
        # Were the connection closed first, the client might still see that and act on it.
        deadline = time.monotonic() + _KILL_LIMIT_S
        while is_running(self.target) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        raise Cut


@dataclass(frozen=True, slots=True)
class GoneWatch(Fault):
    """A watch is told that its resource version is too old."""

    as_status: bool
    label = "gone"

    def before(self, request: ProxiedRequest, closing: threading.Event) -> Answer | None:
        status = status_object(410)
        if self.as_status:
            return json_answer(410, status)
        return json_answer(200, {"type": "ERROR", "object": status})


@dataclass(slots=True, kw_only=True)
class Rule:
    """A fault, the requests it is for, and how often it is still to be applied."""

    fault: Fault
    verb: str | None
    resource: str | None
    namespace: str | None
    name: str | None
    times: int | None
    after: int
    every: int
    seen: int = 0
    """Requests that fitted so far, whatever was done to them."""
    applied: int = 0

    @property
    def used_up(self) -> bool:
        """Whether it has been applied as often as it was to be."""
        return self.times is not None and self.applied >= self.times

    def takes(self, request: ProxiedRequest) -> bool:
        """Count ``request`` if it fits; whether it is this one's turn."""
        pairs = (
            (self.verb, request.verb),
            (self.resource, request.resource),
            (self.namespace, request.namespace),
            (self.name, request.name),
        )
        if any(wanted is not None and wanted != found for wanted, found in pairs):
            return False
        self.seen += 1
        turn = self.seen - self.after
        return turn > 0 and turn % self.every == 0 and not self.used_up


class RuleBook:
    """The rules in force, oldest first; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def all(self) -> list[Rule]:
        with self._lock:
            return list(self._rules)

    def take(self, request: ProxiedRequest) -> Fault:
        """The fault for ``request``: of the oldest rule whose turn it is."""
        with self._lock:
            # All of them count it, so that "the third request" means the third the server would
            # have seen, whichever other rules there are.
            ready = [rule for rule in self._rules if rule.takes(request)]
            if not ready:
                return Fault()
            ready[0].applied += 1
            self._rules = [rule for rule in self._rules if not rule.used_up]
            return ready[0].fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Requests chosen by ``FaultProxy.on``; each method is a fault for them."""

    add: Callable[[Rule], Rule]
    verb: str | None
    resource: str | None
    namespace: str | None
    name: str | None
    times: int | None
    after: int
    every: int

    def fail(self, status: int, *, reason: str = "", retry_after_s: int | None = None) -> Rule:
        """Answer with an error without asking the server."""
        return self.apply(Fail(status, reason, retry_after_s))

    def fail_after(self, status: int, *, reason: str = "") -> Rule:
        """Let the server carry it out, then answer with an error all the same."""
        return self.apply(FailAfter(status, reason))

    def cut(self, *, before: bool = False, half: bool = False) -> Rule:
        """Close the connection: before the server is asked, or after it has answered.

        ``half``: in the middle of its answer. libcurl repeats a request by itself if its
        connection, having served another before, is closed without a byte of an answer.
        """
        return self.apply(CutConnection(first=before and not half, half=half))

    def delay(self, until: float | threading.Event, *, before: bool = True) -> Rule:
        """Hold the request, or with ``before=False`` the answer, for seconds or until an event."""
        return self.apply(Delay(until, first=before))

    def kill(
        self, target: int | Callable[[], object], *, when: Literal["before", "after"] = "after"
    ) -> Rule:
        """SIGKILL to a pid (or call ``target``) before the server is asked or once it has answered;
        the answer is not passed on."""
        return self.apply(Kill(target, first=when == "before"))

    def apply(self, fault: Fault) -> Rule:
        """A fault of one's own."""
        rule = Rule(
            fault=fault,
            verb=self.verb,
            resource=self.resource,
            namespace=self.namespace,
            name=self.name,
            times=self.times,
            after=self.after,
            every=self.every,
        )
        return self.add(rule)
