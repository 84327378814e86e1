"""``/healthz``, ``/readyz`` and the metrics over plain HTTP.

- ``/readyz`` follows the data path alone: an unready pod loses its Service endpoint, and with it
  every client that is reading and writing.
- ``/healthz`` fails only when a restart of the pod is what helps. Everything else that is wrong is
  told by ``/healthz?verbose``.
- An agent may add JSON documents of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, IPPROTO_IPV6, IPV6_V6ONLY, SO_REUSEADDR, SOL_SOCKET
from urllib.parse import urlsplit

from external_storage.logs import get_logger

log = get_logger(__name__)

Check = Callable[[], str | None]
"""None when all is well, else what is wrong."""

_Page = tuple[Callable[[], bytes], str]  # its content, and the type of that
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The checks behind the endpoints, by name."""

    alive: Mapping[str, Check]
    """A failure makes ``/healthz`` fail: the kubelet restarts the container."""
    ready: Mapping[str, Check]
    """A failure makes ``/readyz`` fail: the pod loses its endpoint."""
    notes: Mapping[str, Check]
    """Shown by ``?verbose`` only."""


class HealthServer:
    """Serves the endpoints from a thread of its own."""

    def __init__(
        self,
        address: tuple[str, int],
        health: Health,
        *,
        metrics: Callable[[], bytes],
        metrics_path: str = "/metrics",
        pages: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> None:
        """Binds at once: ``OSError`` if the address cannot be had. Port 0 takes a free one.

        ``pages``: JSON documents by path.
        """
        handler = _handler(health, {metrics_path: (metrics, _METRICS_TYPE)} | _json(pages or {}))
        self._server = _server(address, handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="health"
        )
        self._thread.daemon = True

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _server(address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    host, port = address
    if host:
        return _Server6(address, handler) if ":" in host else _Server((host, port), handler)
    try:
        return _Server6(("::", port), handler)
    except OSError:
        # A machine without IPv6; if the port itself is the trouble, this says so too.
        return _Server(("0.0.0.0", port), handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # Not HTTPServer's: that one asks the name server for our name and may wait 5 s for it.
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        if self.address_family == AF_INET6:
            # "::" takes IPv4 as well, whatever the machine's default is.
            self.socket.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a client of the HTTP endpoint went away", client=client_address)


class _Server6(_Server):
    address_family = AF_INET6


def _report(checks: Mapping[str, Check]) -> tuple[bool, list[str]]:
    lines, healthy = [], True
    for name, check in checks.items():
        trouble = _ask(check)
        healthy = healthy and trouble is None
        lines.append(f"[{'+' if trouble is None else '-'}] {name}: {trouble or 'ok'}")
    return healthy, lines


def _ask(check: Check) -> str | None:
    try:
        return check()
    except Exception as error:
        log.exception("a health check failed")
        return f"check failed: {error}"


def _json(pages: Mapping[str, Callable[[], bytes]]) -> dict[str, _Page]:
    return {path: (render, "application/json") for path, render in pages.items()}


def _handler(health: Health, pages: Mapping[str, _Page]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10.0

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            verbose = "verbose" in url.query
            if url.path in ("/healthz", "/livez"):
                self._checks(health.alive, {**health.ready, **health.notes}, verbose=verbose)
            elif url.path == "/readyz":
                self._checks(health.ready, {}, verbose=verbose)
            elif url.path in pages:
                self._page(url.path)
            else:
                self._answer(404, b"not found\n")

        def _page(self, path: str) -> None:
            render, kind = pages[path]
            try:
                body = render()
            except Exception:
                log.exception("a page cannot be made", path=path)
                self._answer(500, f"{path} cannot be read; see the log\n".encode())
                return
            self._answer(200, body, kind)

        def _checks(
            self, decisive: Mapping[str, Check], other: Mapping[str, Check], *, verbose: bool
        ) -> None:
            healthy, lines = _report(decisive)
            if verbose:
                lines += _report(other)[1]
            body = "\n".join(lines) if verbose or not healthy else "ok"
            self._answer(200 if healthy else 503, body.encode() + b"\n")

        def _answer(self, code: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds: not worth a line each."""

    return Handler
