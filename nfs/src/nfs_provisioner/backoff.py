"""Waiting longer after each failure."""

from __future__ import annotations

import time
from collections.abc import Callable


class Backoff:
    """A delay that doubles from ``first_s`` to ``longest_s`` seconds. Not thread-safe."""

    def __init__(
        self,
        *,
        first_s: float,
        longest_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._delay_s = first_s
        self._not_before = float("-inf")

    def failed(self) -> float:
        """Note a failure; how many seconds to wait now."""
        delay_s = self._delay_s
        self._not_before = self._clock() + delay_s
        self._delay_s = min(delay_s * 2, self._longest_s)
        return delay_s

    def reset(self) -> None:
        """Things went well: the next failure waits the shortest time, and nothing waits now."""
        self._delay_s = self._first_s
        self._not_before = float("-inf")

    def remaining_s(self) -> float:
        """Seconds left to wait, 0 if none."""
        return max(0.0, self._not_before - self._clock())
