"""The work queue under any order of calls, against a model."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from external_storage.testing.builders import Clock
from external_storage.workqueue import Backoff, WorkQueue

BACKOFF = Backoff(start_s=1.0, max_s=8.0)


@dataclass
class Model:
    """What the queue should know of one key: ``ready``, ``waiting`` or ``working``."""

    state: str
    retry: bool | None = False
    """None: a retry that was woken while it was ready; nothing is promised about its place."""
    due: float = 0.0
    again: bool = False
    woken: bool = False
    delay: float | None = None


class QueueMachine(RuleBasedStateMachine):
    """Any order of calls, on a clock, against a model of one entry for each key."""

    KEYS = ("a1", "a2", "a3", "b1", "b2", "c1")
    LIMIT = 2

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue: WorkQueue[str] = WorkQueue(
            "test", backoff=BACKOFF, group_limit=self.LIMIT, clock=self.clock
        )
        self.model: dict[str, Model] = {}

    def _working(self) -> list[str]:
        return [key for key, entry in self.model.items() if entry.state == "working"]

    def _takeable(self) -> dict[str, Model]:
        groups = [key[0] for key in self._working()]
        return {
            key: entry
            for key, entry in self.model.items()
            if entry.state == "ready" and groups.count(key[0]) < self.LIMIT
        }

    def _expire(self) -> None:
        for entry in self.model.values():
            if entry.state == "waiting" and entry.due <= self.clock.now:
                entry.state = "ready"

    @initialize(keys=st.sets(st.sampled_from(KEYS)))
    def some_keys(self, keys: set[str]) -> None:
        for key in sorted(keys):
            self.add(key)

    @rule(key=st.sampled_from(KEYS))
    def add(self, key: str) -> None:
        self.queue.add(key, group=key[0])
        entry = self.model.setdefault(key, Model("ready"))
        entry.again = entry.state == "working"

    @rule(key=st.sampled_from(KEYS))
    def wake(self, key: str) -> None:
        self.queue.wake(key, group=key[0])
        entry = self.model.setdefault(key, Model("ready"))
        entry.woken = entry.state == "working"
        if entry.state == "waiting":
            self.model[key] = Model("ready")
        elif entry.state == "ready" and entry.retry:
            entry.retry = None

    @rule(key=st.sampled_from(KEYS), delay=st.floats(0, 20))
    def add_after(self, key: str, delay: float) -> None:
        self.queue.add_after(key, delay, group=key[0])
        entry = self.model.get(key)
        if entry is None:
            self.model[key] = Model("waiting", due=self.clock.now + delay)
        elif entry.state == "working":
            entry.delay, entry.retry = delay, False

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def get(self) -> None:
        self._expire()
        takeable = self._takeable()
        key = self.queue.get(timeout_s=0)
        if key is None:
            assert not takeable
            return
        assert key in takeable, "not there, waiting, being worked, or above its group's limit"
        if takeable[key].retry:
            assert not any(entry.retry is False for entry in takeable.values())
        self.model[key] = Model("working")

    @rule()
    def get_and_fail(self) -> None:
        self.get()
        for key in self._working()[-1:]:
            self._fail(key)
            self._done(key)

    @precondition(lambda self: self._working())
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        self._fail(data.draw(st.sampled_from(self._working())))

    def _fail(self, key: str) -> None:
        before = self.queue.failures(key)
        entry = self.model[key]
        entry.delay, entry.retry = self.queue.retry(key), True
        assert entry.delay == BACKOFF.delay(before + 1)
        assert self.queue.failures(key) == before + 1

    @precondition(lambda self: self._working())
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        self._done(data.draw(st.sampled_from(self._working())))

    def _done(self, key: str) -> None:
        self.queue.done(key)
        entry = self.model.pop(key)
        if entry.woken:
            assert self.queue.failures(key) == 0
            self.model[key] = Model("ready")
        elif entry.delay is not None:
            due = self.clock.now + entry.delay
            self.model[key] = Model("waiting", due=due, retry=entry.retry)
        elif entry.again:
            self.model[key] = Model("ready")

    @invariant()
    def counts_agree(self) -> None:
        self._expire()
        states = [entry.state for entry in self.model.values()]
        assert len(self.queue) == states.count("ready")
        assert self.queue.waiting() == states.count("waiting")
        assert self.queue.working() == states.count("working")

    def teardown(self) -> None:
        """Nothing is lost: what is known is worked in the end, and then nothing is left."""
        expected = {k for k, e in self.model.items() if e.state != "working" or e.again or e.woken}
        expected |= {key for key, entry in self.model.items() if entry.delay is not None}
        for key in self._working():
            self.queue.done(key)
        self.clock.advance(1000)
        worked = set()
        while (taken := self.queue.get(timeout_s=0)) is not None:
            worked.add(taken)
            self.queue.done(taken)
        assert worked == expected
        assert not self.queue._entries
        assert not self.queue._groups


QueueMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyOrderOfCalls = QueueMachine.TestCase
