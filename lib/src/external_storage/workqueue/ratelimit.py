"""How long to wait before a failed key is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_MAX_DOUBLINGS = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential waits: ``start_s``, twice that, and so on up to ``max_s``.

    ``jitter`` is the part of the wait that is random (0.1: up to 10 % longer), so that many
    clients that failed together do not come back together.
    """

    start_s: float
    max_s: float
    jitter: float = 0.0

    def delay(self, failures: int, draw: Callable[[], float] = random.random) -> float:
        """Seconds to wait after the ``failures``-th failure in a row (1 is the first)."""
        doublings = min(max(failures - 1, 0), _MAX_DOUBLINGS)
        delay = min(self.start_s * 2.0**doublings, self.max_s)
        return delay * (1.0 + self.jitter * draw())


class RateLimiter(Generic[K]):
    """Counts the failures of each key and turns them into waits. Not locked: its queue is."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._failures: dict[K, int] = {}

    def when(self, key: K) -> float:
        """Count one more failure of ``key``; the seconds to wait."""
        count = self._failures.get(key, 0) + 1
        self._failures[key] = count
        return self._backoff.delay(count)

    def failures(self, key: K) -> int:
        return self._failures.get(key, 0)

    def forget(self, key: K) -> None:
        self._failures.pop(key, None)
