"""Watching and killing a running program at its system calls, with ``strace``."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from external_storage.testing.processes import die_with_parent
from external_storage.testing.waiting import LIMIT_S, wait_until

# What changes files, names, modes, owners, devices or mounts. A question mark: not on every
# machine. Those that open are recorded only where they create.
CALLS: Final = (
    *("?mkdir", "mkdirat", "?rename", "?renameat", "renameat2", "?unlink", "unlinkat", "?rmdir"),
    *("?link", "linkat", "?symlink", "symlinkat", "?mknod", "mknodat", "?creat", "?open", "openat"),
    *("write", "pwrite64", "writev", "ftruncate", "truncate", "fallocate", "copy_file_range"),
    *("fsync", "fdatasync", "?chmod", "fchmod", "fchmodat", "?chown", "fchown", "fchownat"),
    *("setxattr", "fsetxattr", "removexattr", "ioctl", "mount", "umount2"),
)
_OPENS: Final = frozenset({"open", "openat", "creat"})
_ENTRY: Final = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<arguments>.*)")
_FILE: Final = re.compile(r"\d+<(?P<path>/[^>]*)>")


@dataclass(frozen=True, slots=True)
class SystemCall:
    """A point in the work of a program."""

    name: str
    number: int
    """Which of this name in its thread, from 1 on."""

    def __str__(self) -> str:
        return f"{self.name} no. {self.number}"


@contextlib.contextmanager
def recorded(pids: Sequence[int], output: Path) -> Iterator[None]:
    """Write the calls that the program makes meanwhile to ``output``, for ``read_record``.

    ``pids``: the program's and those of all that it has started before.
    """
    with _attached(pids, output, "-y", "-e", f"trace={','.join(CALLS)}"):
        yield


def read_record(output: Path, *, leave_out: Path) -> list[SystemCall]:
    """The recorded calls that change something, in order; not those that write to ``leave_out``.

    A call is written down when it begins, so threads do not blur the order.
    """
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[SystemCall, None] = {}
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = _ENTRY.match(line)
        if entry is None:
            continue
        thread, name, arguments = entry["thread"], entry["name"], entry["arguments"]
        counts[thread, name] += 1
        if _changes(name, arguments, leave_out):
            found[SystemCall(name, counts[thread, name])] = None
    return list(found)


@contextlib.contextmanager
def killed_at(call: SystemCall, pids: Sequence[int], output: Path) -> Iterator[None]:
    """SIGKILL to the first of these processes of which a thread begins this call, which then does
    not happen. The count begins here."""
    kill = f"inject={call.name}:signal=KILL:when={call.number}"
    with _attached(pids, output, "-e", f"trace={call.name}", "-e", kill):
        yield


def _changes(name: str, arguments: str, leave_out: Path) -> bool:
    if name in _OPENS:
        return name == "creat" or "O_CREAT" in arguments
    if name in ("write", "writev", "ioctl"):
        # Most go to sockets and pipes, which are somebody else's.
        file = _FILE.match(arguments)
        return file is not None and file["path"] != str(leave_out) and "TCGETS" not in arguments
    return True


@contextlib.contextmanager
def _attached(pids: Sequence[int], output: Path, *arguments: str) -> Iterator[None]:
    messages = output.with_suffix(".messages")
    with messages.open("wb") as errors:
        argv = ["strace", "-f", "-o", str(output), *arguments, *(f"--attach={pid}" for pid in pids)]
        tracer = subprocess.Popen(
            die_with_parent(argv), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
        )

    def attached() -> bool:
        if tracer.poll() is not None:
            raise RuntimeError(f"strace cannot attach: {messages.read_text()}")
        return messages.read_text().count("attached") >= len(pids)

    try:
        wait_until(attached, "strace is attached")
        yield
    finally:
        # The kernel then lets the program go on, if that lives. Asked to end (SIGINT), strace would
        # wait for the first thread of a program that is just dying, which in its turn waits until
        # strace has taken the others: for ever. Every line is written out when it is complete.
        tracer.kill()
        tracer.wait(LIMIT_S)
