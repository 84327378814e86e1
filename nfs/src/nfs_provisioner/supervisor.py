"""A child process that is kept running and dies with us."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from external_storage.logs import get_logger
from nfs_provisioner.backoff import Backoff

log = get_logger(__name__)

# Run by setpriv in the child, with our pid as $0: if we died before the kernel was told to kill
# the child with us, it has another parent by now and must not become the program.
_STILL_OUR_CHILD = 'test "$PPID" = "$0" && exec "$@"'

_TAIL_LINES = 30
_LINE_BYTES = 8192
_HEALTHY_S = 60.0


class SupervisedProcess:
    """Starts ``argv`` again, with back-off (0.1 s to 10 s), whenever it has ended.

    The kernel kills the child when *the thread* that started it ends (PR_SET_PDEATHSIG), so one
    thread that lives as long as the child must make all calls of ``tend`` and ``stop``.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
        changed: threading.Event,
    ) -> None:
        """``on_line`` gets each line of output; ``changed`` is set when the process has ended."""
        self.name = name
        self.restarts = 0
        """How often it was started again after it had ended."""
        self.started_at = float("-inf")
        """Monotonic time of the last start."""
        self._argv = tuple(argv)
        self._environment = dict(environment)
        self._on_line = on_line
        self._changed = changed
        self._backoff = Backoff(first_s=0.1, longest_s=10.0)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._started_before = False

    @property
    def pid(self) -> int | None:
        """Of the running process, None if it has ended or was not started."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def tail(self) -> str:
        """The last lines of its output."""
        return "\n".join(self._tail)

    def ended(self) -> str | None:
        """How it ended, if it has since the last call; the back-off before its next start runs."""
        process = self._process
        if process is None or process.poll() is None:
            return None
        if self._reader is not None:
            self._reader.join(timeout=1.0)  # its last words; a grandchild may hold the pipe
        self._process = None
        if time.monotonic() - self.started_at >= _HEALTHY_S:
            self._backoff.reset()
        how = _exit_text(process.returncode)
        log.error(
            "child process ended",
            process=self.name,
            how=how,
            restart_in_s=round(self._backoff.failed(), 1),
        )
        return how

    def due(self) -> bool:
        """Whether it is not running and may be started now."""
        return self._process is None and self._backoff.remaining_s() <= 0

    def wait_s(self) -> float:
        """Seconds until ``due`` can change by itself: the back-off, infinite while it runs."""
        return self._backoff.remaining_s() if self._process is None else float("inf")

    def put_off(self) -> None:
        """It cannot be started now; try after the next back-off."""
        self._backoff.failed()

    def spawn(self) -> None:
        """Start it. Raises OSError; a missing program shows as an end with exit code 127."""
        process = subprocess.Popen(
            (
                *("setpriv", "--pdeathsig", "KILL"),
                *("sh", "-c", _STILL_OUR_CHILD, str(os.getpid())),
                *self._argv,
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us; we stop the children in order
        )
        self.restarts += self._started_before
        self._started_before = True
        self.started_at = time.monotonic()
        self._process = process
        self._reader = threading.Thread(
            target=self._read, args=(process,), name=f"{self.name}-output", daemon=True
        )
        self._reader.start()
        log.info("child process started", process=self.name, pid=process.pid)

    def kill(self) -> None:
        """SIGKILL; ``ended`` reports it as any other end."""
        if self._process is not None:
            self._process.kill()

    def stop(self, *, patience_s: float) -> None:
        """SIGTERM, after ``patience_s`` seconds SIGKILL, and wait for its end."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            log.warning("child process killed, it did not stop", process=self.name)
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join(timeout=1.0)
        self._process = None

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            while line := output.readline(_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                self._tail.append(text)
                self._on_line(text)
        process.wait()  # so that who is woken finds it reaped
        self._changed.set()


def _exit_text(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
