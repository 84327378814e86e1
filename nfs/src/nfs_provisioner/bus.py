"""A blocking connection to a D-Bus message bus where no step can wait for ever.

jeepney does the wire format and the handshake. Its own blocking connection is not used because
its ``Hello`` has no time limit and it parses messages that ``bus_relay`` only passes on.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    new_method_call,
)
from jeepney.auth import BEGIN, Authenticator

BUS_NAME = "org.freedesktop.DBus"
BUS_DRIVER = DBusAddress("/org/freedesktop/DBus", bus_name=BUS_NAME, interface=BUS_NAME)

_HEADER_BYTES = 16
_METHOD_CALL: int = MessageType.method_call.value
_MAX_MESSAGE = 128 * 1024 * 1024  # the protocol's own limit
_READ_BYTES = 65536


class CallFailed(Exception):
    """The other side answered a call with an error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message or name)
        self.name = name
        """The D-Bus error name, such as ``org.freedesktop.DBus.Error.ServiceUnknown``."""


class Frames:
    """Cuts a byte stream into D-Bus messages, unparsed."""

    def __init__(self, data: bytes = b"") -> None:
        self._buffer = bytearray(data)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def __iter__(self) -> Iterator[bytes]:
        while (size := self._next_size()) is not None and len(self._buffer) >= size:
            frame = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield frame

    def _next_size(self) -> int | None:
        """Bytes of the first message (its fixed header says so). ConnectionError if absurd."""
        if len(self._buffer) < _HEADER_BYTES:
            return None
        order = "<" if self._buffer[0] == ord("l") else ">"
        (body,) = struct.unpack_from(order + "I", self._buffer, 4)
        (fields,) = struct.unpack_from(order + "I", self._buffer, 12)
        size: int = _HEADER_BYTES + (fields + 7) // 8 * 8 + body
        if size > _MAX_MESSAGE:
            raise ConnectionError(f"a D-Bus message of {size} bytes")
        return size


def is_method_call(frame: bytes) -> bool:
    """Whether an unparsed message is a call (and not an answer, an error or a signal)."""
    return frame[1] == _METHOD_CALL


class BusConnection:
    """One authenticated connection. Not thread-safe; close it after any OSError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._frames = Frames()
        # A reply that was under way when an earlier bus died can reach us through the relay,
        # addressed to the same ":1.1". It must not match a call of this connection.
        self._serial = secrets.randbelow(1 << 31)

    @classmethod
    def open(cls, path: Path | str, *, timeout_s: float) -> Self:
        """Connect, authenticate and say Hello within ``timeout_s``. Raises OSError."""
        deadline = time.monotonic() + timeout_s
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            _authenticate(sock)
            connection = cls(sock)
            connection.call(new_method_call(BUS_DRIVER, "Hello"), timeout_s=_until(deadline))
        except (ValueError, CallFailed) as error:  # jeepney: AuthenticationError is a ValueError
            sock.close()
            raise ConnectionError(f"the bus refused us: {error}") from error
        except BaseException:
            sock.close()
            raise
        return connection

    def call(self, message: Message, *, timeout_s: float) -> tuple[Any, ...]:
        """Send a method call and wait for its answer's body.

        Raises CallFailed if the answer is an error, OSError (TimeoutError among them) if none
        came; after that the connection is of no use.
        """
        deadline = time.monotonic() + timeout_s
        self._serial = self._serial % 0xFFFFFFFE + 1
        self.sock.settimeout(timeout_s)
        self.sock.sendall(message.serialise(serial=self._serial))
        while True:
            for frame in self._frames:
                reply = Message.from_buffer(frame)
                if reply.header.fields.get(HeaderFields.reply_serial) == self._serial:
                    return _body(reply)
            self._receive(deadline)

    def send(self, frame: bytes, *, timeout_s: float) -> None:
        """Send an unparsed message. Raises OSError."""
        self.sock.settimeout(timeout_s)
        self.sock.sendall(frame)

    def frames(self) -> Iterator[bytes]:
        """What has come so far, unparsed, without reading from the socket."""
        return iter(self._frames)

    def receive(self, *, timeout_s: float) -> None:
        """Read once. Raises OSError, ConnectionError at the end of the stream."""
        self._receive(time.monotonic() + timeout_s)

    def close(self) -> None:
        self.sock.close()

    def _receive(self, deadline: float) -> None:
        self.sock.settimeout(_until(deadline))
        data = self.sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the bus closed the connection")
        self._frames.feed(data)


def socket_path(address: str) -> str:
    """The path in a ``unix:path=…`` address; other transports are a ValueError."""
    prefix = "unix:path="
    if not address.startswith(prefix) or "," in address or ";" in address:
        raise ValueError(f"not a unix:path= D-Bus address: {address}")
    return address.removeprefix(prefix)


def _until(deadline: float) -> float:
    """Seconds left; at least a little, because a socket timeout of 0 means non-blocking."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer from the bus in time")
    return left


def _authenticate(sock: socket.socket) -> None:
    sock.sendall(b"\0")
    authenticator = Authenticator(inc_null_byte=False)
    for line in authenticator:
        sock.sendall(line)
        answer = sock.recv(1024)
        if not answer:
            raise ConnectionResetError("the bus closed the connection during the handshake")
        authenticator.feed(answer)
    sock.sendall(BEGIN)


def _body(reply: Message) -> tuple[Any, ...]:
    if reply.header.message_type is MessageType.error:
        name = reply.header.fields.get(HeaderFields.error_name, "")
        raise CallFailed(name, " ".join(str(part) for part in reply.body))
    body: tuple[Any, ...] = reply.body
    return body
