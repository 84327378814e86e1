"""The calls into an author's code that are going on, and those that hang.

A call has a deadline, and the author is trusted to keep it. One that overruns it by 30 s is stuck:
it is told once, counted, and not waited for at exit. It cannot be ended from here, and it is never
made a second time beside itself, because its key stays with its worker.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from external_storage import deadline as deadlines
from external_storage.deadline import Deadline
from external_storage.logs import get_logger

log = get_logger(__name__)

OVERRUN_S = 30.0
_LONGEST_WAIT_S = 3600.0


@dataclass(slots=True)
class _Call:
    what: str
    key: str
    started: float
    stuck_at: float
    thread: threading.Thread
    tell: Callable[[float], None]
    stuck: bool = False


class Calls:
    """Watches over the calls of one controller. Safe to use from any number of threads."""

    def __init__(
        self, *, overrun_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._overrun_s = OVERRUN_S if overrun_s is None else overrun_s
        self._clock = clock
        self._condition = threading.Condition()
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()
        self._stopping = False
        self._asleep = False
        """Whether the watcher waits for the next call, and not for a moment."""
        self._thread = threading.Thread(target=self._run, name="calls", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @contextmanager
    def call(
        self, what: str, key: str, deadline: Deadline, *, tell: Callable[[float], None]
    ) -> Iterator[None]:
        """Around one call; ``tell`` is told once, with the seconds it took so far, if it hangs."""
        started = self._clock()
        stuck_at = started + deadline.remaining() + self._overrun_s
        made = _Call(what, key, started, stuck_at, threading.current_thread(), tell)
        number = next(self._numbers)
        with self._condition:
            self._calls[number] = made
            if self._asleep:
                self._asleep = False
                self._condition.notify()
        try:
            with deadlines.within(deadline):
                yield
        finally:
            with self._condition:
                del self._calls[number]
            if made.stuck:
                seconds = round(self._clock() - started, 1)
                log.warning("a call that hung has returned", call=what, key=key, seconds=seconds)

    def stuck(self) -> int:
        """How many calls hang at this moment."""
        with self._condition:
            return sum(call.stuck for call in self._calls.values())

    def hanging(self, thread: threading.Thread) -> bool:
        """Whether this thread is in a call that hangs."""
        with self._condition:
            return any(call.stuck and call.thread is thread for call in self._calls.values())

    def _run(self) -> None:
        with self._condition:
            while not self._stopping:
                self._look()
                pending = [call.stuck_at for call in self._calls.values() if not call.stuck]
                if pending:
                    wait = min(pending) - self._clock()
                    self._condition.wait(min(max(wait, 0.01), _LONGEST_WAIT_S))
                    continue
                # Calls come and go in milliseconds: only a quiet controller is left to its sleep.
                self._condition.wait(self._overrun_s)
                if not self._calls and not self._stopping:
                    self._asleep = True
                    self._condition.wait()

    def _look(self) -> None:
        now = self._clock()
        for call in self._calls.values():
            if not call.stuck and call.stuck_at <= now:
                call.stuck = True
                self._tell(call, now - call.started)

    def _tell(self, call: _Call, seconds: float) -> None:
        log.error("a call hangs", call=call.what, key=call.key, seconds=round(seconds, 1))
        try:
            call.tell(seconds)
        except Exception:
            log.exception("telling of a call that hangs failed", call=call.what)
