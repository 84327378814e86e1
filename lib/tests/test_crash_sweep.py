"""The example in ``examples/hostpath`` is killed at every step of its work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from external_storage.testing import CrashSweep, Program
from external_storage.testing.tracing import SystemCall, read_record, recorded

EXAMPLE = Path(__file__).parents[1] / "examples" / "hostpath"


class TestHostPath(CrashSweep):
    def program(self, directory: Path) -> Program:
        return Program(argv=(sys.executable, str(EXAMPLE / "hostpath.py"), f"--root={directory}"))

    def assets(self, directory: Path) -> Collection[str]:
        return [path.name for path in directory.iterdir() if not path.name.startswith(".")]

    def traces(self, directory: Path) -> Collection[str]:
        return [path.name for path in directory.glob(".records*/*")]


def test_calls_that_change_files_are_read_from_the_record(tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.write_text(
        """\
10 openat(AT_FDCWD</root>, "old", O_RDONLY|O_CLOEXEC) = 7</root/old>
10 openat(AT_FDCWD</root>, "new", O_WRONLY|O_CREAT|O_EXCL, 0600 <unfinished ...>
11 fsync(8</root/other>) = 0
10 <... openat resumed>) = 9</root/new>
10 write(5<socket:[1234]>, "x", 1) = 1
10 write(9</root/new>, "x", 1) = 1
10 write(2</tmp/program.log>, "INFO", 4) = 4
10 fsync(9</root/new>) = 0
10 --- SIGUSR1 {si_signo=SIGUSR1, si_code=SI_USER, si_pid=1, si_uid=0} ---
10 +++ exited with 0 +++
"""
    )
    assert read_record(record, leave_out=Path("/tmp/program.log")) == [
        SystemCall("openat", 2),
        SystemCall("fsync", 1),
        SystemCall("write", 2),
    ]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_what_is_killed_while_it_is_traced_ends_and_the_rest_goes_on(tmp_path: Path) -> None:
    # It takes threads, and luck: asked to end, strace missed the death in four of ten rounds.
    program = """\
import threading
for _ in range(6): threading.Thread(target=input).start()
print("ready", flush=True)
"""
    for _ in range(10):
        killed, other = (
            subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(2)
        )
        with killed, other:
            try:
                for process in (killed, other):
                    assert process.stdout is not None
                    assert process.stdout.readline() == b"ready\n"
                with recorded([killed.pid, other.pid], tmp_path / "record"):
                    killed.kill()
                killed.wait(10)
                other.communicate(b"\n" * 6, timeout=10)
                assert other.returncode == 0
            finally:
                killed.kill()
                other.kill()
