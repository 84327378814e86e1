"""Ganesha's export manager over D-Bus: add, remove and list live exports.

Source: NFS-Ganesha V4.3 ``export_mgr.c``; object ``/org/ganesha/nfsd/ExportMgr``, interface
``org.ganesha.nfsd.exportmgr``. Its errors are told apart by their words, because it has one error
name for most of them.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from jeepney import DBusAddress, new_method_call

from nfs_provisioner.bus import BusConnection, CallFailed, socket_path

_MANAGER = DBusAddress(
    "/org/ganesha/nfsd/ExportMgr",
    bus_name="org.ganesha.nfsd",
    interface="org.ganesha.nfsd.exportmgr",
)
_PEER = DBusAddress(
    "/org/ganesha/nfsd/ExportMgr",
    bus_name="org.ganesha.nfsd",
    interface="org.freedesktop.DBus.Peer",
)
_PSEUDO_ROOT_ID = 0

_BUSY = "another export admin operation is in progress"
_ACTIVE = "already active"
_UNKNOWN_ID = "Export id not found"
_ADDED = re.compile(r"(\d+) exports? added")

# Errors of the bus itself that mean "nobody there to answer", so far.
_ABSENT = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.NoReply",
    "org.freedesktop.DBus.Error.Disconnected",
    # Asked between owning the name and registering the object.
    "org.freedesktop.DBus.Error.UnknownObject",
    "org.freedesktop.DBus.Error.UnknownMethod",
)

_BUSY_TRIES = 20
_BUSY_PAUSE_S = 0.1


class ExportError(Exception):
    """Anything that went wrong between us and Ganesha's export manager."""


class BusUnavailable(ExportError):
    """The bus or Ganesha is not there or gave no answer in time; retry later."""


class Busy(ExportError):
    """Ganesha was still busy with another export operation after all our tries; retry later."""


class ExportRejected(ExportError):
    """Ganesha refused the export; its words are the message. A retry alone will not help."""


class ExportManager:
    """A client of the export manager at ``bus_address`` (``unix:path=…``).

    Thread-safe: one connection, one call at a time (Ganesha works them one by one as well),
    opened at the first call and again after a failure. A call takes at most ``timeout_s`` seconds,
    not counting the wait for calls of other threads and the tries after ``Busy`` (2 s in all).
    """

    def __init__(self, bus_address: str, *, timeout_s: float = 30.0) -> None:
        self._socket = socket_path(bus_address)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connection: BusConnection | None = None

    def add(self, file: Path, export_id: int, *, path: Path) -> None:
        """Serve the export ``export_id`` that ``file`` describes; ``path`` is its directory.

        An id that is live with the same path already is success: an earlier answer was lost.
        Raises BusUnavailable, Busy, ExportRejected.
        """
        expression = f"EXPORT(Export_Id={export_id})"
        try:
            (answer,) = self._call(_MANAGER, "AddExport", "ss", (str(file), expression))
        except CallFailed as error:
            if _ACTIVE in str(error) and self.path_of(export_id) == str(path):
                return
            raise ExportRejected(f"export {export_id} of {path}: {error}") from error
        added = _ADDED.search(str(answer))
        if added is None or added[1] == "0":
            raise ExportRejected(f"export {export_id} of {path}: {answer}")

    def remove(self, export_id: int) -> None:
        """Stop serving ``export_id``; one that Ganesha does not know is done already.

        Clients that have it mounted get ESTALE. Raises BusUnavailable, Busy, ExportRejected.
        """
        try:
            self._call(_MANAGER, "RemoveExport", "q", (export_id,))
        except CallFailed as error:
            if _UNKNOWN_ID not in str(error):
                raise ExportRejected(f"removal of export {export_id}: {error}") from error

    def path_of(self, export_id: int) -> str | None:
        """The directory the live export ``export_id`` serves, None if there is none.

        Raises BusUnavailable, Busy, ExportRejected.
        """
        try:
            answer = self._call(_MANAGER, "DisplayExport", "q", (export_id,))
        except CallFailed as error:
            if _UNKNOWN_ID in str(error):
                return None
            raise ExportRejected(f"look-up of export {export_id}: {error}") from error
        return str(answer[1])

    def show(self) -> dict[int, str]:
        """Every live export but the pseudo root: id → directory.

        Raises BusUnavailable, Busy, ExportRejected.
        """
        try:
            _, exports = self._call(_MANAGER, "ShowExports")
        except CallFailed as error:
            raise ExportRejected(f"list of exports: {error}") from error
        # What follows the first two fields differs between Ganesha's versions and builds.
        return {row[0]: row[1] for row in exports if row[0] != _PSEUDO_ROOT_ID}

    def ping(self) -> None:
        """Ask Ganesha's D-Bus thread for a sign of life, at no cost. Raises BusUnavailable."""
        try:
            self._call(_PEER, "Ping")
        except (CallFailed, Busy) as error:
            raise BusUnavailable(str(error)) from error

    def close(self) -> None:
        """Close the connection; a later call opens it again."""
        with self._lock:
            self._disconnect()

    def _call(
        self,
        target: DBusAddress,
        method: str,
        signature: str | None = None,
        args: tuple[object, ...] = (),
    ) -> tuple[Any, ...]:
        """The answer's body. Raises CallFailed, Busy, BusUnavailable."""
        message = new_method_call(target, method, signature, args)
        for _ in range(_BUSY_TRIES):
            try:
                with self._lock:
                    return self._exchange(message)
            except CallFailed as error:
                if error.name in _ABSENT:
                    raise BusUnavailable(f"ganesha is not on the bus: {error}") from error
                if _BUSY not in str(error):
                    raise
                time.sleep(_BUSY_PAUSE_S)
        raise Busy(f"ganesha: {_BUSY}")

    def _exchange(self, message: Any) -> tuple[Any, ...]:  # noqa: ANN401 - jeepney has no types
        if self._connection is not None:
            try:
                return self._connection.call(message, timeout_s=self._timeout_s)
            except ConnectionError:
                # Most likely the bus was restarted since. That the call was carried out and only
                # its answer lost does no harm: every call here can be made twice.
                self._disconnect()
            except OSError as error:
                self._give_up(error)
        try:
            self._connection = BusConnection.open(self._socket, timeout_s=self._timeout_s)
            return self._connection.call(message, timeout_s=self._timeout_s)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        # Of no use any more: an answer that comes late must not be there for the next call.
        self._disconnect()
        raise BusUnavailable(f"no answer over the bus {self._socket}: {error}") from error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
