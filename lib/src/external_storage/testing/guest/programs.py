"""Programs that run in a guest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

_DIRECTORY: Final = "/run/programs"
_LOGS: Final = "/var/log/programs"


class Run(Protocol):
    """``Guest.run``."""

    def __call__(self, command: str, *, check: bool = ..., timeout_s: float = ...) -> str: ...


class GuestProcess:
    """A program started in a guest, in a session of its own; it ends with the guest at last."""

    def __init__(self, run: Run, *, name: str, pid: int) -> None:
        self._run = run
        self._directory = f"{_DIRECTORY}/{name}"
        self.log: Final = f"{_LOGS}/{name}.log"
        """The file in the guest that has its standard output and error."""
        self.pid: Final = pid
        """Its process id in the guest, and the id of its process group."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it, SIGKILL when the guest did."""
        # The directory is in memory: it is gone after a reboot.
        said = self._run(
            f"[ -d {self._directory} ] || echo 137; cat {self._directory}/exit 2>/dev/null",
            check=False,
        )
        if not said.strip():
            return None
        code = int(said.split()[0])
        return 128 - code if code > 128 else code

    def wait(self, limit_s: float = 120.0) -> int:
        """Wait for its end; its exit code. Raises ``GuestError`` after ``limit_s`` seconds."""
        self._run(
            f"while [ -d {self._directory} ] && [ ! -e {self._directory}/exit ]; "
            "do sleep 0.05; done",
            timeout_s=limit_s,
        )
        code = self.exit_code
        assert code is not None
        return code

    def terminate(self) -> None:
        """SIGTERM to it alone; nothing when it has ended."""
        self._signal(f"-TERM {self.pid}")

    def kill(self) -> None:
        """SIGKILL to it and to all of its process group; nothing when it has ended."""
        self._signal(f"-KILL -- -{self.pid}")

    def output(self) -> str:
        """All that it has written."""
        return self._run(f"cat {self.log}")

    def _signal(self, arguments: str) -> None:
        # With the exit code its pid is free for another: then nothing is sent.
        self._run(
            f"[ ! -d {self._directory} ] || [ -e {self._directory}/exit ] || kill {arguments}",
            check=False,
        )


def start(run: Run, argv: Sequence[str], *, name: str, env: Mapping[str, str]) -> GuestProcess:
    """Start ``argv`` in the guest under an unused ``name``."""
    directory, log = f"{_DIRECTORY}/{name}", f"{_LOGS}/{name}.log"
    settings = [f"{key}={value}" for key, value in env.items()]
    program = f'echo $$ >{directory}/pid; exec env "$@" >{log} 2>&1'
    words = shlex.join(["setsid", "--wait", "sh", "-c", program, "sh", *settings, *argv])
    ending = f"echo $? >{directory}/exit.new; mv {directory}/exit.new {directory}/exit"
    pid = run(
        f"mkdir -p {directory} {_LOGS}; ( {words}; {ending} ) >/dev/null 2>&1 </dev/null & "
        f"until [ -s {directory}/pid ]; do sleep 0.02; done; cat {directory}/pid"
    )
    return GuestProcess(run, name=name, pid=int(pid))
