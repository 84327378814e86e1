"""QEMU's machine protocol: commands and events as JSON lines on a socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from external_storage.testing.guest.errors import GuestError

_LIMIT_S: Final = 120.0


class Qmp:
    """One connection. One thread at a time uses it."""

    def __init__(self, path: Path) -> None:
        """Connects. Raises ``OSError`` when nobody listens there yet."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._received = b""
        self._events: list[dict[str, Any]] = []
        self._read(time.monotonic() + _LIMIT_S)  # the greeting
        self.execute("qmp_capabilities")

    def close(self) -> None:
        """Close it; nothing when that is done."""
        self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401
        """What the command returns. Raises ``GuestError`` when QEMU refuses it or is gone."""
        message: dict[str, object] = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        deadline = time.monotonic() + _LIMIT_S
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise GuestError(f"QEMU is gone: {error}") from error
        while True:
            answer = self._read(deadline)
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise GuestError(f"QEMU refuses {command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def monitor(self, line: str) -> str:
        """A command of the monitor for people, for what the protocol has none; its answer."""
        answer: str = self.execute("human-monitor-command", {"command-line": line})
        return answer.strip()

    def wait_for_event(self, name: str, is_it: Callable[[Mapping[str, Any]], bool]) -> None:
        """Wait for an event of that name whose data ``is_it``; older ones count too."""
        deadline = time.monotonic() + _LIMIT_S
        while True:
            while self._events:
                event = self._events.pop(0)
                if event["event"] == name and is_it(event.get("data", {})):
                    return
            message = self._read(deadline)
            if "event" in message:
                self._events.append(message)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                more = self._socket.recv(65536)
            except TimeoutError:
                raise GuestError(f"QEMU has not answered in {_LIMIT_S:.0f} s") from None
            except OSError as error:
                raise GuestError(f"QEMU is gone: {error}") from error
            if not more:
                raise GuestError("QEMU is gone: it has closed its socket")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
