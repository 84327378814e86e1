"""The brake on mass release: ``kubectl delete pvc --all`` shall not wipe a node in a minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable


class Brake:
    """Counts the volumes that have come to be cleaned lately."""

    def __init__(
        self, limit: int, pause_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``limit`` 0: never holds."""
        self._limit = limit
        self._pause_s = pause_s
        self._clock = clock
        self._waiting: frozenset[str] = frozenset()
        self._releases: deque[float] = deque()
        """When, of all within the pause, whatever has become of them since."""
        self._until = 0.0

    def note(self, waiting: Iterable[str]) -> None:
        """All paths that wait to be cleaned now."""
        now = self._clock()
        known, self._waiting = self._waiting, frozenset(waiting)
        self._releases.extend(now for _ in self._waiting - known)
        while self._releases and self._releases[0] <= now - self._pause_s:
            self._releases.popleft()
        if self._limit and len(self._releases) > self._limit:
            # Kept: approving one of them must not let all the others go.
            self._until = self._releases[-1] + self._pause_s

    def left_s(self) -> float:
        """How long it holds from now; 0 when it does not."""
        return max(self._until - self._clock(), 0.0)

    def reason(self) -> str:
        """What to tell; empty when it does not hold."""
        if not self.left_s():
            return ""
        return (
            f"more than {self._limit} volumes were released within {self._pause_s:g} s: "
            "they are cleaned after as long a time without another, or by local-volume clean"
        )
