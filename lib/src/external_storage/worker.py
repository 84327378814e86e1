"""Calls that may hang in the kernel, in a process that is killed at its deadline.

A thread cannot do this. A system call on a dead NFS server or a failing disk does not come back,
Python cannot end the thread that is in it, and with the thread stay its locks, its descriptors and
the exit of the whole process. A process can be killed: nearly every wait of the kernel's NFS client
ends at SIGKILL. A wait that does not (uninterruptible sleep) costs us one abandoned process, which
is counted; a few of them, and further calls fail at once instead of adding more.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, TypeVar, TypeVarTuple, Unpack

from external_storage.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LENGTH = struct.Struct("!Q")
_BEGIN_LIMIT_S = 60.0  # for the interpreter and the function's imports, on a machine that is busy
_LEAST_OF_TIME = 0.25
"""Of a call's time: with less left when its turn comes it is not begun."""
_DIE_LIMIT_S = 2.0  # between SIGKILL and the end of a process that can die
_BEGAN = b"began"
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from external_storage.worker import serve; serve(int(sys.argv[2]))"
)


class WorkerError(Exception):
    """The call failed for a reason of the worker's, not of the function's."""


class WorkerTimeout(WorkerError):
    """The deadline is over; the call may have had an effect."""


class NoTurn(WorkerTimeout):
    """Calls of other threads have taken all of the time: nothing was tried, nothing was killed."""


class WorkerDied(WorkerError):
    """The process ended during the call (killed, crashed, closed); it may have had an effect."""


class WorkersStuck(WorkerError):
    """Too many processes of this worker cannot even be killed: nothing was tried."""


class WorkerProcess:
    """Runs functions in a process of its own, one call at a time; safe to use from threads.

    The process is started by the first call, and again by the one after its end. It is another
    program (no fork of our threads), leads a process group that is killed as a whole, and ends
    when we do: a thread in it waits for the hang-up of our socket. PR_SET_PDEATHSIG would not do,
    for it fires at the end of the *thread* that started the process.
    """

    def __init__(self, name: str, *, max_stuck: int = 3) -> None:
        """``name`` is for errors and logs; ``max_stuck`` bounds the processes left behind."""
        self.name = name
        self.max_stuck = max_stuck
        self._turn = threading.Lock()
        self._state = threading.Lock()  # held for moments only, also while a call runs
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._abandoned: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stuck(self) -> int:
        """How many processes have been sent SIGKILL and are still there."""
        with self._state:
            self._abandoned = [process for process in self._abandoned if process.poll() is None]
            return len(self._abandoned)

    def call(self, function: Callable[[Unpack[Ts]], T], *args: *Ts, timeout_s: float) -> T:
        """``function(*args)`` in the process.

        Args:
            function: a module-level function of a module that can be imported.
            args: values that can be pickled; so must be the result.
            timeout_s: seconds for the turn and the function together; the start of a process and
                the import of the function's module come on top, at most a minute.

        Raises:
            WorkerTimeout: the deadline is over and the process killed.
            NoTurn: the turn never came, or so late that the function would be killed for it; a
                WorkerTimeout, too.
            WorkerDied: the process ended during the call.
            WorkersStuck: ``max_stuck`` processes cannot be killed.
            WorkerError: after ``close``; for a result or exception that cannot be pickled.
            ValueError: the function or an argument cannot be sent.
            Exception: what the function raised, its traceback as a note.
        """
        request = _request(function, args)
        deadline = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=max(timeout_s, 0)):
            raise NoTurn(f"worker {self.name}: no turn within {timeout_s:g} s")
        try:
            # What the turn has taken is off the caller's time; what a start takes is not.
            left_s = deadline - time.monotonic()
            if left_s < timeout_s * _LEAST_OF_TIME:
                raise NoTurn(f"worker {self.name}: the turn came with only {left_s:.1f} s left")
            try:
                channel, answer = self._begin(request)
                if answer == _BEGAN:
                    answer = self._answer(channel, left_s, timeout_s)
            except WorkerError:
                raise
            except BaseException:
                # Interrupted while waiting: the next call must not be given this one's answer.
                self._end()
                raise
        finally:
            self._turn.release()
        return _unpacked(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Kill the process, also during a call, which then raises WorkerDied; twice is once."""
        with self._state:
            self._closed = True
        self._kill()
        # The socket belongs to the call under way, if there is one, and that closes it then.
        if self._turn.acquire(timeout=_DIE_LIMIT_S):
            try:
                self._hang_up()
            finally:
                self._turn.release()

    def _is_closed(self) -> bool:
        with self._state:
            return self._closed

    def _begin(self, request: bytes) -> tuple[socket.socket, bytes]:
        """Send the request; the first answer, which comes before the function is run."""
        for _ in range(2):
            channel = self._channel()
            try:
                channel.settimeout(_BEGIN_LIMIT_S)
                _send(channel, request)
                return channel, _receive(channel, _BEGIN_LIMIT_S)
            except TimeoutError:
                self._end()
                raise WorkerTimeout(f"worker {self.name}: the process does not start") from None
            except (EOFError, OSError):
                # It ended while it was idle. Nothing has been run, so a new one may try.
                self._end()
        raise WorkerDied(f"worker {self.name}: the process ends before it begins")

    def _answer(self, channel: socket.socket, left_s: float, timeout_s: float) -> bytes:
        try:
            return _receive(channel, left_s)
        except TimeoutError:
            self._end()
            raise WorkerTimeout(f"worker {self.name}: killed after {timeout_s:g} s") from None
        except (EOFError, OSError):
            self._let_end()
            code = self._end()
            how = "closed" if self._is_closed() else _how_it_ended(code)
            raise WorkerDied(f"worker {self.name}: the process was {how} during a call") from None

    def _channel(self) -> socket.socket:
        """The socket of the running process, or of one that is started now."""
        if self._is_closed():
            raise WorkerError(f"worker {self.name} is closed")
        if self._socket is not None:
            return self._socket
        if (stuck := self.stuck) >= self.max_stuck:
            raise WorkersStuck(
                f"worker {self.name}: {stuck} processes hang in the kernel and cannot be killed"
            )
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise WorkerError(f"worker {self.name} cannot be started: {error}") from error
        finally:
            theirs.close()
        with self._state:
            self._process, self._socket = process, ours
        if self._is_closed():  # by another thread, which may have come too early to see the process
            self._end()
            raise WorkerError(f"worker {self.name} is closed")
        return ours

    def _let_end(self) -> None:
        """Wait for a process that has hung up: killed on its way out it could not say why."""
        process = self._process
        if process is None:
            return
        with suppress(OSError):  # an old kernel, or it has been waited for
            # Not by wait(): once that has returned, its number may be another's.
            descriptor = os.pidfd_open(process.pid)
            try:
                select.select([descriptor], [], [], _DIE_LIMIT_S)
            finally:
                os.close(descriptor)

    def _end(self) -> int | None:
        """Kill the process and forget it; its exit code if it is known. With the turn only."""
        code = self._kill()
        self._hang_up()
        return code

    def _kill(self) -> int | None:
        with self._state:
            process, self._process = self._process, None
            channel = self._socket
        if process is None:
            return None
        # Nobody has waited for it yet, so the number cannot be another's.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if channel is not None:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)  # wakes a call that waits for an answer
        try:
            return process.wait(_DIE_LIMIT_S)
        except subprocess.TimeoutExpired:
            with self._state:
                self._abandoned.append(process)
            log.error("a worker process cannot be killed", worker=self.name, pid=process.pid)
            return None

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _request(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError("a worker cannot import from the main program: move the function")
    try:
        return pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"want a module-level function and arguments that can be pickled: {error}"
        ) from error


def _unpacked(answer: bytes) -> Any:  # noqa: ANN401  (whatever the function returns)
    try:
        succeeded, value = pickle.loads(answer)
    except Exception as error:
        raise WorkerError(f"the answer of a worker cannot be read: {error}") from error
    if succeeded:
        return value
    raise value


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "lost"
    return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _send(channel: socket.socket, message: bytes) -> None:
    channel.sendall(_LENGTH.pack(len(message)) + message)


def _receive(channel: socket.socket, limit_s: float | None = None) -> bytes:
    """A message; EOFError at the end, TimeoutError after ``limit_s``."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    (length,) = _LENGTH.unpack(_read(channel, _LENGTH.size, deadline))
    return _read(channel, length, deadline)


def _read(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimeoutError
        channel.settimeout(left_s)
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


# -- in the worker's process


def serve(descriptor: int) -> None:
    """What the process does: answer calls that come by the socket, until it is hung up."""
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    with socket.socket(fileno=descriptor) as channel:
        while True:
            try:
                request = _receive(channel)
            except (EOFError, OSError):
                return
            _serve_one(channel, request)


def _serve_one(channel: socket.socket, request: bytes) -> None:
    try:
        function, args = pickle.loads(request)
        _send(channel, _BEGAN)
        answer = _packed(True, function(*args))
    except Exception as error:
        error.add_note("in the worker process:\n" + traceback.format_exc().rstrip())
        answer = _packed(False, error)
    _send(channel, answer)


def _packed(succeeded: bool, value: object) -> bytes:
    try:
        packed = pickle.dumps((succeeded, value))
        if not succeeded:
            pickle.loads(packed)  # many exceptions can be written and not read again
        return packed
    except Exception as error:
        if succeeded:
            return _packed(False, WorkerError(f"the result cannot be sent back: {error}"))
        return pickle.dumps((False, WorkerError(f"{type(value).__name__}: {value}")))


def _end_with_parent(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, 0)  # tells of a hang-up all the same, and of nothing else
    poller.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)
