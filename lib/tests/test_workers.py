"""The threads that work the keys of a queue."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from external_storage.workqueue import Backoff, Workers, WorkQueue

PATIENCE_S = 20.0


@contextmanager
def working(
    work: Callable[[str], None], *, max_threads: int = 8, start_s: float = 0.001
) -> Iterator[WorkQueue[str]]:
    queue: WorkQueue[str] = WorkQueue("test", backoff=Backoff(start_s=start_s, max_s=start_s))
    workers = Workers(queue, work, max_threads=max_threads)
    workers.start()
    try:
        yield queue
    finally:
        stopped = workers.stop(PATIENCE_S)
    assert stopped


def test_every_key_is_worked() -> None:
    seen: set[str] = set()
    all_seen = threading.Event()

    def work(key: str) -> None:
        seen.add(key)
        if len(seen) == 100:
            all_seen.set()

    with working(work) as queue:
        for number in range(100):
            queue.add(str(number))
        assert all_seen.wait(PATIENCE_S)


def test_a_spare_worker_takes_the_key_that_comes_while_others_hang() -> None:
    release, reached = threading.Event(), threading.Event()

    def work(key: str) -> None:
        if key == "last":
            reached.set()
        else:
            release.wait(PATIENCE_S)

    with working(work, max_threads=4) as queue:
        for key in ("hangs", "hangs too", "hangs as well", "last"):
            queue.add(key)
        came_through = reached.wait(PATIENCE_S / 2)
        release.set()
    assert came_through


def test_there_are_never_more_workers_than_allowed() -> None:
    release, full = threading.Event(), threading.Semaphore(0)
    at_once: list[int] = []
    now = 0
    lock = threading.Lock()

    def work(_key: str) -> None:
        nonlocal now
        with lock:
            now += 1
            at_once.append(now)
        full.release()
        release.wait(PATIENCE_S)
        with lock:
            now -= 1

    with working(work, max_threads=3) as queue:
        for number in range(9):
            queue.add(str(number))
        assert all(full.acquire(timeout=PATIENCE_S) for _ in range(3))
        # A worker makes the next one before it begins its key: a fourth would be there by now.
        names = [thread.name for thread in threading.enumerate()]
        assert len([name for name in names if name.startswith("test-")]) == 3
        release.set()
        assert all(full.acquire(timeout=PATIENCE_S) for _ in range(6))
    assert max(at_once) == 3


def test_a_call_that_raises_is_retried_and_takes_no_worker_along() -> None:
    tries = 0
    done = threading.Event()

    def work(_key: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RuntimeError("a defect")
        done.set()

    with working(work, max_threads=1) as queue:
        queue.add("a")
        assert done.wait(PATIENCE_S)
    assert tries == 3


def test_a_call_that_exits_takes_no_worker_along() -> None:
    """An author's ``sys.exit()`` deep in a library must not stop all work for ever."""
    died, next_key = threading.Event(), threading.Event()

    def work(key: str) -> None:
        if key == "exits" and not died.is_set():
            died.set()
            raise SystemExit(1)
        next_key.set()

    with working(work, max_threads=1) as queue:
        queue.add("exits")
        assert died.wait(PATIENCE_S)
        queue.add("next")
        assert next_key.wait(0.5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_goes_on_when_no_further_thread_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pod at its limit of processes works on with the threads it has."""
    worked = threading.Event()
    with working(lambda _: worked.set(), max_threads=8) as queue:

        def start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            queue.add("a")
            assert worked.wait(0.5)


def test_stop_says_that_a_call_has_not_ended_in_time() -> None:
    queue: WorkQueue[str] = WorkQueue("test")
    began, release = threading.Event(), threading.Event()

    def work(_key: str) -> None:
        began.set()
        release.wait(PATIENCE_S)

    workers = Workers(queue, work)
    workers.start()
    queue.add("hangs")
    assert began.wait(PATIENCE_S)
    assert not workers.stop(0.01)
    release.set()
    assert workers.stop(PATIENCE_S)


def test_stop_waits_for_the_calls_in_progress_and_begins_no_other() -> None:
    worked: list[str] = []
    began, release = threading.Event(), threading.Event()
    queue: WorkQueue[str] = WorkQueue("test")

    def work(key: str) -> None:
        began.set()
        release.wait(PATIENCE_S)
        worked.append(key)

    workers = Workers(queue, work, max_threads=1)
    workers.start()
    queue.add("first")
    assert began.wait(PATIENCE_S)
    queue.add("second")
    stopper = threading.Thread(target=workers.stop, args=(PATIENCE_S,), daemon=True)
    stopper.start()
    while not queue.is_shut_down:  # until stop has shut the queue down
        stopper.join(0.001)
    release.set()
    stopper.join(PATIENCE_S)
    assert worked == ["first"]
