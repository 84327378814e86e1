"""The work queue and its back-off; ``test_workqueue_any_order`` tries any order of calls."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.testing.builders import Clock
from external_storage.workqueue import Backoff, RateLimiter, WorkQueue

BACKOFF = Backoff(start_s=1.0, max_s=8.0)
PATIENCE_S = 20.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue("test", backoff=BACKOFF, clock=clock)


def take(queue: WorkQueue[str]) -> str | None:
    return queue.get(timeout_s=0)


def fail(queue: WorkQueue[str], key: str) -> None:
    """Add ``key`` and let its first try fail: it then waits out one second."""
    queue.add(key)
    assert take(queue) == key
    queue.retry(key)
    queue.done(key)


# -- adding


def test_a_key_added_many_times_is_worked_once(queue: WorkQueue[str]) -> None:
    for _ in range(3):
        queue.add("a")
    assert take(queue) == "a"
    queue.done("a")
    assert take(queue) is None


def test_a_key_is_never_worked_twice_at_the_same_time(queue: WorkQueue[str]) -> None:
    queue.add("a")
    assert take(queue) == "a"
    queue.add("a")
    queue.wake("a")
    assert take(queue) is None


def test_a_key_added_while_it_is_worked_is_worked_again(queue: WorkQueue[str]) -> None:
    queue.add("a")
    take(queue)
    queue.add("a")
    queue.done("a")
    assert take(queue) == "a"
    queue.done("a")
    assert take(queue) is None


def test_a_waiting_key_is_not_brought_forward_by_add(queue: WorkQueue[str], clock: Clock) -> None:
    fail(queue, "a")
    queue.add("a")
    assert take(queue) is None
    clock.advance(0.99)
    assert take(queue) is None
    clock.advance(0.01)
    assert take(queue) == "a"


def test_an_update_during_a_failing_try_does_not_cut_its_back_off_short(
    queue: WorkQueue[str], clock: Clock
) -> None:
    queue.add("a")
    take(queue)
    queue.add("a")
    queue.retry("a")
    queue.done("a")
    assert take(queue) is None
    clock.advance(1.0)
    assert take(queue) == "a"
    queue.done("a")
    assert take(queue) is None


def test_wake_ends_a_back_off_and_forgets_the_failures(queue: WorkQueue[str]) -> None:
    fail(queue, "a")
    queue.wake("a")
    assert take(queue) == "a"
    assert queue.failures("a") == 0
    assert queue.retry("a") == 1.0


def test_a_key_woken_while_it_is_worked_is_tried_again_at_once(
    queue: WorkQueue[str], clock: Clock
) -> None:
    queue.add("a")
    take(queue)
    queue.wake("a")
    queue.retry("a")
    queue.done("a")
    assert take(queue) == "a"
    assert queue.failures("a") == 0
    queue.done("a")
    clock.advance(100)
    assert take(queue) is None


def test_an_ended_back_off_leaves_no_second_try_behind(queue: WorkQueue[str], clock: Clock) -> None:
    fail(queue, "a")
    queue.wake("a")
    assert take(queue) == "a"
    queue.retry("a", min_delay_s=50)
    queue.done("a")
    clock.advance(10)
    assert take(queue) is None
    clock.advance(40)
    assert take(queue) == "a"


@pytest.mark.parametrize("held", [False, True])
def test_add_after_waits_without_counting_a_failure(
    queue: WorkQueue[str], clock: Clock, held: bool
) -> None:
    if held:
        queue.add("a")
        take(queue)
    queue.add_after("a", 5)
    if held:
        queue.done("a")
    assert queue.failures("a") == 0
    clock.advance(4.9)
    assert take(queue) is None
    clock.advance(0.1)
    assert take(queue) == "a"


def test_retry_waits_longer_after_each_failure_up_to_the_limit(queue: WorkQueue[str]) -> None:
    queue.add("a")
    take(queue)
    assert [queue.retry("a") for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert queue.failures("a") == 5


def test_retry_waits_at_least_as_long_as_told(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a")
    take(queue)
    assert queue.retry("a", min_delay_s=30) == 30
    queue.done("a")
    clock.advance(29)
    assert take(queue) is None
    clock.advance(1)
    assert take(queue) == "a"


def test_forget_makes_the_next_back_off_short_again(queue: WorkQueue[str]) -> None:
    queue.add("a")
    take(queue)
    queue.retry("a")
    queue.retry("a")
    queue.forget("a")
    assert queue.failures("a") == 0
    assert queue.retry("a") == 1.0


# -- order


def test_keys_of_one_group_come_in_the_order_they_were_added(queue: WorkQueue[str]) -> None:
    for key in "cab":
        queue.add(key)
    assert [take(queue) for _ in range(3)] == ["c", "a", "b"]


@pytest.mark.parametrize("group", ["", "another"])
def test_first_tries_go_before_retries(queue: WorkQueue[str], clock: Clock, group: str) -> None:
    fail(queue, "failed")
    clock.advance(1)
    queue.add("first", group=group)
    assert [take(queue), take(queue)] == ["first", "failed"]


def test_groups_take_turns(queue: WorkQueue[str]) -> None:
    for key in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.add(key, group=key[0])
    taken = [take(queue) for _ in range(6)]
    assert taken == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_hanging_group_does_not_hold_up_another(clock: Clock) -> None:
    queue: WorkQueue[str] = WorkQueue("test", group_limit=2, clock=clock)
    for key in ("a1", "a2", "a3", "b1"):
        queue.add(key, group=key[0])
    assert [take(queue) for _ in range(4)] == ["a1", "b1", "a2", None]
    queue.done("a2")
    assert take(queue) == "a3"


def test_a_retry_counts_against_the_limit_of_its_group(clock: Clock) -> None:
    queue: WorkQueue[str] = WorkQueue("test", backoff=BACKOFF, group_limit=1, clock=clock)
    queue.add("a1", group="a")
    take(queue)
    queue.retry("a1")
    queue.done("a1")
    clock.advance(1)
    queue.add("a2", group="a")
    assert take(queue) == "a2"
    assert take(queue) is None
    queue.done("a2")
    assert take(queue) == "a1"


# -- life


def test_shut_down_hands_out_no_more_keys(queue: WorkQueue[str]) -> None:
    queue.add("a")
    queue.add("b")
    assert take(queue) == "a"
    queue.shut_down()
    assert queue.get() is None
    queue.add("c")
    queue.retry("a")
    queue.done("a")
    assert (len(queue), queue.waiting(), queue.working()) == (1, 0, 0)


def test_done_without_get_is_an_error(queue: WorkQueue[str]) -> None:
    queue.add("a")
    with pytest.raises(ValueError, match="'a' is not being worked"):
        queue.done("a")
    take(queue)
    queue.done("a")


@contextmanager
def getting(queue: WorkQueue[str]) -> Iterator[list[str | None]]:
    """A thread that waits in ``get``; what it got is there when the block is left."""
    got: list[str | None] = []
    thread = threading.Thread(target=lambda: got.append(queue.get(PATIENCE_S)), daemon=True)
    thread.start()
    yield got
    thread.join(PATIENCE_S / 2)
    assert not thread.is_alive(), "get has not returned"


def test_a_waiting_get_returns_when_a_key_is_added() -> None:
    queue: WorkQueue[str] = WorkQueue("test")
    with getting(queue) as got:
        queue.add("a")
    assert got == ["a"]


def test_a_waiting_get_returns_when_a_slot_of_the_group_becomes_free() -> None:
    queue: WorkQueue[str] = WorkQueue("test", group_limit=1)
    queue.add("a1", group="a")
    assert take(queue) == "a1"
    queue.add("a2", group="a")
    with getting(queue) as got:
        queue.done("a1")
    assert got == ["a2"]


def test_a_waiting_get_returns_when_a_back_off_ends() -> None:
    queue: WorkQueue[str] = WorkQueue("test")
    with getting(queue) as got:
        queue.add_after("a", 0.01)
    assert got == ["a"]


def test_a_waiting_get_returns_when_the_queue_is_shut_down() -> None:
    queue: WorkQueue[str] = WorkQueue("test")
    with getting(queue) as got:
        queue.shut_down()
    assert got == [None]


# -- looking


def test_the_gauges_tell_ready_waiting_and_working_keys_apart(
    queue: WorkQueue[str], clock: Clock
) -> None:
    fail(queue, "waits")
    queue.add("worked")
    take(queue)
    assert queue.oldest_age_s() == 0
    queue.add("ready")
    clock.advance(0.25)
    queue.add("ready too")
    assert (len(queue), queue.waiting(), queue.working()) == (2, 1, 1)
    assert queue.oldest_age_s() == 0.25


def test_a_key_follows_its_claim_into_another_group(clock: Clock) -> None:
    """A claim without a class gets the default class later: it counts for that one from then on."""
    queue: WorkQueue[str] = WorkQueue("test", backoff=BACKOFF, group_limit=1, clock=clock)
    queue.add("claim", group="")
    take(queue)
    queue.retry("claim")
    queue.done("claim")
    queue.wake("claim", group="default")
    assert take(queue) == "claim"
    queue.add("other", group="default")
    assert take(queue) is None


def test_a_woken_key_whose_back_off_is_over_counts_as_a_first_try(
    queue: WorkQueue[str], clock: Clock
) -> None:
    fail(queue, "other")
    fail(queue, "woken")
    clock.advance(1)
    queue.wake("woken")
    assert take(queue) == "woken"


# -- back-off


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0.001, 10), st.floats(10, 1e6))
def test_a_back_off_never_exceeds_its_limit_and_jitter(
    failures: int, jitter: float, start: float, longest: float
) -> None:
    backoff = Backoff(start_s=start, max_s=longest, jitter=jitter)
    shortest, most = backoff.delay(failures, lambda: 0.0), backoff.delay(failures, lambda: 1.0)
    assert start <= shortest <= longest
    assert most == pytest.approx(shortest * (1 + jitter))
    assert shortest <= backoff.delay(failures) <= most
    assert shortest <= backoff.delay(failures + 1, lambda: 0.0)


def test_the_failures_of_each_key_are_counted_apart() -> None:
    limiter: RateLimiter[str] = RateLimiter(BACKOFF)
    assert [limiter.when("a"), limiter.when("a"), limiter.when("b")] == [1.0, 2.0, 1.0]
    limiter.forget("a")
    assert (limiter.failures("a"), limiter.failures("b")) == (0, 1)


def test_a_key_that_was_given_up_is_left_alone_until_it_is_woken(
    queue: WorkQueue[str], clock: Clock
) -> None:
    queue.add("a")
    take(queue)
    queue.give_up("a")
    queue.done("a")
    assert (queue.failures("a"), queue.waiting()) == (0, 1)
    queue.add("a")
    clock.advance(1e9)
    assert take(queue) is None
    queue.wake("a")
    assert take(queue) == "a"


def test_a_key_woken_while_it_is_given_up_is_worked_once_more(queue: WorkQueue[str]) -> None:
    queue.add("a")
    take(queue)
    queue.wake("a")
    queue.give_up("a")
    queue.done("a")
    assert take(queue) == "a"


def test_a_paused_queue_hands_out_nothing_and_forgets_nothing(
    queue: WorkQueue[str], clock: Clock
) -> None:
    queue.pause()
    queue.add("a")
    queue.add_after("b", 1)
    clock.advance(2)
    assert take(queue) is None
    assert len(queue) == 2
    queue.resume()
    assert [take(queue), take(queue)] == ["a", "b"]
