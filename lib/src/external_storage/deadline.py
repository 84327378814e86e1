"""The moment by which a call into the author's code has to be over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on a monotonic clock; pass ``remaining()`` on as a timeout."""

    at: float
    clock: Callable[[], float] = time.monotonic

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(self.at - self.clock(), 0.0)

    @property
    def expired(self) -> bool:
        return self.clock() >= self.at


NEVER = Deadline(float("inf"))

_current: ContextVar[Deadline] = ContextVar("deadline", default=NEVER)


def current() -> Deadline:
    """The deadline of the call this thread is in; ``NEVER`` outside of one."""
    return _current.get()


@contextmanager
def within(deadline: Deadline) -> Iterator[None]:
    """Make ``deadline`` the current one of this thread."""
    token = _current.set(deadline)
    try:
        yield
    finally:
        _current.reset(token)
