"""The work queue.

A key stands for an object whose state has to be looked at again, never for a change: however often
it is added, it is worked once, with the newest state, and never twice at the same time.

- A key that waits out a back-off is not brought forward by ``add``: updates and resyncs of an
  object that fails must not turn a back-off into a hot loop. ``wake`` is for the changes that make
  another try worthwhile.
- Keys belong to a group (the storage class). First tries go before retries, groups take turns, and
  ``group_limit`` bounds how many keys of one group are worked at once, so that one hanging backend
  cannot hold the workers of all others.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from external_storage.workqueue.ratelimit import Backoff, RateLimiter

K = TypeVar("K", bound=Hashable)


class _State(Enum):
    READY = auto()
    WORKING = auto()
    WAITING = auto()


@dataclass(slots=True, eq=False)
class _Entry(Generic[K]):
    key: K
    group: str
    state: _State = _State.READY
    retry: bool = False
    dirty: bool = False
    """Added again while it was worked: work it once more."""
    woken: bool = False
    """Woken while it was worked: work it once more whatever comes of this try."""
    next_group: str | None = None
    """Its group from the next time on, if that changed while it was worked."""
    requeue_after: float | None = None
    """Set by ``retry`` and ``add_after`` while it was worked."""
    since: float = 0.0
    turn: int = 0
    """Number of its place in the heap of waiting entries; an older place is void."""


@dataclass(slots=True, eq=False)
class _Group(Generic[K]):
    first: deque[_Entry[K]] = field(default_factory=deque)
    retries: deque[_Entry[K]] = field(default_factory=deque)
    working: int = 0

    @property
    def idle(self) -> bool:
        return not (self.first or self.retries or self.working)


class WorkQueue(Generic[K]):
    """See the module's text. Safe to use from any number of threads."""

    def __init__(
        self,
        name: str,
        *,
        backoff: Backoff | None = None,
        group_limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``backoff`` defaults to 1 s doubling to 5 min; ``group_limit`` None is no limit."""
        self.name = name
        self._limiter: RateLimiter[K] = RateLimiter(backoff or Backoff(start_s=1.0, max_s=300.0))
        self._group_limit = group_limit
        self._clock = clock
        self._condition = threading.Condition()
        self._entries: dict[K, _Entry[K]] = {}
        self._groups: dict[str, _Group[K]] = {}
        self._waiting: list[tuple[float, int, _Entry[K]]] = []
        self._turns = itertools.count(1)
        self._shut_down = False
        self._paused = False
        self._retries = 0
        self._tries: dict[K, int] = {}

    # -- adding

    def add(self, key: K, *, group: str | None = "") -> None:
        """Have ``key`` looked at; no effect while it waits out a back-off or is queued already.

        ``group`` None: the one it is in, if it is there.
        """
        with self._condition:
            if group is None:
                entry = self._entries.get(key)
                group = "" if entry is None else entry.next_group or entry.group
            self._add(key, group, wake=False)

    def wake(self, key: K, *, group: str = "") -> None:
        """Have ``key`` looked at now: its failures are forgotten and a back-off ends."""
        with self._condition:
            self._forget(key)
            self._add(key, group, wake=True)

    def add_after(self, key: K, delay_s: float, *, group: str = "") -> None:
        """Have ``key`` looked at in ``delay_s`` seconds, without counting a failure."""
        with self._condition:
            self._schedule(key, delay_s, group, retry=False)

    def retry(self, key: K, *, min_delay_s: float = 0.0, counts: bool = True) -> float:
        """Count a failure and work ``key`` again after its back-off; returns the wait in seconds.

        Called by the worker that holds ``key``, before ``done``. ``counts=False``: it is not one of
        the ``tries``, though the waits grow all the same.
        """
        with self._condition:
            self._retries += 1
            if counts:
                self._tries[key] = self._tries.get(key, 0) + 1
            delay = max(self._limiter.when(key), min_delay_s)
            entry = self._entries.get(key)
            self._schedule(key, delay, entry.group if entry else "", retry=True)
            return delay

    def give_up(self, key: K) -> None:
        """Leave ``key`` alone until it is woken; called by the worker that holds it."""
        with self._condition:
            self._forget(key)
            entry = self._entries.get(key)
            if entry is not None and entry.state is _State.WORKING:
                entry.requeue_after = math.inf

    def forget(self, key: K) -> None:
        """The work on ``key`` succeeded or is pointless: its failures no longer count."""
        with self._condition:
            self._forget(key)

    def tries(self, key: K) -> int:
        """How many of the failures in a row counted as tries."""
        with self._condition:
            return self._tries.get(key, 0)

    def failures(self, key: K) -> int:
        """How often ``key`` failed in a row."""
        with self._condition:
            return self._limiter.failures(key)

    # -- working

    def get(self, timeout_s: float | None = None) -> K | None:
        """The next key to work, or None after ``timeout_s`` or once the queue is shut down."""
        deadline = None if timeout_s is None else self._clock() + timeout_s
        with self._condition:
            while not self._shut_down:
                entry = self._take()
                if entry is not None:
                    return entry.key
                wait = self._until_next()
                if deadline is not None:
                    left = deadline - self._clock()
                    if left <= 0:
                        # Another waiter may have relied on this one to wake for the next due key.
                        self._condition.notify()
                        return None
                    wait = left if wait is None else min(wait, left)
                self._condition.wait(wait)
            return None

    def done(self, key: K) -> None:
        """The worker that got ``key`` has finished with it."""
        with self._condition:
            entry = self._entries[key]
            if entry.state is not _State.WORKING:
                raise ValueError(f"{self.name}: {key!r} is not being worked")
            name, group = entry.group, self._groups[entry.group]
            group.working -= 1
            if entry.next_group is not None:
                entry.group, entry.next_group = entry.next_group, None
            if entry.woken:
                self._forget(key)
                self._make_ready(entry, retry=False)
            elif entry.requeue_after is not None:
                self._park(entry, entry.requeue_after)
            elif entry.dirty:
                self._make_ready(entry, retry=False)
            else:
                del self._entries[key]
            if group.idle:
                del self._groups[name]
            # A slot of the group has become free: somebody may be waiting for just that.
            self._condition.notify()

    def pause(self) -> None:
        """Hand out no keys until ``resume``; they gather meanwhile."""
        with self._condition:
            self._paused = True

    def resume(self) -> None:
        with self._condition:
            self._paused = False
            self._condition.notify_all()

    def shut_down(self) -> None:
        """Hand out no more keys; those being worked may still be finished with ``done``."""
        with self._condition:
            self._shut_down = True
            self._condition.notify_all()

    # -- looking

    @property
    def is_shut_down(self) -> bool:
        return self._shut_down

    def __len__(self) -> int:
        """Keys that could be worked now; those in a back-off or being worked are not counted."""
        with self._condition:
            self._expire_waits()
            return self._ready_count()

    def waiting(self) -> int:
        """Keys that wait out a back-off or a delay."""
        with self._condition:
            self._expire_waits()
            return sum(e.state is _State.WAITING for e in self._entries.values())

    def working(self) -> int:
        """Keys that are being worked."""
        with self._condition:
            return sum(group.working for group in self._groups.values())

    def retries(self) -> int:
        """How often ``retry`` was called."""
        return self._retries

    def oldest_age_s(self) -> float:
        """Seconds since the longest-waiting ready key was added; 0 when there is none."""
        with self._condition:
            ready = [e.since for e in self._entries.values() if e.state is _State.READY]
            return self._clock() - min(ready) if ready else 0.0

    # -- inside; the lock is held

    def _forget(self, key: K) -> None:
        self._limiter.forget(key)
        self._tries.pop(key, None)

    def _add(self, key: K, group: str, *, wake: bool) -> None:
        if self._shut_down:
            return
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(key, group)
            self._make_ready(entry, retry=False)
        elif entry.state is _State.WORKING:
            entry.dirty = True
            entry.woken = entry.woken or wake
            entry.next_group = group
        elif entry.state is _State.WAITING:
            entry.group = group
            if wake:
                self._make_ready(entry, retry=False)
        elif entry.group != group or (wake and entry.retry):
            self._withdraw(entry)
            entry.group = group
            self._make_ready(entry, retry=entry.retry and not wake)

    def _schedule(self, key: K, delay_s: float, group: str, *, retry: bool) -> None:
        if self._shut_down:
            return
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(key, group, retry=retry)
            self._park(entry, delay_s)
        elif entry.state is _State.WORKING:
            entry.requeue_after, entry.retry = delay_s, retry

    def _park(self, entry: _Entry[K], delay_s: float) -> None:
        entry.state, entry.dirty, entry.requeue_after = _State.WAITING, False, None
        entry.turn = next(self._turns)
        if delay_s < math.inf:
            heapq.heappush(self._waiting, (self._clock() + delay_s, entry.turn, entry))
            self._condition.notify()

    def _withdraw(self, entry: _Entry[K]) -> None:
        group = self._groups[entry.group]
        (group.retries if entry.retry else group.first).remove(entry)
        if group.idle:
            del self._groups[entry.group]

    def _make_ready(self, entry: _Entry[K], *, retry: bool) -> None:
        entry.state, entry.retry = _State.READY, retry
        entry.dirty, entry.woken, entry.requeue_after = False, False, None
        entry.turn, entry.since = 0, self._clock()
        group = self._groups.setdefault(entry.group, _Group())
        (group.retries if retry else group.first).append(entry)
        self._condition.notify()

    def _expire_waits(self) -> None:
        now = self._clock()
        while self._waiting and self._waiting[0][0] <= now:
            _, turn, entry = heapq.heappop(self._waiting)
            if entry.state is _State.WAITING and entry.turn == turn:
                self._make_ready(entry, retry=entry.retry)

    def _until_next(self) -> float | None:
        return max(self._waiting[0][0] - self._clock(), 0.0) if self._waiting else None

    def _take(self) -> _Entry[K] | None:
        self._expire_waits()
        found = None if self._paused else self._peek()
        if found is None:
            return None
        name, lane = found
        entry = lane.popleft()
        entry.state = _State.WORKING
        # The group goes to the end of the round, so that groups take turns.
        group = self._groups.pop(name)
        group.working += 1
        self._groups[name] = group
        return entry

    def _peek(self) -> tuple[str, deque[_Entry[K]]] | None:
        """The lane to take from: any group's first tries before any group's retries."""
        retries = None
        for name, group in self._groups.items():
            if self._group_limit is not None and group.working >= self._group_limit:
                continue
            if group.first:
                return name, group.first
            if group.retries and retries is None:
                retries = name, group.retries
        return retries

    def _ready_count(self) -> int:
        return sum(len(g.first) + len(g.retries) for g in self._groups.values())
