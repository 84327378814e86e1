"""The client: typed objects in, typed objects and errors out.

The transport is libcurl. Measured against a real API server it costs a quarter of urllib3's CPU
a request and releases the interpreter lock while it waits, so that threads help. Everything that
knows about curl is in ``transport.py``; the rest of the project sees ``Client``.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

import msgspec

from external_storage.kube.auth import ClientConfig
from external_storage.kube.decoding import decoder
from external_storage.kube.errors import (
    DECODE_ERRORS,
    NotAllowed,
    NotFound,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    from_response,
)
from external_storage.kube.request import MERGE_PATCH, Request, object_path
from external_storage.kube.transport import Response, Stream, Transport
from external_storage.kube.types import KubeObject, KubeStruct, ListMeta, encode_new

T = TypeVar("T", bound=KubeObject)
D = TypeVar("D")

PAGE_SIZE = 500
_MAX_THROTTLED_TRIES = 10
_MAX_RETRY_AFTER_S = 30.0

Observer = Callable[[str, str, str, float], None]
"""Told of every request: verb, resource, HTTP code (or ``error``), seconds."""


class ObjectList(KubeStruct, Generic[T], frozen=True):
    """One page of a list."""

    metadata: ListMeta = ListMeta()
    items: list[T] = []


class Client:
    """A connection pool to one API server; safe to use from any number of threads.

    A request whose reused connection is closed before the first byte of the answer is sent once
    more, by libcurl and unseen: a ``create`` that was carried out may come back as
    ``AlreadyExists``. Who creates must look whether what is there is theirs.

    Every method raises the errors of ``kube.errors``. Answers of 429 are obeyed: the call waits
    as long as the server says, at most 30 s and ten times, and only then raises.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        user_agent: str = "external-storage",
        observer: Observer | None = None,
        pause: Callable[[], None] | None = None,
    ) -> None:
        """``pause`` is called before every request: the place of a client-side rate limit."""
        self.config = config
        self.namespace = config.namespace
        self._transport = Transport(config, user_agent=user_agent)
        self._observer = observer
        self._pause = pause
        self._may_write: Callable[[], bool] | None = None
        self._timeout_s: float | None = None
        self._closed = threading.Event()

    def guarded(self, may_write: Callable[[], bool]) -> Client:
        """A view of this client that changes nothing while ``may_write`` says no: it raises
        ``NotAllowed`` instead. It shares the connections and is not to be closed."""
        view = copy.copy(self)
        view._may_write = may_write
        return view

    def impatient(self, timeout_s: float) -> Client:
        """A view of this client for who has to act in time: a request may take ``timeout_s``, and
        an answer of 429 is raised at once. It shares the connections and is not to be closed."""
        view = copy.copy(self)
        view._timeout_s = timeout_s
        return view

    def close(self) -> None:
        """Close idle connections; waits for a throttled server end at once."""
        self._closed.set()
        self._transport.close()

    # -- objects

    def get(self, kind: type[T], name: str, *, namespace: str = "") -> T:
        """Read one object from the server, not from a cache."""
        path = object_path(kind, namespace=namespace, name=name)
        request = Request(method="GET", path=path, verb="get", resource=kind.RESOURCE)
        return self._decode(self.send(request), kind)

    def find(self, kind: type[T], name: str, *, namespace: str = "") -> T | None:
        """As ``get``; None if there is no object of that name."""
        try:
            return self.get(kind, name, namespace=namespace)
        except NotFound:
            return None

    def live(self, item: T) -> T | None:
        """This very object as the server has it now; None if it is gone, or another one has its
        name: what a 404 says, and a 409 only may say."""
        found = self.find(type(item), item.name, namespace=item.namespace)
        return found if found is not None and found.uid == item.uid else None

    def pages(
        self,
        kind: type[T],
        *,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> Iterator[ObjectList[T]]:
        """List ``kind`` in pages of 500; ``Gone`` if the list took so long that it expired."""
        query = {"limit": str(PAGE_SIZE), **_selectors(label_selector, field_selector)}
        page_type: Any = ObjectList[kind]  # type: ignore[valid-type]
        while True:
            request = Request(
                method="GET",
                path=object_path(kind, namespace=namespace),
                verb="list",
                resource=kind.RESOURCE,
                query=query,
                compressed=True,
            )
            page: ObjectList[T] = self._decode(self.send(request), page_type)
            yield page
            if not page.metadata.continue_:
                return
            query = {**query, "continue": page.metadata.continue_}

    def list_all(
        self,
        kind: type[T],
        *,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> list[T]:
        """All objects of ``kind``, in memory at once."""
        pages = self.pages(
            kind,
            namespace=namespace,
            label_selector=label_selector,
            field_selector=field_selector,
        )
        return [item for page in pages for item in page.items]

    def create(self, kind: type[T], fields: dict[str, Any], *, namespace: str = "") -> T:
        """Create an object from plain camelCase fields (``apiVersion`` and ``kind`` are added)."""
        request = Request(
            method="POST",
            path=object_path(kind, namespace=namespace),
            verb="create",
            resource=kind.RESOURCE,
            body=encode_new(kind, fields),
        )
        return self._decode(self.send(request), kind)

    def patch(
        self,
        kind: type[T],
        name: str,
        patch: object,
        *,
        namespace: str = "",
        subresource: str = "",
        content_type: str = MERGE_PATCH,
    ) -> T:
        """Change one object; with ``metadata.uid`` in the patch, ``Conflict`` if it is another."""
        request = Request(
            method="PATCH",
            path=object_path(kind, namespace=namespace, name=name, subresource=subresource),
            verb="patch",
            resource=f"{kind.RESOURCE}/{subresource}" if subresource else kind.RESOURCE,
            body=msgspec.json.encode(patch),
            content_type=content_type,
        )
        return self._decode(self.send(request), kind)

    def delete(
        self,
        kind: type[KubeObject],
        name: str,
        *,
        uid: str,
        namespace: str = "",
        resource_version: str = "",
    ) -> None:
        """Delete the object of that name only if it still has this UID, and where given is still
        of this resource version; else ``Conflict``."""
        preconditions = {"uid": uid}
        if resource_version:
            preconditions["resourceVersion"] = resource_version
        request = Request(
            method="DELETE",
            path=object_path(kind, namespace=namespace, name=name),
            verb="delete",
            resource=kind.RESOURCE,
            body=msgspec.json.encode({"preconditions": preconditions}),
        )
        self.send(request)

    def watch(
        self,
        kind: type[KubeObject],
        *,
        resource_version: str,
        timeout_s: int,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> Stream:
        """A watch, not yet started: ``run(on_line)`` it, ``close()`` it from any thread."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
            **_selectors(label_selector, field_selector),
        }
        request = Request(
            method="GET",
            path=object_path(kind, namespace=namespace),
            verb="watch",
            resource=kind.RESOURCE,
            query=query,
            # Above the server's own limit: a server that forgets to end the watch is noticed.
            timeout_s=timeout_s + 30.0,
        )
        if self._pause is not None:
            self._pause()
        # A stream asks for its token when it starts: no second try here, the reflector has its own.
        return self._transport.stream(request, lambda code: self._observe(request, code, 0.0))

    # -- requests

    def send(self, request: Request) -> bytes:
        """Send ``request`` and return the body of a successful answer."""
        if self._timeout_s is not None:
            return self._send_authenticated(replace(request, timeout_s=self._timeout_s))
        for attempt in range(1, _MAX_THROTTLED_TRIES + 1):
            try:
                return self._send_authenticated(request)
            except TooManyRequests as error:
                if error.retry_after_s is None or attempt == _MAX_THROTTLED_TRIES:
                    raise
                if self._closed.wait(min(error.retry_after_s, _MAX_RETRY_AFTER_S)):
                    raise
        raise AssertionError("unreachable")

    def _send_authenticated(self, request: Request) -> bytes:
        try:
            return self._send_once(request)
        except Unauthorized:
            # The token may have been replaced since it was read: read it again, try once more.
            self.config.tokens.refresh()
            return self._send_once(request)

    def _send_once(self, request: Request) -> bytes:
        if self._pause is not None:
            self._pause()
        # Just before it is sent: whoever had to wait for their turn may have lost the right to.
        if self._may_write is not None and request.method != "GET" and not self._may_write():
            raise NotAllowed(f"{request.verb} {request.resource}: not the leader any more")
        started = time.monotonic()
        code = "error"
        try:
            response: Response = self._transport.perform(request)
            code = str(response.code)
        finally:
            self._observe(request, code, time.monotonic() - started)
        if response.code >= 300:
            raise from_response(response.code, response.body, retry_after_s=response.retry_after_s)
        return response.body

    def _observe(self, request: Request, code: str, seconds: float) -> None:
        if self._observer is not None:
            self._observer(request.verb, request.resource, code, seconds)

    def _decode(self, body: bytes, kind: type[D]) -> D:
        try:
            decoded: D = decoder(kind).decode(body)
            return decoded
        except DECODE_ERRORS as error:
            raise Unavailable(f"answer not understood: {error}") from error


def _selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    pairs = (("labelSelector", label_selector), ("fieldSelector", field_selector))
    return {key: value for key, value in pairs if value}
