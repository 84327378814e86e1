"""JSON-RPC to targetd: its HTTP as it is, one connection a call, a deadline around all of it.

targetd answers in HTTP/1.0 without a length and closes; it holds back a refused password for two
seconds, and answers everybody from our address with 503 meanwhile; to what it cannot parse it
answers without a status line. No HTTP library has a deadline for a whole call, so the bytes are
read here.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from external_storage import Deadline, ProvisioningFailed, ProvisioningInBackground, Unchanged
from iscsi_targetd_provisioner.observing import Observer, observed, unobserved

PATH = "/targetrpc"
_SECRETS = ("in_pass", "out_pass")
PORT = 18700
MAX_BODY = 131072
_MAX_ANSWER = 1 << 26
_RECEIVE = 1 << 16
_CONNECT_S = 20.0
TARPIT_S = 2.0
_BUSY_TRIES = 5
REFUSED_PAUSE_S = 30.0
"""How long a refused password is not tried again: a try locks our address out for two seconds."""


class Stream(Protocol):
    """What a call goes over: a socket, or a channel of SSH."""

    def settimeout(self, seconds: float | None, /) -> None: ...
    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


Opener = Callable[[Deadline], Stream]
"""Opens one connection; ``OSError`` or ``Unchanged`` if it cannot."""


class RpcError(ProvisioningFailed):
    """targetd answered with an error; ``code`` is its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who we are to targetd; read again for every call, since files are replaced."""

    user: Callable[[], str]
    password: Callable[[], str]

    @classmethod
    def from_files(cls, user: Path, password: Path) -> Account:
        return cls(user=lambda: _text_of(user), password=lambda: _text_of(password))

    def __repr__(self) -> str:
        return "Account()"

    def header(self) -> str:
        """Raises ``Unchanged`` for what cannot be sent."""
        try:
            user, password = self.user(), self.password()
        except OSError as error:
            raise Unchanged(f"credentials: {error.filename}: {error.strerror}") from None
        if ":" in user or ":" in password:
            raise Unchanged("credentials: targetd takes no ':' in a user name or a password")
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").rstrip("\r\n")


def connect(host: str, port: int, *, context: ssl.SSLContext | None) -> Opener:
    """Opens connections to targetd; with ``context`` over TLS."""

    def open_stream(deadline: Deadline) -> Stream:
        wait = max(min(deadline.remaining(), _CONNECT_S), 0.001)
        plain = socket.create_connection((host, port), timeout=wait)
        if context is None:
            return plain
        try:
            return context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise

    return open_stream


@dataclass(slots=True, kw_only=True)
class Rpc:
    """Calls of one targetd. Thread-safe."""

    host: str
    """For errors."""
    account: Account
    open_stream: Opener
    observe: Observer = unobserved
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _ids: Any = field(default_factory=lambda: itertools.count(1))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _refused: tuple[str, float] | None = None
    """The credentials that were refused, and when."""

    def call(self, method: str, deadline: Deadline, *, changes: bool, **params: object) -> Any:  # noqa: ANN401
        """The result of a method.

        Args:
            changes: whether an answer that does not come leaves something open.

        Raises:
            RpcError: targetd's own error.
            Unchanged: it could not be asked, or not read.
            ProvisioningInBackground: it was asked, and how that ended is not known.
        """
        header = self._credentials()
        message = {"jsonrpc": "2.0", "method": method, "params": params, "id": next(self._ids)}
        body = json.dumps(message).encode()
        if len(body) > MAX_BODY:
            raise ProvisioningFailed(f"{self.host}: {method} is larger than targetd takes")
        request = (
            f"POST {PATH} HTTP/1.0\r\nAuthorization: {header}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        for _ in range(_BUSY_TRIES):
            with observed(self.observe, method):
                status, content = self._exchange(method, request, deadline, changes=changes)
                if status != http.HTTPStatus.SERVICE_UNAVAILABLE:
                    self._check_status(method, status, header)
                    return self._result(message, content, changes=changes)
            # Somebody behind our address has sent a wrong password: the answer to that is due.
            if deadline.remaining() <= TARPIT_S:
                break
            self.sleep(TARPIT_S)
        text = "is busy refusing a password from our address (503): who else uses it?"
        raise Unchanged(f"{self.host}: targetd {text}")

    def _credentials(self) -> str:
        header = self.account.header()
        with self._lock:
            if self._refused is not None and self._refused[0] == header:
                left = REFUSED_PAUSE_S - (self.clock() - self._refused[1])
                if left > 0:
                    text = "targetd has refused our user name or password"
                    raise Unchanged(f"{self.host}: {text}; tried again in {left:.0f} s")
            return header

    def _exchange(
        self, method: str, request: bytes, deadline: Deadline, *, changes: bool
    ) -> tuple[int, bytes]:
        try:
            stream = self.open_stream(deadline)
        except OSError as error:
            raise Unchanged(f"{self.host}: cannot be reached: {_words(error)}") from error
        try:
            stream.settimeout(_seconds(deadline))
            stream.sendall(request)
            answer = _read_all(stream, deadline)
            if _is_unread(answer):
                raise Unchanged(f"{self.host}: {method}: targetd did not understand our request")
            return _parse(answer)
        except (OSError, http.client.HTTPException) as error:
            kind = ProvisioningInBackground if changes else Unchanged
            raise kind(f"{self.host}: {method}: {_words(error)}") from error
        finally:
            stream.close()

    def _check_status(self, method: str, status: int, header: str) -> None:
        if status == http.HTTPStatus.UNAUTHORIZED:
            with self._lock:
                self._refused = (header, self.clock())
            raise Unchanged(f"{self.host}: targetd refuses our user name or password (401)")
        if status != http.HTTPStatus.OK:
            raise Unchanged(f"{self.host}: {method}: HTTP status {status}: is this a targetd?")
        with self._lock:
            self._refused = None

    def _result(self, message: dict[str, Any], content: bytes, *, changes: bool) -> Any:  # noqa: ANN401
        method = message["method"]
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        good = isinstance(answer, dict) and ("result" in answer or "error" in answer)
        if not good or answer.get("id") not in (message["id"], 0):
            # 0 is what it says of a request that it could not read the number of.
            kind = ProvisioningInBackground if changes else Unchanged
            what = "is another request's" if good else "is cut off or no JSON-RPC"
            raise kind(f"{self.host}: {method}: the answer {what}")
        if "error" in answer:
            error = answer["error"]
            text = f"{self.host}: {method}: {error.get('message')} ({error.get('code')})"
            raise RpcError(int(error.get("code", -1)), _without_secrets(text, message["params"]))
        return answer["result"]


def _without_secrets(text: str, params: Mapping[str, Any]) -> str:
    """targetd puts into its errors what it likes, such as the arguments."""
    for key in _SECRETS:
        if params.get(key):
            text = text.replace(str(params[key]), "***")
    return text


def _is_unread(answer: bytes) -> bool:
    """What targetd cannot parse it answers without a status line, and does nothing."""
    if not answer.startswith(b"{"):
        return False
    try:
        content = json.loads(answer)
    except ValueError:
        return False
    return isinstance(content, dict) and "error" in content


def _seconds(deadline: Deadline) -> float:
    """For a socket: neither 0, which is something else there, nor without an end."""
    return min(max(deadline.remaining(), 0.001), 3600.0)


def _read_all(stream: Stream, deadline: Deadline) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if deadline.expired:
            raise TimeoutError
        stream.settimeout(_seconds(deadline))
        data = stream.recv(_RECEIVE)
        if not data:
            return b"".join(parts)
        parts.append(data)
        size += len(data)
        if size > _MAX_ANSWER:
            raise http.client.HTTPException("the answer is too long")


class _Bytes:
    """Bytes in the place of a socket, for the parser of the standard library."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_args: object, **_kwargs: object) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parse(data: bytes) -> tuple[int, bytes]:
    if not data:
        raise http.client.HTTPException("it hung up without an answer")
    if not data.startswith(b"HTTP/"):
        raise http.client.HTTPException("the answer has no status line")
    response = http.client.HTTPResponse(_Bytes(data))  # type: ignore[arg-type]
    response.begin()
    return response.status, response.read()


def _words(error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not one we trust: {error.verify_message}"
        case ssl.SSLError():
            return f"no TLS: {error.reason or error}"
        case TimeoutError():
            return "no answer in time"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return str(error) or type(error).__name__
