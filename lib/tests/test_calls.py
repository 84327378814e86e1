"""Deadlines of calls, and those that hang."""

from __future__ import annotations

import threading

import pytest

from external_storage import deadline
from external_storage.calls import Calls
from external_storage.deadline import NEVER, Deadline
from external_storage.testing.builders import Clock

PATIENCE_S = 30.0


@pytest.fixture
def calls() -> Calls:
    return Calls(overrun_s=0.05)


def test_a_deadline_says_what_is_left() -> None:
    clock = Clock(100.0)
    limit = Deadline(110.0, clock)
    clock.advance(4)
    assert (limit.remaining(), limit.expired) == (6.0, False)
    clock.advance(7)
    assert (limit.remaining(), limit.expired) == (0.0, True)
    assert not NEVER.expired


def test_the_current_deadline_is_that_of_the_call_this_thread_is_in(calls: Calls) -> None:
    mine = Deadline(1e9)
    seen = []
    with calls.call("provision", "a", mine, tell=lambda _: None):
        seen.append(deadline.current())
        other = threading.Thread(target=lambda: seen.append(deadline.current()))
        other.start()
        other.join()
    assert seen == [mine, NEVER]
    assert deadline.current() is NEVER


def test_a_call_that_overruns_is_told_once_and_counted_until_it_returns(calls: Calls) -> None:
    told: list[float] = []
    heard, release = threading.Event(), threading.Event()

    def tell(seconds: float) -> None:
        told.append(seconds)
        heard.set()

    def hang() -> None:
        with calls.call("provision", "a", Deadline(0.0), tell=tell):
            release.wait(PATIENCE_S)

    calls.start()
    thread = threading.Thread(target=hang)
    thread.start()
    try:
        assert heard.wait(PATIENCE_S)
        assert calls.hanging(thread)
        assert not calls.hanging(threading.current_thread())
        assert calls.stuck() == 1
    finally:
        release.set()
        thread.join()
        calls.stop()
    assert calls.stuck() == 0
    assert len(told) == 1
    assert told[0] >= 0.05


def test_a_call_within_its_deadline_is_not_told(calls: Calls) -> None:
    told: list[float] = []
    hung = threading.Event()
    calls.start()
    with (
        calls.call("provision", "slow", Deadline(1e12), tell=told.append),
        calls.call("delete", "hangs", Deadline(0.0), tell=lambda _: hung.set()),
    ):
        # The watcher has looked, and found only the other one.
        assert hung.wait(PATIENCE_S)
        assert calls.stuck() == 1
    calls.stop()
    assert told == []


def test_the_watcher_wakes_for_a_call_after_a_long_time_without_any(calls: Calls) -> None:
    calls.start()
    while not calls._asleep:
        threading.Event().wait(0.01)
    heard = threading.Event()
    with calls.call("provision", "a", Deadline(0.0), tell=lambda _: heard.set()):
        assert heard.wait(PATIENCE_S)
    calls.stop()


def test_a_teller_that_fails_does_not_end_the_watch(calls: Calls) -> None:
    calls.start()
    heard = threading.Event()

    def fail(_seconds: float) -> None:
        raise RuntimeError("no events today")

    with (
        calls.call("provision", "a", Deadline(0.0), tell=fail),
        calls.call("provision", "b", Deadline(0.0), tell=lambda _: heard.set()),
    ):
        assert heard.wait(PATIENCE_S)
    calls.stop()
