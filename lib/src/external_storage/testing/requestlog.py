"""What went through a ``FaultProxy``: requests in the words of RBAC, and the log of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

_VERBS: Final = {"POST": "create", "PUT": "update", "PATCH": "patch"}


@dataclass(slots=True, kw_only=True)
class ProxiedRequest:
    """One request and what has become of it so far."""

    verb: str
    """As in RBAC: get, list, watch, create, update, patch, delete, deletecollection."""
    resource: str
    """Plural, with the subresource: ``persistentvolumeclaims/status``; a path if it is no API."""
    namespace: str = ""
    name: str = ""
    user_agent: str = ""
    server_status: int = 0
    """What the API server answered; 0: it was not asked, or has not answered."""
    status: int = 0
    """What the client was answered; 0: nothing, or nothing yet."""
    fault: str = ""
    """The fault that was chosen for it: fail, fail_after, cut, delay, kill, gone; or none."""
    done: bool = False
    """Whether nothing more will be done about it."""


def parse_request(method: str, target: str, *, user_agent: str = "") -> ProxiedRequest:
    """What a request is about, from its method and URL (path and query)."""
    parsed = urlsplit(target)
    parts = [unquote(part) for part in parsed.path.split("/") if part]
    prefix = {"api": 2, "apis": 3}.get(parts[0] if parts else "", 0)
    rest = parts[prefix:]
    if not prefix or not rest:
        return ProxiedRequest(verb=method.lower(), resource=parsed.path, user_agent=user_agent)
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
        namespace, rest = rest[1], rest[2:]
    name = rest[1] if len(rest) > 1 else ""
    watches = parse_qs(parsed.query).get("watch", ["false"])[-1] in ("true", "1")
    return ProxiedRequest(
        verb=_verb(method, watches=watches, named=bool(name)),
        resource="/".join([rest[0], *rest[2:]]),
        namespace=namespace,
        name=name,
        user_agent=user_agent,
    )


def _verb(method: str, *, watches: bool, named: bool) -> str:
    if method == "GET":
        return "watch" if watches else "get" if named else "list"
    if method == "DELETE":
        return "delete" if named else "deletecollection"
    return _VERBS.get(method, method.lower())


@dataclass(slots=True)
class RequestLog:
    """Every request in the order of arrival; safe to use from any thread."""

    _entries: list[ProxiedRequest] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def begin(self, request: ProxiedRequest) -> None:
        with self._changed:
            self._entries.append(request)
            self._changed.notify_all()

    def note(
        self,
        request: ProxiedRequest,
        *,
        server_status: int | None = None,
        status: int | None = None,
        done: bool = False,
    ) -> None:
        """Something has become of a request."""
        with self._changed:
            request.server_status = server_status or request.server_status
            request.status = status or request.status
            request.done |= done
            self._changed.notify_all()

    def snapshot(self) -> list[ProxiedRequest]:
        with self._changed:
            return [replace(entry) for entry in self._entries]

    def wait_for(
        self, predicate: Callable[[ProxiedRequest], bool], *, count: int, limit_s: float
    ) -> list[ProxiedRequest]:
        """Wait until ``count`` requests satisfy ``predicate``; raises ``TimeoutError``."""
        with self._changed:
            found: list[ProxiedRequest] = []

            def enough() -> bool:
                found[:] = [entry for entry in self._entries if predicate(entry)]
                return len(found) >= count

            if not self._changed.wait_for(enough, limit_s):
                seen = "\n".join(map(str, self._entries[-20:]))
                raise TimeoutError(
                    f"{len(found)} of {count} requests within {limit_s:.0f} s; the last:\n{seen}"
                )
            return [replace(entry) for entry in found]
