"""SSH to a storage host: only to the host whose key we were given, never further than one command.

Paramiko is called from the worker threads, and whatever it waits for is bounded by the deadline of
the work. Only our own known_hosts file counts: an unknown or changed key is refused, never learnt.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko

from external_storage import Deadline, Unchanged, get_logger

log = get_logger(__name__)

_CONNECT_S = 20.0
"""A host that does not answer in that time is down; the claim is tried again."""
_KEEPALIVE_S = 15

# Its warnings are our exceptions; its tracebacks would be nobody's.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Where to and as whom; secrets are read from their files for each connection."""

    host: str
    known_hosts: Path
    port: int = 22
    user: str = "root"
    key_file: Path | None = None
    key_passphrase_file: Path | None = None
    password_file: Path | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


class Connection:
    """One SSH connection, made when it is needed and again when it is lost. Thread-safe."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self._lock = threading.Lock()
        self._client: paramiko.SSHClient | None = None

    def channel(self, deadline: Deadline, command: str) -> paramiko.Channel:
        """A session in which ``command`` has been started.

        ``command`` is text for the user's shell over there: only constants of ours, nothing that
        came from a cluster. Raises ``Unchanged``: the host cannot be asked.
        """
        transport = self._transport(deadline)
        try:
            channel = transport.open_session(timeout=_wait(deadline))
            with _at_most(_wait(deadline), transport):
                channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as error:
            self.close()
            raise Unchanged(f"{self.login}: no session: {_words(error)}") from error
        return channel

    def tunnel(self, deadline: Deadline, target: tuple[str, int]) -> paramiko.Channel:
        """A connection from over there to ``target``. Raises ``Unchanged``."""
        transport = self._transport(deadline)
        try:
            return transport.open_channel(
                "direct-tcpip", target, ("127.0.0.1", 0), timeout=_wait(deadline)
            )
        except (paramiko.SSHException, OSError, EOFError) as error:
            if not isinstance(error, paramiko.ChannelException):
                self.close()
            where = f"{target[0]}:{target[1]}"
            text = f"{self.login}: no tunnel to {where}: {_words(error)}"
            raise Unchanged(text) from error

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _transport(self, deadline: Deadline) -> paramiko.Transport:
        with self._lock:
            transport = self._client.get_transport() if self._client is not None else None
            if transport is None or not transport.is_active():
                if self._client is not None:
                    self._client.close()
                self._client = self._connect(deadline)
                transport = self._client.get_transport()
                assert transport is not None
                transport.set_keepalive(_KEEPALIVE_S)
            return transport

    def _connect(self, deadline: Deadline) -> paramiko.SSHClient:
        client = paramiko.SSHClient()
        try:
            client.load_host_keys(str(self.login.known_hosts))
        except Exception as error:
            # A damaged line is none of the exceptions that the rest of paramiko has.
            why = error.strerror if isinstance(error, OSError) else "a line is damaged"
            text = f"{self.login}: known_hosts {self.login.known_hosts}: {why}"
            raise Unchanged(text) from error
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        try:
            self._log_in(client, deadline)
        except Exception as error:
            client.close()
            raise Unchanged(f"{self.login}: {self._reason(error)}") from error
        log.info("connected", host=str(self.login))
        return client

    def _log_in(self, client: paramiko.SSHClient, deadline: Deadline) -> None:
        login, wait = self.login, _wait(deadline)
        client.connect(
            login.host,
            port=login.port,
            username=login.user,
            key_filename=str(login.key_file) if login.key_file is not None else None,
            passphrase=_read(login.key_passphrase_file) or None,
            password=_read(login.password_file) or None,
            allow_agent=False,
            look_for_keys=False,
            timeout=wait,
            banner_timeout=wait,
            auth_timeout=wait,
            channel_timeout=wait,
        )

    def _reason(self, error: Exception) -> str:
        """In words for an admin; never with what was in a file."""
        login = self.login
        match error:
            case paramiko.BadHostKeyException():
                return (
                    f"the host's key is not the one in {login.known_hosts}: reinstalled, or "
                    "another host that answers in its place; nothing was sent"
                )
            case paramiko.PasswordRequiredException():
                return f"the key {login.key_file} has a passphrase: give keyPassphraseFile"
            case paramiko.AuthenticationException():
                return f"the host does not accept our key or password for user {login.user}"
            case _:
                return _words(error)


@contextlib.contextmanager
def _at_most(seconds: float, transport: paramiko.Transport) -> Iterator[None]:
    """Around what waits for the host without a limit of its own: ends the connection at the end."""
    watchdog = threading.Timer(seconds, transport.close)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _read(path: Path | None) -> str:
    """Without the end of line that editors add."""
    return "" if path is None else path.read_text(encoding="utf-8").rstrip("\r\n")


def _wait(deadline: Deadline) -> float:
    return max(min(deadline.remaining(), _CONNECT_S), 0.001)


def _words(error: Exception) -> str:
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__
