"""Threads that work the keys of a queue: as many as there is work for, up to a limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from external_storage.logs import get_logger
from external_storage.workqueue.queue import WorkQueue

K = TypeVar("K", bound=Hashable)

log = get_logger(__name__)

_IDLE_S = 30.0


class Workers(Generic[K]):
    """Calls ``work(key)`` for each key of ``queue``.

    One worker is always spare while the limit allows: when every other one hangs in the backend of
    one class, the key of another class still finds a thread at once.
    """

    def __init__(
        self,
        queue: WorkQueue[K],
        work: Callable[[K], None],
        *,
        max_threads: int = 64,
        abandon: Callable[[threading.Thread], bool] = lambda _: False,
    ) -> None:
        """``abandon`` says which threads ``stop`` need not wait for, because they hang."""
        self._queue = queue
        self._work = work
        self._max_threads = max_threads
        self._abandon = abandon
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._stopping = False
        self._numbers = 0

    def start(self) -> None:
        with self._lock:
            self._spawn()

    def finish(self) -> None:
        """Take no more keys; those in work go on."""
        with self._lock:
            self._stopping = True
        self._queue.shut_down()

    def stop(self, timeout_s: float) -> bool:
        """Take no more keys and wait for those in work; False if some did not end in time."""
        self.finish()
        deadline = time.monotonic() + timeout_s
        for thread in list(self._threads):
            if not self._abandon(thread):
                thread.join(max(deadline - time.monotonic(), 0.0))
        left = [thread for thread in list(self._threads) if thread.is_alive()]
        return all(self._abandon(thread) for thread in left)

    def _spawn(self) -> None:
        # Daemon threads: an author's call that never returns must not hold up our exit.
        self._numbers += 1
        name = f"{self._queue.name}-{self._numbers}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._threads.add(thread)
        self._idle += 1
        try:
            thread.start()
        except RuntimeError as error:
            # The pids limit of the pod: go on with the threads there are.
            self._threads.discard(thread)
            self._idle -= 1
            log.error("a worker cannot be started", queue=self._queue.name, error=str(error))

    def _run(self) -> None:
        try:
            while True:
                key = self._queue.get(timeout_s=_IDLE_S)
                if key is None:
                    if self._may_end():
                        return
                    continue
                self._taken()
                self._call(key)
                with self._lock:
                    self._idle += 1
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _taken(self) -> None:
        with self._lock:
            self._idle -= 1
            if not self._idle and not self._stopping and len(self._threads) < self._max_threads:
                self._spawn()

    def _may_end(self) -> bool:
        with self._lock:
            if self._stopping or self._queue.is_shut_down or self._idle > 1:
                self._idle -= 1
                return True
            return False

    def _call(self, key: K) -> None:
        try:
            self._work(key)
        except (
            BaseException
        ):  # the last net: no key may take its worker along, not by exit() either
            log.exception("a worker's call failed", queue=self._queue.name, key=key)
            self._queue.retry(key)
        finally:
            self._queue.done(key)
