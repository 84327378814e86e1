"""A client-side limit of requests a second, for those who want one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Throttle:
    """A token bucket: ``burst`` requests at once, then ``qps`` a second, first come first served.

    Pass ``wait`` to a ``Client`` as its ``pause``.
    """

    def __init__(
        self, qps: float, burst: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = 1.0 / qps
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._next = clock() - burst * self._interval_s
        """When the next token is there; it lies in the past by the tokens that have gathered."""
        self._closed = threading.Event()

    def wait(self) -> None:
        """Return when it is the caller's turn; at once after ``close``."""
        with self._lock:
            now = self._clock()
            self._next = max(self._next, now - self._burst * self._interval_s) + self._interval_s
            delay = self._next - now
        if delay > 0:
            self._closed.wait(delay)

    def close(self) -> None:
        self._closed.set()
