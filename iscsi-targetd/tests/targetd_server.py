"""A targetd for tests: its HTTP and its JSON-RPC to the letter, over a model in memory.

Written from observations of targetd 0.10.4: what it answers, byte for byte, to good and bad
requests; which code stands for what; and its habits, such as making a thick volume when a thin one
fails. The real one needs LIO and LVM.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MIB = 1 << 20
EXTENT = 4 * MIB
MAX_BODY = 131072
USER, PASSWORD = "admin", "a password of targetd"


class TargetdError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Lv:
    group: str
    pool: str
    """The thin pool it is in; empty: thick."""
    size: int
    uuid: str


@dataclass
class Model:
    """Volume groups with their thin pools, and one target."""

    pools: dict[str, int]
    """Sizes of the configured block pools, ``group`` or ``group/thin-pool``."""
    volumes: dict[tuple[str, str], Lv] = field(default_factory=dict)
    """By group and name."""
    exports: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    """By initiator and LUN: group and name of the volume."""
    auth: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    tpg_authentication: int = -1
    poisoned: bool = False
    """Somebody has made a LUN of a volume outside of all pools."""
    thin_fails: bool = False

    def used(self, pool: str) -> int:
        group, _, thin = pool.partition("/")
        return sum(lv.size for lv in self.volumes.values() if (lv.group, lv.pool) == (group, thin))

    def check_pool(self, pool: str) -> None:
        # Only the group is compared: "vg", "vg/any" all pass where "vg/pool" is configured.
        if pool.partition("/")[0] not in {name.partition("/")[0] for name in self.pools}:
            raise TargetdError(-110, "Invalid pool")

    # -- methods

    def pool_list(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "size": size,
                "free_size": max(size - self.used(name), 0),
                "type": "block",
                "uuid": f"uuid-{name}",
            }
            for name, size in self.pools.items()
        ] + [{"name": "/mnt/btrfs", "size": 1, "free_size": 1, "type": "fs"}]

    def vol_list(self, pool: str) -> list[dict[str, Any]]:
        self.check_pool(pool)
        group, _, thin = pool.partition("/")
        return [
            {"name": name, "size": lv.size, "uuid": lv.uuid}
            for (in_group, name), lv in self.volumes.items()
            if in_group == group and lv.pool == thin
        ]

    def vol_create(self, pool: str, name: str, size: int) -> None:
        self.check_pool(pool)
        group, _, thin = pool.partition("/")
        if any(entry["name"] == name for entry in self.vol_list(pool)):
            raise TargetdError(-50, "Volume with that name exists")
        rounded = -(-int(size) // EXTENT) * EXTENT
        if (group, name) in self.volumes:
            raise TargetdError(-1, f"LVMError: volume {name} exists")
        if thin and self.thin_fails:
            thin = ""
        elif self.used(pool) + rounded > self.pools.get(pool, 1 << 50):
            raise TargetdError(-1, "LVMError: Insufficient free space: 9 extents needed")
        self.volumes[(group, name)] = Lv(group, thin, rounded, f"uuid-{group}-{name}")

    def vol_destroy(self, pool: str, name: str) -> None:
        lv = self._volume(pool, name)
        if (lv.group, name) in self.exports.values():
            raise TargetdError(-303, f"Volume '{name}' cannot be destroyed: it is exported")
        del self.volumes[(lv.group, name)]

    def vol_resize(self, pool: str, name: str, size: int) -> None:
        lv = self._volume(pool, name)
        if int(size) <= lv.size:
            raise TargetdError(-32602, "New size must be larger")
        rounded = -(-int(size) // EXTENT) * EXTENT
        if self.used(pool) - lv.size + rounded > self.pools.get(pool, 1 << 50):
            raise TargetdError(-303, "Failed to resize volume, error was: insufficient free space")
        lv.size = rounded

    def _volume(self, pool: str, name: str) -> Lv:
        self.check_pool(pool)
        group, _, thin = pool.partition("/")
        lv = self.volumes.get((group, name))
        if lv is None or lv.pool != thin:
            raise TargetdError(-103, f"Volume {name} not found in pool {pool}")
        return lv

    def export_list(self) -> list[dict[str, Any]]:
        if self.poisoned:
            raise TargetdError(-110, "Invalid pool")
        found = []
        for (initiator, lun), (group, name) in self.exports.items():
            last = [pool for pool in self.pools if pool.partition("/")[0] == group][-1]
            lv = self.volumes[(group, name)]
            entry = {"initiator_wwn": initiator, "lun": lun, "vol_name": name, "pool": last}
            found.append({**entry, "vol_uuid": lv.uuid, "vol_size": lv.size})
        return found

    def export_create(self, pool: str, vol: str, initiator_wwn: str, lun: int) -> None:
        self.check_pool(pool)
        group = pool.partition("/")[0]
        if (group, vol) not in self.volumes:
            raise TargetdError(-1, f"RTSLibError: Device /dev/{group}/{vol} is not there")
        if not initiator_wwn.startswith(("iqn.", "naa.", "eui.")):
            raise TargetdError(-1, f"RTSLibError: WWN not valid as: iqn, naa, eui: {initiator_wwn}")
        self.tpg_authentication = 0
        there = self.exports.get((initiator_wwn, int(lun)))
        if there not in (None, (group, vol)):
            raise TargetdError(-1, "RTSLibError: This MappedLUN already exists in configFS")
        self.exports[(initiator_wwn, int(lun))] = (group, vol)

    def export_destroy(self, pool: str, vol: str, initiator_wwn: str) -> None:
        self.check_pool(pool)
        group = pool.partition("/")[0]
        for key, what in list(self.exports.items()):
            if key[0] == initiator_wwn and what == (group, vol):
                del self.exports[key]
                if not any(initiator == initiator_wwn for initiator, _ in self.exports):
                    self.auth.pop(initiator_wwn, None)
                return
        raise TargetdError(-151, f"Volume '{vol}' not found in initiator exports")

    def initiator_set_auth(
        self,
        initiator_wwn: str,
        in_user: str | None,
        in_pass: str | None,
        out_user: str | None,
        out_pass: str | None,
    ) -> None:
        incoming = (in_user, in_pass) if in_user and in_pass else (None, None)
        outgoing = (out_user, out_pass) if out_user and out_pass else (None, None)
        self.auth[initiator_wwn] = (*incoming, *outgoing)

    METHODS = (
        "pool_list",
        "vol_list",
        "vol_create",
        "vol_destroy",
        "vol_resize",
        "export_list",
        "export_create",
        "export_destroy",
        "initiator_set_auth",
    )


Fault = Callable[[str, Callable[[], Any]], Any]
"""Given a method and what does it; what it raises or returns is answered."""


class Hang(Exception):
    """No answer, until the client goes."""


class HangUp(Exception):
    """The connection is closed without an answer."""


class TargetdServer:
    """Listens on loopback, from ``start`` to ``stop``."""

    def __init__(self, model: Model, *, certificate: Path | None = None) -> None:
        self.model = model
        self.calls: list[str] = []
        self.fault: Fault | None = None
        self.tarpit_s = 0.3
        """2 s in the real one."""
        self.refused = 0
        self.turned_away = 0
        self._lock = threading.Lock()
        self._tarpit: set[str] = set()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> TargetdServer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def passwords(self, volume: str) -> set[str]:
        """What the volume's initiators have to show."""
        model = self.model
        mine = {who for (who, _), (_, name) in model.exports.items() if name == volume}
        return {model.auth.get(who, ("", None))[1] or "" for who in mine}

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def fail_once(self, number: int, how: str) -> None:
        """Have the call of that number from now, 1 the first, fail.

        ``how``: ``before`` it is done, ``after`` it is done, or be ``lost``: done, never answered.
        """
        first = len(self.calls)

        def fault(_method: str, do: Callable[[], Any]) -> Any:
            if len(self.calls) - first != number:
                return do()
            if how == "before":
                raise TargetdError(-1, "RuntimeError: a fault of the test")
            with contextlib.suppress(TargetdError):
                do()
            raise HangUp if how == "after" else Hang

        self.fault = fault

    # -- one call

    def answer(self, body: bytes) -> bytes:
        """The bytes of the JSON answer; ``RawAnswer`` for those without HTTP around them."""
        number = 0
        try:
            try:
                message = json.loads(body)
            except ValueError:
                raise RawAnswer(_error(-32700, "parse error", 0)) from None
            if not isinstance(message, dict):
                raise TargetdError(-1, "jsonrpc error")
            good = message.get("jsonrpc") == "2.0" and "method" in message and "id" in message
            if not good:
                raise TargetdError(-32600, "not a valid jsonrpc-2.0 request")
            try:
                number = int(message["id"])
            except ValueError:
                raise TargetdError(-32600, "not a valid jsonrpc-2.0 request") from None
            except TypeError:
                raise TargetdError(-1, "jsonrpc error") from None
            result = self._call(message["method"], message.get("params"))
        except TargetdError as error:
            return _error(error.code, str(error), number)
        return json.dumps({"result": result, "id": number, "jsonrpc": "2.0"}).encode()

    def _call(self, method: str, params: Any) -> Any:
        if params and not isinstance(params, dict):
            raise TargetdError(-32602, "invalid method arguments(s)")

        def do() -> Any:
            if method not in Model.METHODS:
                raise TargetdError(-32601, f"method {method} not found")
            try:
                return getattr(self.model, method)(**(params or {}))
            except TypeError:
                raise TargetdError(-32602, "invalid method arguments(s)") from None

        with self._lock:
            self.calls.append(method)
            return self.fault(method, do) if self.fault is not None else do()

    def check_password(self, header: str | None, client: str) -> int:
        """The status for these credentials; 200 if they are good."""
        try:
            user, password = base64.b64decode((header or "").split()[1]).decode().split(":")
        except (ValueError, IndexError):
            return 400
        if client in self._tarpit:
            self.turned_away += 1
            return 503
        if (user, password) == (USER, PASSWORD):
            return 200
        self._tarpit.add(client)
        time.sleep(self.tarpit_s)
        self._tarpit.discard(client)
        self.refused += 1
        return 401


class RawAnswer(Exception):
    def __init__(self, content: bytes) -> None:
        self.content = content


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_args: object) -> None:
        """A client that has gone is nothing to tell."""


def _error(code: int, text: str, number: int) -> bytes:
    body = {"error": {"code": code, "message": text}, "id": number, "jsonrpc": "2.0"}
    return json.dumps(body).encode()


def _handler(server: TargetdServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0 is the default of the standard library, which targetd is built on too.

        def do_POST(self) -> None:
            status = server.check_password(self.headers["Authorization"], self.client_address[0])
            if status == 200 and self.path != "/targetrpc":
                status = 404
            if status != 200:
                self.send_error(status)
                return
            try:
                self._answer()
            except RawAnswer as raw:
                self.wfile.write(raw.content)
            except HangUp:
                return
            except Hang:
                # Until the client has gone: no clock of the test's is needed.
                with contextlib.suppress(OSError):
                    self.connection.recv(1)

        def _answer(self) -> None:
            length = self.headers["Content-Length"]
            if length is None:
                raise RawAnswer(_error(-1, "jsonrpc error", 0))
            if int(length) > MAX_BODY:
                self.send_error(413)
                return
            content = server.answer(self.rfile.read(int(length)))
            self.send_response(200)
            self.send_header("Content-type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_args: object) -> None:
            pass

    return Handler


def unused_port() -> int:
    """Nobody listens on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
