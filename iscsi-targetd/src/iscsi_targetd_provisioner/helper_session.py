"""The helper on the storage host, held open over SSH: requests from any thread, answered by id."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paramiko

from external_storage import (
    Deadline,
    Infeasible,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
    VolumeInUse,
    get_logger,
)
from iscsi_targetd_provisioner.host.serve import CHANGING, PROTOCOL
from iscsi_targetd_provisioner.host.source import helper_source
from iscsi_targetd_provisioner.observing import Observer, observed, unobserved

log = get_logger(__name__)

# Constants, the only text that a shell of the host ever reads. The helper's own text follows on
# stdin, with its length before it.
_RUN_SENT = (
    "python3 -c 'import sys;s=sys.stdin.buffer;"
    'exec(compile(s.read(int(s.readline())),"helper","exec"),{"__name__":"__main__"})\''
)
INSTALLED_PATH = "/usr/local/libexec/external-storage-lio"
_SUDO = "sudo -n -- "
# For the shell's start files, which may greet.
_MAX_NOISE = 1 << 16
_MAX_LINE = 1 << 26
_RECEIVE = 1 << 16
_STDERR_KEPT = 400
_LAST_WORDS_S = 5.0
# Beyond the host's own limit, so that it is the host that says what took so long.
_GRACE_S = 2.0

# One late answer is no reason to give up all others; a helper that has said nothing at all for so
# long is.
_SILENCE_S = 30.0

_BY_KIND: dict[str, type[ProvisionerError]] = {
    "no_space": Infeasible,
    "in_use": VolumeInUse,
    "busy": Unchanged,
}


class HelperRefused(ProvisioningFailed):
    """The helper's answer; ``kind`` is one of its words."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(slots=True)
class _Waiting:
    answered: threading.Event = field(default_factory=threading.Event)
    answer: dict[str, Any] | None = None


class Session:
    """One running helper. ``request`` may be called from any thread; a lost one is not mended."""

    def __init__(
        self,
        channel: paramiko.Channel,
        *,
        host: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._host = host
        self._ids = itertools.count(1)
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._hello = _Waiting()
        self._noise = 0
        self._stderr = b""
        self._lost = ""
        self._clock = clock
        self._heard = clock()
        self._threads = [
            threading.Thread(target=work, name=f"helper-{host}", daemon=True)
            # Apart: who writes much to one of the two would else wait for us to read the other.
            for work in (self._read, self._read_stderr)
        ]

    def start(self, source: bytes | None, deadline: Deadline) -> None:
        """Send the helper's text (None: it is installed) and wait until it says who it is."""
        self._channel.settimeout(None)
        for thread in self._threads:
            thread.start()
        try:
            if source is not None:
                self._send(b"%d\n%b" % (len(source), source), deadline)
        except OSError as error:
            self.close()
            raise Unchanged(f"{self._host}: the helper cannot be sent: {error}") from error
        self._hello.answered.wait(min(deadline.remaining(), threading.TIMEOUT_MAX))
        hello = self._hello.answer
        if hello is None:
            why = self._lost or "no answer in time"
            self.close()
            raise Unchanged(f"{self._host}: the helper does not start: {why}")
        if "fatal" in hello:
            self.close()
            raise Unchanged(f"{self._host}: {hello['fatal']}")
        protocol = hello.get("hello", {}).get("protocol")
        if protocol != PROTOCOL:
            self.close()
            text = f"{self._host}: the installed helper speaks protocol {protocol}, not {PROTOCOL}"
            raise Unchanged(f"{text}: run install-helper again")

    @property
    def alive(self) -> bool:
        return not self._lost

    def request(self, op: str, args: dict[str, Any], deadline: Deadline) -> Any:  # noqa: ANN401
        """The result. Raises what ``backend`` says."""
        number, waiting = next(self._ids), _Waiting()
        limit_s = round(max(deadline.remaining() - _GRACE_S, 0.5), 3)
        message = {"id": number, "op": op, "args": args, "limit_s": min(limit_s, 3600.0)}
        with self._lock:
            if self._lost:
                raise Unchanged(f"{self._host}: {self._lost}")
            self._waiting[number] = waiting
        try:
            self._send(json.dumps(message).encode() + b"\n", deadline)
            waiting.answered.wait(min(deadline.remaining(), threading.TIMEOUT_MAX))
        except OSError as error:
            # Perhaps half of it has gone out: nothing that followed would be understood.
            log.debug("a request could not be sent", host=self._host, op=op, error=str(error))
            self.close()
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        kind = ProvisioningInBackground if op in CHANGING else Unchanged
        if waiting.answer is None:
            why = self._lost or "no answer in time"
            if self._clock() - self._heard >= _SILENCE_S:
                self.close()
            raise kind(f"{self._host}: {why}; {op} is asked about again")
        return self._result(waiting.answer, kind)

    def close(self) -> None:
        """End the helper: it finishes the request that it is in, and begins no other."""
        self._end("the connection was closed")
        with contextlib.suppress(Exception):
            self._channel.close()

    def _result(self, answer: dict[str, Any], unknown: type[ProvisionerError]) -> Any:  # noqa: ANN401
        error = answer.get("error")
        if error is None:
            return answer.get("result")
        kind, text = str(error.get("kind")), f"{self._host}: {error.get('text')}"
        known = unknown if kind == "unknown" else _BY_KIND.get(kind)
        raise HelperRefused(kind, text) if known is None else known(text)

    def _send(self, data: bytes, deadline: Deadline) -> None:
        """All of it: half a line is never worked, but it would spoil the next one."""
        acquired = self._send_lock.acquire(timeout=min(deadline.remaining(), 3600.0))
        if not acquired:
            raise Unchanged(f"{self._host}: another request is stuck in being sent")
        try:
            self._channel.sendall(data)
        finally:
            self._send_lock.release()

    # -- the readers' threads

    def _read(self) -> None:
        rest = b""
        why = "the helper has ended"
        try:
            while data := self._channel.recv(_RECEIVE):
                self._heard = self._clock()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(rest) > _MAX_LINE or self._noise > _MAX_NOISE:
                    raise ValueError("it says too much")
        except Exception as error:
            why = f"the connection is lost: {error or type(error).__name__}"
        with contextlib.suppress(Exception):
            self._channel.close()
        # What it has said last is why it has ended; it is all there by now.
        self._threads[1].join(_LAST_WORDS_S)
        words = " ".join(self._stderr.decode("utf-8", "replace").split())
        self._end(f"{why}: {words}" if words else why)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not self._hello.answered.is_set():
            if isinstance(message, dict) and ("hello" in message or "fatal" in message):
                self._hello.answer = message
                self._hello.answered.set()
            else:
                self._noise += len(line) + 1
            return
        if not isinstance(message, dict):
            raise TypeError("an answer is not JSON")
        with self._lock:
            waiting = self._waiting.get(message.get("id", 0))
        if waiting is not None:
            waiting.answer = message
            waiting.answered.set()

    def _read_stderr(self) -> None:
        with contextlib.suppress(Exception):
            while data := self._channel.recv_stderr(_RECEIVE):
                self._stderr = (self._stderr + data)[-_STDERR_KEPT:]

    def _end(self, why: str) -> None:
        with self._lock:
            self._lost = self._lost or why
            waiting = list(self._waiting.values())
        self._hello.answered.set()
        for one in waiting:
            one.answered.set()


@dataclass(slots=True, kw_only=True)
class Helper:
    """The helper of one host: started when it is needed, again when it is lost."""

    open_channel: Callable[[Deadline, str], paramiko.Channel]
    host: str
    sudo: bool = False
    installed: bool = False
    observe: Observer = unobserved
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _session: Session | None = None

    def request(self, op: str, args: dict[str, Any], deadline: Deadline) -> Any:  # noqa: ANN401
        with observed(self.observe, op):
            return self._get(deadline).request(op, args, deadline)

    def close(self) -> None:
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _get(self, deadline: Deadline) -> Session:
        if not self._lock.acquire(timeout=min(deadline.remaining(), 3600.0)):
            raise Unchanged(f"{self.host}: no connection in time")
        try:
            if self._session is None or not self._session.alive:
                self._session = self._start(deadline)
            return self._session
        finally:
            self._lock.release()

    def _start(self, deadline: Deadline) -> Session:
        began = time.monotonic()
        command = INSTALLED_PATH if self.installed else _RUN_SENT
        channel = self.open_channel(deadline, (_SUDO if self.sudo else "") + command)
        session = Session(channel, host=self.host, clock=self.clock)
        session.start(None if self.installed else helper_source().encode(), deadline)
        seconds = round(time.monotonic() - began, 2)
        log.info("helper started", host=self.host, installed=self.installed, seconds=seconds)
        return session
