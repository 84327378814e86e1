"""A provisioner's program as a process under test: started, asked, stopped, killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from external_storage.testing.processes import die_with_parent, free_port, is_running, log_tail
from external_storage.testing.waiting import LIMIT_S, wait_until

# The pod's grace period: after it the kubelet kills.
GRACE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How to start a provisioner."""

    argv: Sequence[str]
    """The program and the flags of its own; the settings of every provisioner are added."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the test."""


class ProgramProcess:
    """One program, started and ended any number of times; its output is appended to one file.

    Everything it has started dies with it, as in a container.
    """

    def __init__(self, program: Program, *, name: str, kubeconfig: Path, log: Path) -> None:
        """``name``: the provisioner name that it answers to."""
        self.name = name
        self._program = program
        self.log = log
        """The file that its output is appended to."""
        self._kubeconfig = kubeconfig
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._below: list[int] = []

    # -- starting and ending

    def start(self) -> None:
        """Start it and return when it is ready and has seen the whole cluster."""
        if self.running:
            raise RuntimeError("the program is running already")
        self._port = free_port()
        with self.log.open("ab") as log:
            # The thread that forks must live on: see die_with_parent.
            self._process = subprocess.Popen(
                die_with_parent([*self._program.argv, *self._flags()]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        wait_until(self._is_ready, "the program is ready", explain=self.tail)
        self._below = _below(self.pid)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL after the grace period of a pod; the exit code (-9: killed)."""
        process = self._started()
        self._below = _below(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL, and wait until it and what it had started are gone; its exit code."""
        process = self._started()
        if process.poll() is None:
            self._below = _below(process.pid)
            process.kill()
        return self.wait_ended()

    def wait_ended(self) -> int:
        """Wait for its end, which somebody else brings about; its exit code."""
        process = self._started()
        code = process.wait(LIMIT_S)
        for pid in filter(is_running, self._below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: not any(map(is_running, self._below)), "what the program started has ended"
        )
        self._below = []
        return code

    def refuses(self, *flags: str) -> tuple[int, str]:
        """Run it with flags that are expected to be refused; exit code and standard error."""
        done = subprocess.run(
            [*self._program.argv, *self._flags(), *flags],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        return done.returncode, done.stderr

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def pids(self) -> list[int]:
        """Its own, and those of all that it has started."""
        return [self.pid, *_below(self.pid)]

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    # -- asking

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of one of its HTTP endpoints; 0 when it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, pattern: str) -> float:
        """The sum of the samples whose name and labels match from their beginning."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(pattern, line))

    def tail(self, lines: int = 60) -> str:
        """The end of what it has logged in all its lives."""
        return log_tail(self.log, lines)

    # -- inside

    def _flags(self) -> list[str]:
        return [
            f"--provisioner-name={self.name}",
            f"--kubeconfig={self._kubeconfig}",
            f"--http-endpoint=127.0.0.1:{self._port}",
            "--leader-elect=false",
            "--retry-interval-start=0.2",
            "--log-format=text",
            "--log-level=info",
        ]

    def _environment(self) -> dict[str, str]:
        # Killed, it cannot remove its temporary files: they are to go with the test's.
        return {**os.environ, "TMPDIR": str(self.log.parent), **self._program.env}

    def _is_ready(self) -> bool:
        code = self._started().poll()
        if code is not None:
            raise RuntimeError(f"the program has ended with {code}:\n{self.tail()}")
        status, text = self.get("/healthz?verbose")
        return status == 200 and "[+] sync: ok" in text and self.get("/readyz")[0] == 200

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the program has not been started")
        return self._process


def _below(pid: int) -> list[int]:
    """All processes below ``pid``."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                words = (task / "children").read_text(encoding="ascii").split()
                found += [int(word) for word in words]
    return found + [grandchild for child in found for grandchild in _below(child)]
