"""Processes that are killed at their deadline, and never outlive us."""

import operator
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from external_storage import worker
from external_storage.worker import (
    WorkerDied,
    WorkerError,
    WorkerProcess,
    WorkersStuck,
    WorkerTimeout,
)

LONG_S = 60.0
HELPERS = """
import os, subprocess, sys, time

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one}-{two}")

class Picky(Exception):
    def __init__(self, code):
        super().__init__(code)
        self.code = code

def odd(): raise Odd(1, 2)
def picky(code): raise Picky(code)
def unsendable(): return lambda: None
def quit_with(code): sys.exit(code)
def loaded(): return [name for name in sys.modules if name.startswith("external_storage")]
def group(): return os.getpid(), os.getpgrp(), os.getppid()
def talk(): print("noise"); sys.stdout.flush(); return "quiet"
def grandchild(path):
    child = subprocess.Popen(["sleep", "1000"])
    with open(path + ".new", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(path + ".new", path)
    time.sleep(1000)
def hang_in_open(path):
    with open(path + ".began", "w"): pass
    open(path)
def freeze_in_write(path, started):
    with open(started, "w"): pass
    with open(path, "w") as file: file.write("x")
"""


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A module that the process can import, unlike this one."""
    (tmp_path / "worker_helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("worker_helpers")
    del sys.modules["worker_helpers"]


@pytest.fixture
def process() -> Iterator[WorkerProcess]:
    with WorkerProcess("test") as made:
        yield made


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < deadline, f"not within {LONG_S} s: {what}"
        time.sleep(0.01)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_gone(pid: int) -> bool:
    """Whether a process runs no more; as a zombie it is somebody else's to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_calls_run_in_one_other_process(process: WorkerProcess) -> None:
    first = process.call(os.getpid, timeout_s=LONG_S)
    assert first != os.getpid()
    assert process.call(os.getpid, timeout_s=LONG_S) == first
    assert process.call(operator.add, 2, 3, timeout_s=LONG_S) == 5


def test_it_leads_a_group_of_its_own(process: WorkerProcess, helpers: object) -> None:
    pid, group, parent = process.call(helpers.group, timeout_s=LONG_S)  # type: ignore[attr-defined]
    assert pid == group
    assert parent == os.getpid()


def test_large_arguments_and_results(process: WorkerProcess) -> None:
    data = os.urandom(5_000_000)
    assert process.call(operator.add, data, data, timeout_s=LONG_S) == data + data


def test_an_exception_comes_over_as_itself_with_its_traceback(process: WorkerProcess) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        process.call(os.stat, "/no/such", timeout_s=LONG_S)
    assert caught.value.filename == "/no/such"
    assert "Traceback" in caught.value.__notes__[0]
    with pytest.raises(ZeroDivisionError):
        process.call(operator.truediv, 1, 0, timeout_s=LONG_S)


def test_an_exception_of_ones_own_keeps_its_attributes(
    process: WorkerProcess, helpers: object
) -> None:
    with pytest.raises(helpers.Picky) as caught:  # type: ignore[attr-defined]
        process.call(helpers.picky, 7, timeout_s=LONG_S)  # type: ignore[attr-defined]
    assert caught.value.code == 7


def test_what_cannot_be_pickled_is_told_by_name(process: WorkerProcess, helpers: object) -> None:
    pid = process.call(os.getpid, timeout_s=LONG_S)
    with pytest.raises(WorkerError, match="Odd: 1-2"):
        process.call(helpers.odd, timeout_s=LONG_S)  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match="result cannot be sent"):
        process.call(helpers.unsendable, timeout_s=LONG_S)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="module-level"):
        process.call(lambda: None, timeout_s=LONG_S)
    with pytest.raises(ValueError, match="module-level"):
        process.call(operator.add, 1, threading.Lock(), timeout_s=LONG_S)
    assert process.call(os.getpid, timeout_s=LONG_S) == pid


def test_what_it_prints_does_not_disturb(process: WorkerProcess, helpers: object) -> None:
    assert process.call(helpers.talk, timeout_s=LONG_S) == "quiet"  # type: ignore[attr-defined]


def test_a_call_that_hangs_is_killed_at_its_deadline(
    process: WorkerProcess, helpers: object, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")  # open() for reading waits in the kernel for a writer
    pid = process.call(os.getpid, timeout_s=LONG_S)
    with pytest.raises(WorkerTimeout, match=r"test: killed after 0\.5 s"):
        process.call(helpers.hang_in_open, str(tmp_path / "fifo"), timeout_s=0.5)  # type: ignore[attr-defined]
    assert (tmp_path / "fifo.began").exists()
    assert is_gone(pid)
    assert process.stuck == 0
    assert process.call(os.getpid, timeout_s=LONG_S) != pid


def test_a_stopped_process_is_killed_as_well(process: WorkerProcess) -> None:
    pid = process.call(os.getpid, timeout_s=LONG_S)
    with pytest.raises(WorkerTimeout):
        process.call(os.kill, pid, signal.SIGSTOP, timeout_s=0.5)
    assert is_gone(pid)


def test_children_of_the_call_are_killed_with_it(
    process: WorkerProcess, helpers: object, tmp_path: Path
) -> None:
    told = tmp_path / "pids"
    thread_error: list[BaseException] = []

    def call() -> None:
        try:
            process.call(helpers.grandchild, str(told), timeout_s=LONG_S)  # type: ignore[attr-defined]
        except WorkerDied as error:
            thread_error.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(told.exists, "the call has begun")
    pids = [int(pid) for pid in told.read_text().split()]
    process.close()
    thread.join(LONG_S)
    assert "closed" in str(thread_error[0])
    for pid in pids:
        wait_until(partial(is_gone, pid), f"{pid} is gone")


def test_a_process_killed_from_outside_during_a_call(process: WorkerProcess) -> None:
    pid = process.call(os.getpid, timeout_s=LONG_S)
    with pytest.raises(WorkerDied, match="killed by signal 9 during a call"):
        process.call(os.kill, pid, signal.SIGKILL, timeout_s=LONG_S)
    assert process.call(os.getpid, timeout_s=LONG_S) != pid


def test_a_process_killed_from_outside_between_calls_is_not_noticed(
    process: WorkerProcess,
) -> None:
    pid = process.call(os.getpid, timeout_s=LONG_S)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid), "it is dead")
    assert process.call(os.getpid, timeout_s=LONG_S) != pid


def test_a_function_that_exits_ends_the_process_and_not_us(
    process: WorkerProcess, helpers: object
) -> None:
    with pytest.raises(WorkerDied, match="exit code 3"):
        process.call(helpers.quit_with, 3, timeout_s=LONG_S)  # type: ignore[attr-defined]


def test_calls_of_threads_come_one_after_another(process: WorkerProcess) -> None:
    results: list[int] = []
    threads = [
        threading.Thread(
            target=lambda n=n: results.append(process.call(operator.mul, n, n, timeout_s=LONG_S))
        )
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert sorted(results) == [n * n for n in range(20)]


def test_a_call_whose_turn_comes_too_late_is_not_begun_and_kills_nobody(
    process: WorkerProcess,
) -> None:
    pid = process.call(os.getpid, timeout_s=LONG_S)
    process._turn.acquire()
    release = threading.Timer(1.7, process._turn.release)
    release.start()
    with pytest.raises(worker.NoTurn):
        process.call(os.getpid, timeout_s=2.0)
    release.join()
    assert process.call(os.getpid, timeout_s=LONG_S) == pid


def test_a_call_whose_turn_never_comes_kills_nobody(process: WorkerProcess) -> None:
    pid = process.call(os.getpid, timeout_s=LONG_S)
    with process._turn, pytest.raises(worker.NoTurn, match="no turn"):
        process.call(os.getpid, timeout_s=0.05)
    assert process.call(os.getpid, timeout_s=LONG_S) == pid


def test_an_interrupted_call_leaves_no_answer_for_the_next(
    process: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worker, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            process.call(operator.add, "stale", "answer", timeout_s=LONG_S)
    assert process.call(operator.add, 1, 1, timeout_s=LONG_S) == 2


def test_close_is_final_and_leaves_nothing(process: WorkerProcess) -> None:
    before = open_descriptors()
    pid = process.call(os.getpid, timeout_s=LONG_S)
    process.close()
    process.close()
    assert is_gone(pid)
    assert open_descriptors() == before
    with pytest.raises(WorkerError, match="closed"):
        process.call(os.getpid, timeout_s=LONG_S)


PARENT = """
import os, sys, time
from external_storage.worker import WorkerProcess
process = WorkerProcess("orphan")
print(process.call(os.getpid, timeout_s=60), flush=True)
process.call(time.sleep, 1000, timeout_s=1000)
"""


def test_it_ends_with_a_parent_that_is_killed() -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert parent.stdout is not None
        readable, _, _ = select.select([parent.stdout], [], [], LONG_S)
        assert readable
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
    finally:
        parent.kill()
        parent.communicate(timeout=LONG_S)
    wait_until(lambda: is_gone(pid), "the orphan is gone")


def test_processes_that_cannot_be_killed_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_DIE_LIMIT_S", 0.05)
    pids = []
    process = WorkerProcess("hung", max_stuck=2)
    real = os.killpg
    try:
        monkeypatch.setattr(os, "killpg", lambda *_: None)
        for count in (1, 2):
            pids.append(process.call(os.getpid, timeout_s=LONG_S))
            # Stopped, it does not see that its socket is hung up.
            with pytest.raises(WorkerTimeout):
                process.call(os.kill, pids[-1], signal.SIGSTOP, timeout_s=0.3)
            assert process.stuck == count
        with pytest.raises(WorkersStuck, match="hung: 2 processes"):
            process.call(os.getpid, timeout_s=LONG_S)
        real(pids[0], signal.SIGKILL)
        wait_until(lambda: process.stuck == 1, "the one that was killed is not counted")
        assert process.call(os.getpid, timeout_s=LONG_S) not in pids
    finally:
        monkeypatch.setattr(os, "killpg", real)
        for pid in pids:
            if not is_gone(pid):
                real(pid, signal.SIGKILL)
        process.close()
    wait_until(lambda: process.stuck == 0, "none is left")


THAW_AT_END = """
import fcntl, os, sys
directory = os.open(sys.argv[1], os.O_RDONLY)
fcntl.ioctl(directory, 0xC0045877, 0)
print("frozen", flush=True)
sys.stdin.read()
fcntl.ioctl(directory, 0xC0045878, 0)
"""


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system on which a write sleeps uninterruptibly, and a function that thaws it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount and freeze a file system")
    image, point = tmp_path / "image", tmp_path / "frozen"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=60)
    if subprocess.run(["mount", "-o", "loop", image, point], check=False, timeout=60).returncode:
        pytest.skip("no loop device to be had")
    try:
        # Thawed by a process of its own at its end of input, so also when we are killed.
        holder = subprocess.Popen(
            [sys.executable, "-c", THAW_AT_END, point], stdin=subprocess.PIPE, stdout=-1
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"frozen\n"
            yield point, lambda: holder.communicate(timeout=LONG_S) and None
        finally:
            if holder.returncode is None:
                holder.communicate(timeout=LONG_S)
    finally:
        subprocess.run(["umount", "-l", point], check=True, timeout=60)


def test_a_call_in_uninterruptible_sleep_is_abandoned_and_counted(
    frozen: tuple[Path, Callable[[], None]],
    helpers: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "_DIE_LIMIT_S", 0.3)
    point, thaw = frozen
    with WorkerProcess("disk", max_stuck=1) as process:
        arguments = (str(point / "file"), str(tmp_path / "began"))
        with pytest.raises(WorkerTimeout):
            process.call(helpers.freeze_in_write, *arguments, timeout_s=0.5)  # type: ignore[attr-defined]
        assert process.stuck == 1
        with pytest.raises(WorkersStuck, match="disk: 1 processes"):
            process.call(os.getpid, timeout_s=LONG_S)
        thaw()
        wait_until(lambda: process.stuck == 0, "the killed process dies after all")
        assert process.call(operator.add, 1, 1, timeout_s=LONG_S) == 2


def test_a_process_begins_with_the_package_and_not_with_all_that_is_in_it(
    process: WorkerProcess, helpers: Any
) -> None:
    """Each wipe of a disk waits for it, on an emulated or busy machine for many seconds."""
    found = set(process.call(helpers.loaded, timeout_s=LONG_S))
    assert found == {"external_storage", "external_storage.logs", "external_storage.worker"}
