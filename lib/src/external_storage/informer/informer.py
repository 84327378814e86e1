"""A reflector, its store, and the handlers that are told of changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from external_storage.informer.reflector import Reflector
from external_storage.informer.store import Change, IndexFunction, Lister, Store
from external_storage.kube.client import Client
from external_storage.kube.types import KubeObject
from external_storage.logs import get_logger

T = TypeVar("T", bound=KubeObject)

log = get_logger(__name__)

Handler = Callable[[Change[T]], None]
"""Told of each change, in order, on the informer's own thread: put a key into a work queue and
return. One that raises is logged and the next one is called."""

_SLOW_HANDLER_S = 1.0


class Informer(Generic[T]):
    """A local copy of one kind that stays current, with handlers.

    Build it, add handlers, ``start`` it, then ``wait_synced`` before trusting the lister.
    """

    def __init__(
        self,
        client: Client,
        kind: type[T],
        *,
        indexes: Mapping[str, IndexFunction[T]] | None = None,
        keep: Callable[[T], bool] | None = None,
        **scope: Any,  # noqa: ANN401  (namespace, label_selector, field_selector)
    ) -> None:
        """``keep`` drops objects before they cost memory; ``scope`` narrows the list and watch."""
        self.kind = kind
        self._store: Store[T] = Store(indexes=indexes, keep=keep)
        self.lister: Lister[T] = Lister(self._store)
        self.reflector: Reflector[T] = Reflector(client, kind, self, **scope)
        self._handlers: list[Handler[T]] = []
        self._synced = threading.Event()
        self._thread: threading.Thread | None = None

    def add_handler(self, handler: Handler[T]) -> None:
        """Tell ``handler`` of each later change; before ``start`` this is all of them."""
        self._handlers.append(handler)

    @property
    def has_synced(self) -> bool:
        """Whether the first list has been delivered to the store and to every handler."""
        return self._synced.is_set()

    def wait_synced(self, timeout_s: float | None = None) -> bool:
        return self._synced.wait(timeout_s)

    @property
    def has_ended(self) -> bool:
        """Whether it has been started and its thread runs no more."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self) -> None:
        name = f"informer-{self.kind.RESOURCE}"
        self._thread = threading.Thread(target=self.reflector.run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the watch and wait for the thread; several informers: ``reflector.stop`` all first,
        so that they end at the same time."""
        self.reflector.stop()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # -- the reflector's sink

    def replace(self, items: Iterable[T]) -> None:
        self._tell(self._store.replace(items))
        self._synced.set()

    def apply(self, item: T, deleted: bool) -> None:
        self._tell(self._store.apply(item, deleted=deleted))

    def _tell(self, changes: Iterable[Change[T]]) -> None:
        for change in changes:
            for handler in self._handlers:
                self._call(handler, change)

    def _call(self, handler: Handler[T], change: Change[T]) -> None:
        started = time.monotonic()
        try:
            handler(change)
        except Exception:
            log.exception("a handler failed", resource=self.kind.RESOURCE)
        took = time.monotonic() - started
        if took > _SLOW_HANDLER_S:
            log.warning("a handler is slow", resource=self.kind.RESOURCE, seconds=round(took, 1))
