"""A proxy between a client under test and a real API server, which makes what networks and busy
servers do happen when a test wants it.

    with FaultProxy(control_plane) as proxy:
        client = Client(auth.load(kubeconfig=str(proxy.kubeconfig())))
        proxy.on("create", "persistentvolumes", times=1).fail_after(500)

Every answer which is not a fault is the real server's. Test equipment: simple, not fast.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import yaml

from external_storage.testing.certificates import CertificateAuthority
from external_storage.testing.controlplane import ControlPlane
from external_storage.testing.faults import GoneWatch, Rule, Selection
from external_storage.testing.faultwire import Gateway, Switchboard
from external_storage.testing.processes import free_port
from external_storage.testing.requestlog import ProxiedRequest

__all__ = ["FaultProxy"]

_LIMIT_S: Final = 60.0
_SERVER_NAMES: Final = ("127.0.0.1", "localhost", "10.0.2.2")
_PORT_TRIES: Final = 5


class FaultProxy:
    """One proxy, from ``start`` to ``stop``; use it as a context manager, from any threads.

    Faults are rules. ``on`` chooses requests, a method of what it returns says what happens to
    them; a rule removes itself when it is used up. One fault a request: the oldest rule's.
    """

    def __init__(self, plane: ControlPlane) -> None:
        """``plane`` runs, and outlives the proxy. Starts nothing."""
        self._plane = plane
        self._board = Switchboard(("127.0.0.1", plane.port))
        self._authority = CertificateAuthority()
        self._directory: Path | None = None
        self._tls: ssl.SSLContext | None = None
        self._gateway: Gateway | None = None
        self._port = 0
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if error is None and self._board.defects:
            raise self._board.defects[0]

    # -- life

    def start(self) -> None:
        """Listen on a port of 127.0.0.1."""
        # In the plane's directory: it goes with it, even when this process is killed.
        self._directory = Path(tempfile.mkdtemp(prefix="faultproxy-", dir=self._plane.directory))
        pair = self._authority.issue_server(_SERVER_NAMES)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(self._write("server.pem", pair.certificate + pair.key))
        # So that a client which has a certificate shows it: it decides under which we pass it on.
        self._tls.verify_mode = ssl.CERT_OPTIONAL
        self._tls.load_verify_locations(cafile=str(self._plane.ca_file))
        self._board.identities[b""] = self._upstream_context()
        for attempt in range(1, _PORT_TRIES + 1):
            self._port = free_port()
            try:
                self.up()
                return
            except OSError:
                if attempt == _PORT_TRIES:
                    raise

    def stop(self) -> None:
        """End all connections and threads; nothing when it does not run."""
        self.down()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def down(self) -> None:
        """End all connections and refuse new ones."""
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None

    def up(self) -> None:
        """Accept connections again, on the same port; ``OSError`` if another has taken it."""
        if self._tls is None:
            raise RuntimeError("the proxy has not been started")
        if self._gateway is None:
            self._gateway = Gateway(self._port, self._tls, self._board)
            self._gateway.open()

    # -- clients

    @property
    def url(self) -> str:
        """The address to give to clients, ``https://127.0.0.1:<port>``."""
        return f"https://127.0.0.1:{self._port}"

    def kubeconfig(self, *, for_: Path | None = None) -> Path:
        """A kubeconfig like ``for_`` (default: the plane's admin's) that leads through the proxy.

        The server sees the same user: tokens are passed on; the key of a client certificate is
        known to the proxy from here, which uses it for whoever shows that certificate. The file is
        gone after ``stop``.
        """
        path = for_ or self._plane.kubeconfig
        config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        ca = base64.b64encode(self._authority.certificate).decode()
        for entry in config["clusters"]:
            entry["cluster"] = {"server": self.url, "certificate-authority-data": ca}
        for entry in config["users"]:
            self._learn(entry.get("user") or {}, path.parent)
        name = f"{next(self._numbers)}-{path.name}"
        return self._write(name, json.dumps(config, indent=2).encode())

    def _learn(self, user: dict[str, Any], directory: Path) -> None:
        certificate = _material(user, "client-certificate", directory)
        key = _material(user, "client-key", directory)
        if certificate and key:
            context = self._upstream_context()
            context.load_cert_chain(self._write("identity.pem", certificate + b"\n" + key))
            der = ssl.PEM_cert_to_DER_cert(certificate.decode())
            self._board.identities[der] = context

    def _upstream_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._plane.ca_file))

    def _write(self, name: str, content: bytes) -> Path:
        if self._directory is None:
            raise RuntimeError("the proxy is not running")
        path = self._directory / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        return path

    # -- faults

    def on(
        self,
        verb: str | None = None,
        resource: str | None = None,
        *,
        namespace: str | None = None,
        name: str | None = None,
        times: int | None = 1,
        after: int = 0,
        every: int = 1,
    ) -> Selection:
        """Requests to do something to; None fits all.

        Args:
            verb: get, list, watch, create, update, patch, delete or deletecollection.
            resource: plural, with the subresource: ``persistentvolumes/status``.
            times: so many requests, then the rule is gone; None: until ``clear``.
            after: let so many pass before the first.
            every: 2: the second, the fourth and so on.
        """
        return Selection(
            add=self._board.rules.add,
            verb=verb,
            resource=resource,
            namespace=namespace,
            name=name,
            times=times,
            after=after,
            every=every,
        )

    def kill_after(
        self,
        n: int,
        target: int | Callable[[], object],
        *,
        when: Literal["before", "after"] = "after",
    ) -> Rule:
        """SIGKILL to the pid ``target`` (or a call of it) at the ``n``-th request from now on, of
        any kind: before the server is asked, or once it has answered; the answer is not passed on.
        """
        return self.on(after=n - 1).kill(target, when=when)

    def gone_on_watch(
        self,
        resource: str | None = None,
        *,
        every: int = 2,
        times: int | None = None,
        as_status: bool = False,
    ) -> Rule:
        """410 for every second watch: as an ERROR event, or as the status of the answer."""
        return self.on("watch", resource, every=every, times=times).apply(GoneWatch(as_status))

    def lag(self, resource: str, until: threading.Event) -> None:
        """Hold back what watches of ``resource`` bring, those running and those to come, until the
        event is set; then it is delivered in order."""
        self._board.lag(resource, until)

    def held(self, resource: str | None = None) -> int:
        """Watch events that the server has sent and a client has not been given."""
        return sum(watch.held for watch in self._board.watches(resource))

    def cut_watches(self, resource: str | None = None, *, reset: bool = False) -> int:
        """End the running watches, in good order or by a reset; how many they were.

        Returns when the clients have been told. What was held back is lost with them.
        """
        watches = self._board.watches(resource)
        for watch in watches:
            watch.cut(reset=reset)
        for watch in watches:
            if not watch.ended.wait(_LIMIT_S):
                raise TimeoutError(f"a watch of {watch.resource} does not end")
        return len(watches)

    def watching(self, resource: str | None = None) -> int:
        """How many watches run at this moment."""
        return len(self._board.watches(resource))

    def rules(self) -> list[Rule]:
        """The rules in force; a rule that is used up is none of them."""
        return self._board.rules.all()

    def clear(self) -> None:
        """Remove all rules; what is held already stays held."""
        self._board.rules.clear()

    # -- the log

    @property
    def requests(self) -> list[ProxiedRequest]:
        """Every request so far, in the order of arrival; a copy."""
        return self._board.log.snapshot()

    def wait_for(
        self,
        predicate: Callable[[ProxiedRequest], bool],
        count: int = 1,
        *,
        limit_s: float = _LIMIT_S,
    ) -> list[ProxiedRequest]:
        """Wait until ``count`` requests so far satisfy ``predicate``; all that do.

        Raises ``TimeoutError`` with the end of the log after ``limit_s`` seconds.
        """
        return self._board.log.wait_for(predicate, count=count, limit_s=limit_s)


def _material(user: Mapping[str, Any], key: str, directory: Path) -> bytes:
    """A certificate or key of a kubeconfig's user, which may be inside the file or beside it."""
    if inline := user.get(f"{key}-data"):
        return base64.b64decode(inline)
    return (directory / user[key]).read_bytes() if user.get(key) else b""
