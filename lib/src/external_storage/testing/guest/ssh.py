"""Commands and files for the guest, over one ssh connection."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from external_storage.testing.guest.errors import ConnectionLost, GuestError
from external_storage.testing.guest.image import Image
from external_storage.testing.guest.machine import START_LIMIT_S
from external_storage.testing.processes import ProcessGroup

_POLL_S: Final = 0.02
_NAME: Final = "guest"
_BLOCKED_LIMIT_S: Final = 60.0
# Those that no signal reaches, with what they are in; and the end of what the kernel says.
_BLOCKED: Final = """
cd /proc
for task in [0-9]*/task/[0-9]*; do
  grep -qs '^State:.D' $task/status && echo "$task $(cat $task/comm)" && cat $task/stack
done
dmesg | tail -n 30
"""


class Ssh:
    """One connection to a guest, which all commands share; any thread may use it."""

    def __init__(
        self,
        *,
        image: Image,
        directory: Path,
        processes: ProcessGroup,
        prefix: Sequence[str] = (),
    ) -> None:
        """``prefix``: put before the command line of the connection, and only of that."""
        self._image = image
        self._socket = directory / "ssh.sock"
        self._processes = processes
        self._prefix = tuple(prefix)

    def connect(self, port: int, *, explain: Callable[[], str]) -> None:
        """Connect to ``port`` of 127.0.0.1, again and again until the guest answers.

        Raises ``GuestError`` with what ``explain`` says when it does not.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while not self._try_to_connect(port):
            if time.monotonic() > deadline:
                log = self._socket.with_name("ssh.log").read_text(errors="replace")[-2048:]
                raise GuestError(f"the guest's sshd does not answer:\n{log}\n{explain()}")

    def disconnect(self) -> None:
        """End the connection and the commands in it; nothing when there is none."""
        self._processes.stop("ssh", limit_s=5)
        self._socket.unlink(missing_ok=True)

    def argv(self, command: Sequence[str] = ()) -> list[str]:
        """The command line, on the host, that runs ``command`` in the guest."""
        # The connection is there already: a new one is never to be tried.
        options = ("-F", "none", "-S", str(self._socket), "-o", "ProxyCommand=false")
        return ["ssh", *options, "-o", "BatchMode=yes", f"root@{_NAME}", *command]

    def login(self, port: int) -> list[str]:
        """The command line, on the host, of a connection of its own."""
        return [*self._prefix, "ssh", *self._options(port), f"root@{_NAME}"]

    def execute(
        self, command: str, *, limit_s: float, input: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a shell command in the guest; how it ended, and all that it printed.

        Raises ``GuestError`` when it has not ended after ``limit_s`` seconds (it goes on in the
        guest), ``ConnectionLost`` when there is none any more.
        """
        try:
            done = subprocess.run(
                self.argv([command]),
                input=input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = ((error.stderr or b"") + (error.stdout or b"")).decode(errors="replace")
            raise GuestError(
                f"in the guest, `{command}` has not ended after {limit_s:g} s: {said[-2048:]}\n"
                f"{self._blocked()}"
            ) from None
        # 255 may be the command's own; then the connection is still there.
        if done.returncode == 255 and not self.connected():
            raise ConnectionLost(f"the connection to the guest was lost during `{command}`")
        return done

    def connected(self) -> bool:
        """Whether commands can be sent."""
        argv = self.argv()
        check = subprocess.run([*argv[:-1], "-O", "check", argv[-1]], capture_output=True)
        return check.returncode == 0

    def put(self, local: Path, remote: str, *, limit_s: float) -> None:
        """Copy a file or a directory to ``remote``; a directory's content is added to it."""
        quoted = shlex.quote(remote)
        if local.is_dir():
            command = f"mkdir -p {quoted} && tar -x -f - -C {quoted}"
            pack = ["tar", "-c", "-f", "-", "-C", str(local), "."]
            with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
                done = subprocess.run(
                    self.argv([command]), stdin=packing.stdout, capture_output=True, timeout=limit_s
                )
            packed = packing.returncode
        else:
            mode = f"{local.stat().st_mode & 0o7777:o}"
            parent = f'mkdir -p "$(dirname {quoted})"'
            command = f"{parent} && cat > {quoted} && chmod {mode} {quoted}"
            with local.open("rb") as file:
                done = subprocess.run(
                    self.argv([command]), stdin=file, capture_output=True, timeout=limit_s
                )
            packed = 0
        if done.returncode != 0 or packed != 0:
            words = done.stderr.decode(errors="replace").strip()
            raise GuestError(f"cannot copy {local} to {remote} of the guest: {words}")

    def get(self, remote: str, local: Path, *, limit_s: float) -> None:
        """Copy a file of the guest to ``local``. Raises ``GuestError`` when there is none."""
        with local.open("wb") as file:
            done = subprocess.run(
                self.argv([f"cat {shlex.quote(remote)}"]),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.PIPE,
                timeout=limit_s,
            )
        if done.returncode != 0:
            local.unlink()
            words = done.stderr.decode(errors="replace").strip()
            raise GuestError(f"cannot copy {remote} of the guest to {local}: {words}")

    # -- inside

    def _blocked(self) -> str:
        """What the guest's tasks wait for in the kernel, for who finds out why one does not end."""
        try:
            done = subprocess.run(
                self.argv([_BLOCKED]),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_BLOCKED_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return "nor does it say what it waits for"
        return f"the tasks that wait in its kernel:\n{done.stdout.decode(errors='replace')}"

    def _options(self, port: int) -> list[str]:
        return [
            *("-F", "none", "-i", str(self._image.key), "-p", str(port)),
            *("-o", "HostName=127.0.0.1", "-o", f"HostKeyAlias={_NAME}"),
            *("-o", f"UserKnownHostsFile={self._image.known_hosts}"),
            *("-o", "GlobalKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        ]

    def _try_to_connect(self, port: int) -> bool:
        options = [*self._options(port), "-o", "ConnectTimeout=10", "-o", "ControlPersist=no"]
        master = ["ssh", "-M", "-N", "-S", str(self._socket), *options, f"root@{_NAME}"]
        process = self._processes.start("ssh", [*self._prefix, *master])
        while process.exit_code is None:
            if self._socket.exists() and self.connected():
                return True
            time.sleep(_POLL_S)
        self.disconnect()
        time.sleep(_POLL_S)
        return False
