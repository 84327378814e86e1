"""What Ganesha takes for its bus: a relay that outlives dbus-daemon.

libdbus ends its process when the system bus goes away (``exit_on_disconnect``, which Ganesha 4.3
leaves on): kill dbus-daemon and the NFS server is gone within milliseconds, with every client
stalled for the restart and the grace period. A Ganesha that was started without a bus never
connects to one. Neither is a price for a management interface.

So Ganesha connects to this relay. The relay answers the two questions Ganesha has for a bus
(``Hello``, ``RequestName``), owns ``org.ganesha.nfsd`` on the real bus in its place, and passes
method calls down and answers up. When dbus-daemon dies, Ganesha sees nothing; the relay takes the
name again on the next one. An answer that was under way is lost, and its caller, who lost its own
connection to the same bus, asks again.

Rejected: no dbus-daemon at all and this relay as the bus (smaller, but an admin's ``ganesha_mgr``,
``ganesha_stats`` and ``gdbus`` would have nothing to connect to); managing Ganesha by SIGHUP alone
(it says nothing about success, and does not bring the bus back either).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from pathlib import Path

from jeepney import (
    HeaderFields,
    Message,
    MessageFlag,
    new_error,
    new_method_call,
    new_method_return,
)

from external_storage.logs import get_logger
from nfs_provisioner.backoff import Backoff
from nfs_provisioner.bus import BUS_DRIVER, BUS_NAME, BusConnection, Frames, is_method_call

log = get_logger(__name__)

GANESHA_NAME = "org.ganesha.nfsd"

_TIMEOUT_S = 5.0
_PRIMARY_OWNER = 1
_DO_NOT_QUEUE = 4


class BusRelay:
    """Listens on ``relay_socket`` for one Ganesha and joins it to the bus at ``bus_socket``."""

    def __init__(self, *, relay_socket: Path, bus_socket: Path) -> None:
        self._relay_socket = relay_socket
        self._bus_socket = bus_socket
        self._listener: socket.socket | None = None
        self._ganesha: socket.socket | None = None
        self._ganesha_frames = Frames()
        self._bus: BusConnection | None = None
        self._named = False
        self._backoff = Backoff(first_s=0.05, longest_s=2.0)
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen from now on. Raises OSError."""
        self._relay_socket.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._relay_socket))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, name="ganesha-bus-relay", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the relay, and with it (see above) any Ganesha still connected."""
        self._stopping.set()
        self._wake_write.send(b"x")
        if (ganesha := self._ganesha) is not None:
            _shut(ganesha)  # wakes a send that waits for a stuck Ganesha
        if self._thread is not None:
            self._thread.join()
        for sock in (self._listener, self._ganesha, self._wake_read, self._wake_write):
            if sock is not None:
                sock.close()
        self._drop_bus()
        self._relay_socket.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception:
                # The thread must live: its end would be the end of Ganesha.
                log.exception("bus relay step failed")
                self._drop_bus()
                time.sleep(0.1)

    def _step(self) -> None:
        wait_s = self._connect_bus()
        ready = self._readable(wait_s)
        # Ganesha first: the end of a killed one must be seen before its successor is accepted.
        if self._ganesha in ready:
            self._from_ganesha()
        if self._bus is not None and self._bus.sock in ready:
            self._from_bus()
        if self._listener in ready:
            self._accept()

    def _readable(self, wait_s: float | None) -> set[socket.socket | None]:
        bus_sock = self._bus.sock if self._bus is not None else None
        with selectors.DefaultSelector() as selector:
            for sock in (self._wake_read, self._listener, self._ganesha, bus_sock):
                if sock is not None:
                    selector.register(sock, selectors.EVENT_READ)
            return {
                key.fileobj
                for key, _ in selector.select(wait_s)
                if isinstance(key.fileobj, socket.socket)
            }

    def _accept(self) -> None:
        assert self._listener is not None
        sock, _ = self._listener.accept()
        pid, uid, _ = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        if self._ganesha is not None or uid != os.geteuid():
            log.warning("refused a second connection to the bus relay", pid=pid, uid=uid)
            sock.close()
            return
        try:
            sock.settimeout(_TIMEOUT_S)
            rest = _authenticate_peer(sock)
        except OSError as error:
            log.warning("handshake with ganesha failed", error=error)
            sock.close()
            return
        # From here on writes may block: a message cut short would be worse than a wait.
        sock.settimeout(None)
        self._ganesha, self._ganesha_frames, self._named = sock, Frames(rest), False
        self._pass_answers_up()  # libdbus sends its first call right behind the handshake

    def _from_ganesha(self) -> None:
        assert self._ganesha is not None
        try:
            data = self._ganesha.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._ganesha.close()
            self._ganesha, self._named = None, False
            self._drop_bus()  # gives the name back, so that callers see that nobody is there
            return
        self._ganesha_frames.feed(data)
        self._pass_answers_up()

    def _pass_answers_up(self) -> None:
        for frame in self._ganesha_frames:
            if is_method_call(frame):
                self._answer(frame)
            elif self._bus is not None:
                self._to_bus(frame)

    def _answer(self, frame: bytes) -> None:
        """Be the bus for Ganesha's own calls; it makes none to anybody else."""
        call = Message.from_buffer(frame)
        member = call.header.fields.get(HeaderFields.member)
        if member == "Hello":
            reply = new_method_return(call, "s", (":1.0",))
        elif member in ("RequestName", "ReleaseName"):
            self._named = member == "RequestName" or self._named
            reply = new_method_return(call, "u", (_PRIMARY_OWNER,))
        elif member in ("AddMatch", "RemoveMatch"):
            reply = new_method_return(call)
        else:
            reply = new_error(call, "org.freedesktop.DBus.Error.UnknownMethod", "s", (str(member),))
        if self._ganesha is not None and not call.header.flags & MessageFlag.no_reply_expected:
            reply.header.fields[HeaderFields.sender] = BUS_NAME
            self._to_ganesha(reply.serialise(serial=call.header.serial))

    def _from_bus(self) -> None:
        assert self._bus is not None
        try:
            self._bus.receive(timeout_s=_TIMEOUT_S)
        except OSError as error:
            log.warning("lost the bus; ganesha goes on serving", error=error)
            self._drop_bus()
            return
        self._pass_calls_down()

    def _pass_calls_down(self) -> None:
        if self._bus is None:
            return
        for frame in self._bus.frames():
            if is_method_call(frame):
                self._to_ganesha(frame)

    def _to_ganesha(self, frame: bytes) -> None:
        assert self._ganesha is not None
        try:
            self._ganesha.sendall(frame)
        except OSError as error:  # it is gone; the next read says so, too
            log.debug("could not write to ganesha", error=error)

    def _to_bus(self, frame: bytes) -> None:
        assert self._bus is not None
        try:
            self._bus.send(frame, timeout_s=_TIMEOUT_S)
        except OSError as error:
            log.warning("lost the bus; ganesha goes on serving", error=error)
            self._drop_bus()

    def _connect_bus(self) -> float | None:
        """Take the name on the bus if it is wanted; seconds until the next try, None = no need."""
        if not self._named or self._bus is not None:
            return None
        if (wait_s := self._backoff.remaining_s()) > 0:
            return wait_s
        try:
            bus = BusConnection.open(self._bus_socket, timeout_s=_TIMEOUT_S)
        except OSError as error:
            log.debug("bus not there yet", error=error)
            return self._backoff.failed()
        request = new_method_call(BUS_DRIVER, "RequestName", "su", (GANESHA_NAME, _DO_NOT_QUEUE))
        try:
            (owner,) = bus.call(request, timeout_s=_TIMEOUT_S)
        except Exception:
            bus.close()
            self._backoff.failed()
            raise
        if owner != _PRIMARY_OWNER:
            bus.close()
            log.warning("another process owns the name on the bus", name=GANESHA_NAME)
            return self._backoff.failed()
        self._backoff.reset()
        self._bus = bus
        self._pass_calls_down()  # a call may have come right behind the answer
        return None

    def _drop_bus(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._bus = None


def _authenticate_peer(sock: socket.socket) -> bytes:
    """The server's half of the D-Bus handshake; what was read beyond it. Raises OSError.

    The claim in AUTH is not looked at: the kernel has told us who connects (SO_PEERCRED).
    """
    buffer = b""
    while len(buffer) < 4096:
        line, separator, rest = buffer.partition(b"\r\n")
        if not separator:
            data = sock.recv(4096)
            if not data:
                raise ConnectionResetError("closed during the handshake")
            buffer += data
            continue
        buffer = rest
        command = line.lstrip(b"\0")
        if command == b"BEGIN":
            return buffer
        if command.startswith(b"AUTH EXTERNAL"):
            sock.sendall(b"OK " + os.urandom(16).hex().encode() + b"\r\n")
        elif command.startswith(b"AUTH"):
            sock.sendall(b"REJECTED EXTERNAL\r\n")
        else:
            sock.sendall(b"ERROR\r\n")  # among them NEGOTIATE_UNIX_FD, which may be refused
    raise ConnectionError("no end of the handshake")


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed
        sock.shutdown(socket.SHUT_RDWR)
