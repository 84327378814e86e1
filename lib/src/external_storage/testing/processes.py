"""Child processes that cannot outlive the tests which started them, and their working directory.

Linux only: it rests on the parent-death signal, on ``flock`` and on ``/proc``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# The kernel sends the parent-death signal when the *thread* that forked ends, not the process.
# So one thread which lives as long as the interpreter does all the forking, and callers may be on
# any thread. It also takes no signals: Ctrl-C cannot fall between the fork and the note of its pid.
_SPAWNER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-spawner")

# setpriv asks for the signal after the fork. A parent that was killed before that is noticed by
# the shell: then its parent is not the process ($0) that wanted it. exec keeps pid and signal.
_DIE_WITH_PARENT: Final = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("sh", "-c", 'test "$PPID" = "$0" && exec "$@"'),
)

_TAIL_BYTES: Final = 64 * 1024


def die_with_parent(argv: Sequence[str]) -> list[str]:
    """``argv`` wrapped so that the kernel kills it as soon as the calling process is gone.

    It holds only for a child forked by a thread that lives on; ``ProcessGroup`` sees to that.
    """
    return [*_DIE_WITH_PARENT, str(os.getpid()), *argv]


@dataclass(frozen=True, slots=True)
class Process:
    """A running (or ended) child."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    is_wrapped: bool = False
    """Whether ``popen`` stays the parent of the program and does not become it."""

    @property
    def pid(self) -> int:
        """Its process id, the same for the wrapper and for the program it becomes."""
        below = children(self.popen.pid) if self.is_wrapped else []
        return below[0] if below else self.popen.pid

    def terminate(self) -> None:
        """SIGTERM; nothing when it has ended."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self.popen.poll()

    def tail(self, lines: int = 20) -> str:
        """The last ``lines`` lines it has logged."""
        return log_tail(self.log, lines)

    def wait(self, limit_s: float) -> None:
        """Wait for its end; after ``limit_s`` seconds, end it by SIGKILL."""
        try:
            self.popen.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class ProcessGroup:
    """The children of one owner: each in its own session, its output in a file, none outliving us.

    Not locked: one thread at a time starts and stops.
    """

    def __init__(self, directory: Path, *, prefix: Sequence[str] = ()) -> None:
        """``prefix``: put before each command; a program that runs it as a child dying with it."""
        self._directory = directory
        self._prefix = tuple(prefix)
        self._processes: dict[str, Process] = {}

    def start(self, name: str, argv: Sequence[str], *, descriptors: Sequence[int] = ()) -> Process:
        """Start ``argv`` in the group's directory; its log is ``<directory>/<name>.log``, appended.

        ``descriptors`` of this process are open in it too. Raises ``OSError`` when ``setpriv``
        (util-linux) cannot be run. A program that cannot be run shows as an exit code and a line in
        the log.
        """
        return _SPAWNER.submit(self._spawn, name, argv, descriptors).result()

    def _spawn(self, name: str, argv: Sequence[str], descriptors: Sequence[int]) -> Process:
        if name in self._processes:
            raise RuntimeError(f"{name} has been started and not stopped")
        log = self._directory / f"{name}.log"
        with log.open("ab") as output:
            popen = subprocess.Popen(
                die_with_parent([*self._prefix, *argv]),
                pass_fds=descriptors,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C at a terminal goes to its whole process group; stopping is our work.
                start_new_session=True,
            )
        process = Process(name=name, popen=popen, log=log, is_wrapped=bool(self._prefix))
        self._processes[name] = process
        return process

    def all(self) -> list[Process]:
        """Every child started and not yet stopped, oldest first."""
        # Asked of the spawner, so that a start which Ctrl-C interrupted is over and counted.
        return _SPAWNER.submit(lambda: list(self._processes.values())).result()

    def ended(self) -> Process | None:
        """A child that has ended by itself, if there is one."""
        return next((p for p in self.all() if p.exit_code is not None), None)

    def stop(self, *names: str, limit_s: float) -> None:
        """Stop those of ``names`` that run, at once: SIGTERM, then SIGKILL after ``limit_s`` each.

        Only one SIGTERM is sent: a second makes Kubernetes' programs drop what they are doing.
        """
        stopping = [process for process in self.all() if process.name in names]
        for process in stopping:
            process.terminate()
        for process in stopping:
            process.wait(limit_s)
            self._processes.pop(process.name, None)

    def kill(self, name: str) -> None:
        """SIGKILL to one, and wait for its end."""
        process = next(process for process in self.all() if process.name == name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.popen.wait()
        self._processes.pop(name)

    def kill_all(self) -> None:
        """SIGKILL to what is left."""
        for process in self.all():
            process.popen.kill()
            process.popen.wait()
            self._processes.pop(process.name, None)


class WorkDirectory:
    """A temporary directory locked by its owner, so that a later one can tell who is dead.

    The lock is a ``flock`` on the directory itself: the kernel drops it with the process, and
    unlike a pid it is never another's.
    """

    def __init__(self, prefix: str) -> None:
        """Removes what dead owners left under ``prefix``, then makes a new one."""
        sweep(prefix)
        self.path: Final = Path(tempfile.mkdtemp(prefix=prefix))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        # Sweepers leave an empty directory alone: its owner may be about to lock it.
        (self.path / "owner").write_text(f"{os.getpid()}\n", encoding="ascii")

    def remove(self) -> None:
        """Remove it with all it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def sweep(prefix: str) -> list[Path]:
    """Remove the directories under ``prefix`` whose owner is dead; returns those removed."""
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _Locked(path) as is_ours:
            if is_ours and any(path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


class _Locked:
    """Tries for the lock of a directory; entering gives whether we have it. Raises ``OSError``."""

    def __init__(self, path: Path) -> None:
        # A link, or another user's directory, in a world-writable /tmp is not ours to remove.
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def __enter__(self) -> bool:
        if os.fstat(self._fd).st_uid != os.getuid():
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def log_tail(path: Path, lines: int = 20) -> str:
    """The last ``lines`` lines of a log file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago. Another may take it: be ready for that.

    It lies below the range the kernel takes outgoing ports from. In that range a client which keeps
    dialling a stopped server at last connects *to itself*, and the server cannot get its port back.
    """
    first_ephemeral = int(
        Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0]
    )
    for _ in range(100):
        port = random.randrange(10_000, first_ephemeral) if first_ephemeral > 12_000 else 0
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no free TCP port on 127.0.0.1 in 100 tries")


def children(pid: int) -> list[int]:
    """The processes whose parent is the first thread of ``pid``; empty when that is gone."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in words.split()]


def is_running(pid: int) -> bool:
    """Whether a process of that id exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def describe_exit(code: int) -> str:
    """An exit code in words, as ``Process.exit_code`` gives it."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
