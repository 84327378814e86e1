"""What a request is refused with, and commands of the host."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import IO

Limit = Callable[[], float]
"""Seconds that are left of the requests being worked."""

# By LVM's words, which LC_ALL=C keeps the same: they are all there is, the exit code is always 5.
LVM_WORDS = (
    ("no_space", "insufficient free"),
    ("no_space", "insufficient suitable"),
    ("exists", "already exists"),
    ("in_use", "in use"),
    ("in_use", "is used by"),
    # Not "Volume group … not found": that one may only be away, with all its volumes.
    ("not_found", "failed to find logical volume"),
)
NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,125}[a-zA-Z0-9])?")
POOL = re.compile(r"[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126}(/[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126})?")
OWNER = re.compile(r"[a-zA-Z0-9_.+/=!:&#-]{1,400}")


class Refused(Exception):
    """What is answered in place of a result; ``kind`` is for the program, the text for people."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


_running: list[tuple[str, subprocess.Popen[bytes]]] = []
"""Changes that had not ended when their time was over."""


def run(argv: Sequence[str], limit_s: float) -> str:
    """The output of a command that only reads; ``Refused`` with its own words when it fails."""
    return _ended(argv, limit_s, kill=True)


def change(argv: Sequence[str], limit_s: float) -> None:
    """A command that changes something. It is never killed: between a suspend and a resume it would
    leave a device, or a whole thin pool, that answers nobody any more."""
    _running[:] = [entry for entry in _running if entry[1].poll() is None]
    if _running:
        raise Refused("busy", f"{_running[0][0]} of an earlier request has not ended")
    _ended(argv, limit_s, kill=False)


def _ended(argv: Sequence[str], limit_s: float, *, kill: bool) -> str:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C",
        "LVM_SUPPRESS_FD_WARNINGS": "1",
    }
    # Files, and a session of its own: what goes on without us must not end by our end.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as words:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=words,
                env=environment,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise Refused("failed", f"{argv[0]} is not installed") from None
        code = _wait(process, max(limit_s, 1.0))
        if code is None:
            if kill:
                process.kill()
            else:
                _running.append((argv[0], process))
            # Not waited for: in the kernel, it may not die before the disk answers.
            raise Refused("unknown", f"{argv[0]} has not ended in {limit_s:.0f} s")
        if code == 0:
            return _text(out)
        said = " ".join(_text(words).split())[-400:]
    raise Refused(kind_of(said), f"{argv[0]}: {said or f'exit code {code}'}")


def kind_of(said: str) -> str:
    """What a command of LVM has failed for, by its words."""
    return next((kind for kind, part in LVM_WORDS if part in said.lower()), "failed")


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None if it goes on. At once: the standard library looks every 50 ms."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        # A kernel before 5.3.
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(limit_s)
        return None
    try:
        ended, _, _ = select.select([descriptor], [], [], limit_s)
    finally:
        os.close(descriptor)
    return process.wait() if ended else None


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
