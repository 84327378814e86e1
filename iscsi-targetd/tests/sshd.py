"""A real sshd on loopback, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from external_storage import (
    Deadline,
    Unchanged,
)
from external_storage.testing.guest.storage import make_key
from external_storage.testing.processes import free_port
from external_storage.testing.waiting import wait_until
from iscsi_targetd_provisioner.helper_session import Helper
from iscsi_targetd_provisioner.ssh import Connection, Login

FAKE = Path(__file__).with_name("fake_helper.py")


@dataclass
class Sshd:
    """An sshd of the test's own, whose one key may run the fake helper and nothing else."""

    directory: Path
    port: int
    connections: list[Connection] = field(default_factory=list)

    def login(self, **fields: Any) -> Login:
        given = {"host": "127.0.0.1", "port": self.port, "user": user(), **fields}
        given.setdefault("known_hosts", self.directory / "known_hosts")
        given.setdefault("key_file", self.directory / "key")
        return Login(**given)

    def helper(self, start: str = "", **fields: Any) -> Helper:
        self.set_command(f"{sys.executable} {FAKE} {start}")
        connection = self.connection(**fields)
        return Helper(open_channel=connection.channel, host="storage", installed=True)

    def connection(self, **fields: Any) -> Connection:
        """Closed at the end."""
        made = Connection(self.login(**fields))
        self.connections.append(made)
        return made

    def set_command(self, command: str) -> None:
        public = (self.directory / "key.pub").read_text().strip()
        line = f'command="{command}",restrict,port-forwarding {public}\n'
        (self.directory / "authorized_keys").write_text(line)

    @contextlib.contextmanager
    def allowed(self, line: str) -> Iterator[None]:
        """With this line for the key, and no other."""
        keys = self.directory / "authorized_keys"
        before = keys.read_text() if keys.exists() else ""
        keys.write_text(f"{line}\n")
        try:
            yield
        finally:
            keys.write_text(before)


def user() -> str:
    return os.environ.get("USER") or "root"


@contextlib.contextmanager
def sshd_in(directory: Path) -> Iterator[Sshd]:
    program = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("sshd is not installed: apt-get install openssh-server")
    host_key = make_key(directory / "host_key")
    make_key(directory / "key")
    port = free_port()
    settings = {
        "HostKey": directory / "host_key",
        "AuthorizedKeysFile": directory / "authorized_keys",
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
        "PermitRootLogin": "yes",
        "MaxStartups": "100",
    }
    (directory / "config").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    with (directory / "log").open("wb") as log:
        argv = [program, "-D", "-e", "-f", str(directory / "config")]
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_until(lambda: _listens(port), "sshd listens")
        made = Sshd(directory, port)
        yield made
        for connection in made.connections:
            connection.close()
    finally:
        process.terminate()
        process.wait(30)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def soon(seconds: float = 60.0) -> Deadline:
    return Deadline(time.monotonic() + seconds)


def failure(helper: Helper, deadline: Deadline | None = None) -> str:
    """Why the host cannot be asked."""
    with contextlib.closing(helper), pytest.raises(Unchanged) as caught:
        helper.request("pools", {}, deadline or soon())
    return str(caught.value)
