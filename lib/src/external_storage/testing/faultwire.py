"""The wire of ``FaultProxy``: TLS and HTTP/1.1 on both sides, one thread for each connection."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, cast

from external_storage.testing.faults import Answer, Cut, Fault, RuleBook
from external_storage.testing.requestlog import ProxiedRequest, RequestLog, parse_request

_POLL_S: Final = 0.05
_PIECE: Final = 64 * 1024
_RESET: Final = struct.pack("ii", 1, 0)
# What belongs to one connection and not to the message; the body is framed anew on each.
_HOP_BY_HOP: Final = frozenset(
    {"connection", "content-length", "expect", "keep-alive", "transfer-encoding", "upgrade"}
)
_NO_CERTIFICATE: Final = b""
_CHUNKED: Final = ("Transfer-Encoding", "chunked")


class Watch:
    """One running watch; what the server has sent and the client has not got is in ``pieces``."""

    def __init__(self, resource: str) -> None:
        self.resource: Final = resource
        self.pieces: Final[queue.SimpleQueue[bytes | None]] = queue.SimpleQueue()
        self.ended: Final = threading.Event()
        self.held = 0
        self.broken = False
        self.reset = False
        self._cut = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_cut(self) -> bool:
        return self._cut.is_set()

    def cut(self, *, reset: bool) -> None:
        """End it, whatever is still to be delivered."""
        self.reset = reset
        self._cut.set()
        self.pieces.put(None)

    def pump(self, response: HTTPResponse) -> None:
        """Take what the server sends, as soon as it comes, until it ends."""
        try:
            while piece := response.read1(_PIECE):
                self._count(piece, 1)
                self.pieces.put(piece)
        except (OSError, HTTPException, ValueError, AttributeError):
            # The last two are http.client's for a response that is closed while it is read.
            self.broken = True
        self.pieces.put(None)

    def delivered(self, piece: bytes) -> None:
        self._count(piece, -1)

    def _count(self, piece: bytes, sign: int) -> None:
        with self._lock:
            self.held += sign * piece.count(b"\n")


@dataclass(slots=True)
class Switchboard:
    """What the connections of one proxy share; it outlives its listener."""

    server: tuple[str, int]
    rules: RuleBook = field(default_factory=RuleBook)
    log: RequestLog = field(default_factory=RequestLog)
    identities: dict[bytes, ssl.SSLContext] = field(default_factory=dict)
    """How to speak to the server for a client of this certificate (DER; empty: of none)."""
    defects: list[BaseException] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _lags: dict[str, threading.Event] = field(default_factory=dict)
    _watches: set[Watch] = field(default_factory=set)

    def lag(self, resource: str, until: threading.Event) -> None:
        with self._lock:
            self._lags[resource] = until

    def lags(self, resource: str) -> bool:
        with self._lock:
            gate = self._lags.get(resource)
        return gate is not None and not gate.is_set()

    def watches(self, resource: str | None = None) -> list[Watch]:
        with self._lock:
            return [watch for watch in self._watches if resource in (None, watch.resource)]

    @contextlib.contextmanager
    def running(self, watch: Watch) -> Iterator[None]:
        with self._lock:
            self._watches.add(watch)
        try:
            yield
        finally:
            with self._lock:
                self._watches.discard(watch)
            watch.ended.set()


class Gateway(ThreadingHTTPServer):
    """The listener and its connections, from ``open`` to ``close``."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, port: int, tls: ssl.SSLContext, board: Switchboard) -> None:
        self.tls: Final = tls
        self.board: Final = board
        self.closing: Final = threading.Event()
        self._sockets_lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Connection)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_POLL_S,), name="faultproxy-accept"
        )

    def open(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Refuse connections and end those there are; returns when every thread has ended."""
        self.closing.set()
        self.shutdown()
        self._thread.join()
        with self._sockets_lock:
            for sock in self._sockets:
                _shut(sock)
        self.server_close()

    @contextlib.contextmanager
    def tracked(self, sock: socket.socket) -> Iterator[None]:
        """``close`` ends what is done with ``sock`` inside; raises ``Cut`` if it already has."""
        with self._sockets_lock:
            if self.closing.is_set():
                raise Cut
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._sockets_lock:
                self._sockets.discard(sock)

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (OSError, Cut)):
            self.board.defects.append(error)


def _shut(sock: socket.socket) -> None:
    """Wake whoever reads ``sock``; past TLS, whose state is not ours to touch from here."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class _Upstream:
    """The connection to the API server that belongs to one connection of a client."""

    def __init__(self, gateway: Gateway, context: ssl.SSLContext) -> None:
        self._gateway = gateway
        self._context = context
        self._http: HTTPSConnection | None = None
        self._sock: socket.socket | None = None
        self._tracked = contextlib.ExitStack()

    def send(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> HTTPResponse:
        """Send a request; the answer, its body not yet read. Raises ``OSError`` and its like."""
        if self._sock is not None and _readable(self._sock):
            # Closed by the server while it was idle. What fails later may have been carried out.
            self.close()
        http = self._http or self._connect()
        http.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            http.putheader(name, value)
        if body or method in ("POST", "PUT", "PATCH"):
            http.putheader("Content-Length", str(len(body)))
        http.endheaders(body)
        return http.getresponse()

    def _connect(self) -> HTTPSConnection:
        host, port = self._gateway.board.server
        self._http = HTTPSConnection(host, port, context=self._context)
        self._http.connect()
        self._sock = cast(socket.socket, self._http.sock)
        self._tracked.enter_context(self._gateway.tracked(self._sock))
        return self._http

    def wake(self) -> None:
        """End a read that is going on in another thread."""
        if self._sock is not None:
            _shut(self._sock)

    def close(self) -> None:
        self._tracked.close()
        if self._http is not None:
            self._http.close()
        self._http = self._sock = None


class _Connection(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    # Else a Nagle delay of 40 ms between the head and the body of an answer.
    disable_nagle_algorithm = True
    server: Gateway

    def handle(self) -> None:
        """Serve it to its end, which also closes the socket: socketserver knows only the one
        below the TLS."""
        gateway = self.server
        upstream: _Upstream | None = None
        try:
            with gateway.tracked(self.connection):
                self.connection.do_handshake()
                upstream = _Upstream(gateway, self._identity())
                self._upstream = upstream
                super().handle()
        finally:
            if upstream is not None:
                upstream.close()

    def setup(self) -> None:
        self.request = self.server.tls.wrap_socket(
            self.request, server_side=True, do_handshake_on_connect=False
        )
        super().setup()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is ``FaultProxy.requests``."""

    def _identity(self) -> ssl.SSLContext:
        certificate = self.connection.getpeercert(binary_form=True) or _NO_CERTIFICATE
        try:
            return self.server.board.identities[certificate]
        except KeyError:
            raise ValueError(
                "a client's certificate is not known: use FaultProxy.kubeconfig(for_=...)"
            ) from None

    def _serve(self) -> None:
        board = self.server.board
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = parse_request(
            self.command, self.path, user_agent=self.headers.get("User-Agent", "")
        )
        fault = board.rules.take(request)
        request.fault = fault.label
        board.log.begin(request)
        try:
            self._exchange(request, fault, body)
        except (Cut, OSError, HTTPException):
            # Told to, or the server or the client is gone: nothing that could be answered.
            self.close_connection = True
        finally:
            board.log.note(request, done=True)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - looked for by name

    def _exchange(self, request: ProxiedRequest, fault: Fault, body: bytes) -> None:
        closing, log = self.server.closing, self.server.board.log
        early = fault.before(request, closing)
        if early is not None:
            self._answer(request, early)
            return
        headers = [(k, v) for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP]
        response = self._upstream.send(self.command, self.path, headers, body)
        log.note(request, server_status=response.status)
        kept = tuple((k, v) for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP)
        if request.verb != "watch" or response.status != 200:
            whole = Answer(status=response.status, headers=kept, body=response.read())
            if response.will_close:
                self._upstream.close()
            self._answer(request, fault.after(whole, closing))
            return
        try:
            head = Answer(status=response.status, headers=kept)
            chosen = fault.after(head, closing)
            if chosen is head:
                self._stream(request, head, response)
            elif chosen.cut_at is not None:
                # Half of an answer without end: its head.
                self._head(head, _CHUNKED)
                log.note(request, status=head.status)
                raise Cut
            else:
                self._answer(request, chosen)
        finally:
            response.close()
            self._upstream.close()

    def _answer(self, request: ProxiedRequest, answer: Answer) -> None:
        # Before the client has it: a test that has got an answer finds it in the log.
        self.server.board.log.note(request, status=answer.status, done=True)
        self._head(answer, ("Content-Length", str(len(answer.body))))
        self.wfile.write(answer.body[: answer.cut_at])
        if answer.cut_at is not None:
            raise Cut

    def _head(self, answer: Answer, framing: tuple[str, str]) -> None:
        self.send_response_only(answer.status)
        for name, value in (*answer.headers, framing):
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, request: ProxiedRequest, head: Answer, response: HTTPResponse) -> None:
        """Pass a watch on, piece by piece; its connection is not used again."""
        self.close_connection = True
        watch = Watch(request.resource)
        pump = threading.Thread(target=watch.pump, args=(response,), name="faultproxy-watch")
        with self.server.board.running(watch):
            self._head(head, _CHUNKED)
            self.server.board.log.note(request, status=head.status)
            pump.start()
            try:
                self._deliver(watch)
            finally:
                self._upstream.wake()
                pump.join()
            if watch.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            elif watch.is_cut or not watch.broken:
                self.wfile.write(b"0\r\n\r\n")

    def _deliver(self, watch: Watch) -> None:
        """Until the server ends it, it is cut, or the client is gone (``Cut``)."""
        while not watch.is_cut:
            try:
                piece = watch.pieces.get(timeout=_POLL_S)
            except queue.Empty:
                self._check_client()
                continue
            while self.server.board.lags(watch.resource) and not watch.is_cut:
                self.server.closing.wait(_POLL_S)
                self._check_client()
            if piece is None or watch.is_cut:
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            watch.delivered(piece)

    def _check_client(self) -> None:
        # A client has nothing to say during a watch: it is readable when it has hung up.
        if self.server.closing.is_set() or _readable(self.connection):
            raise Cut
