"""What a request is refused with, and commands of the host."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence

Limit = Callable[[], float]
"""Seconds that are left of the requests being worked."""

# By LVM's words, which LC_ALL=C keeps the same: they are all there is, the exit code is always 5.
LVM_WORDS = (
    ("no_space", "insufficient free"),
    ("no_space", "insufficient suitable"),
    ("exists", "already exists"),
    ("in_use", "in use"),
    ("in_use", "is used by"),
    ("not_found", "not found"),
    ("not_found", "failed to find"),
)
NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,125}[a-zA-Z0-9])?")
POOL = re.compile(r"[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126}(/[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126})?")
OWNER = re.compile(r"[a-zA-Z0-9_.+/=!:&#-]{1,253}")


class Refused(Exception):
    """What is answered in place of a result; ``kind`` is for the program, the text for people."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def run(argv: Sequence[str], limit_s: float) -> str:
    """The output of a command of the host; ``Refused`` with its own words when it fails."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C",
        "LVM_SUPPRESS_FD_WARNINGS": "1",
    }
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=max(limit_s, 1.0),
            check=False,
        )
    except FileNotFoundError:
        raise Refused("failed", f"{argv[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Refused("unknown", f"{argv[0]} has not ended in {limit_s:.0f} s") from None
    if done.returncode == 0:
        return done.stdout.decode("utf-8", "replace")
    words = " ".join(done.stderr.decode("utf-8", "replace").split())[-400:]
    kind = next((kind for kind, part in LVM_WORDS if part in words.lower()), "failed")
    raise Refused(kind, f"{argv[0]}: {words or f'exit code {done.returncode}'}")
