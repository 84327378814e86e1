"""HTTP over libcurl: the one file that another transport would replace."""

from __future__ import annotations

import io
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pycurl

from external_storage.kube.auth import ClientConfig
from external_storage.kube.errors import Unauthorized, Unavailable, from_response
from external_storage.kube.request import Request

_CONNECT_TIMEOUT_MS = 10_000
_KEEPALIVE_IDLE_S = 30
_KEEPALIVE_INTERVAL_S = 10


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    code: int
    body: bytes
    retry_after_s: float | None


class Transport:
    """Curl handles, each with its own kept-alive connection, lent to one thread at a time.

    A pool and not one handle per thread: threads come and go, and ``close()`` must find them all.
    """

    def __init__(self, config: ClientConfig, *, user_agent: str) -> None:
        self._config = config
        self._user_agent = user_agent
        self._idle: deque[pycurl.Curl] = deque()
        self._closed = False

    def close(self) -> None:
        """Close idle connections; those in use are closed when their request ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def perform(self, request: Request) -> Response:
        """Send ``request``, read the whole answer. Raises ``Unavailable`` when there is none."""
        curl = self._borrow()
        buffer = io.BytesIO()
        try:
            self._prepare(curl, request)
            curl.setopt(pycurl.WRITEDATA, buffer)
            curl.perform()
            retry_after = curl.getinfo(pycurl.RETRY_AFTER)
            code = curl.getinfo(pycurl.RESPONSE_CODE)
        except pycurl.error as error:
            # The connection is in an unknown state: a fresh handle is safer than a clever one.
            curl.close()
            raise Unavailable(_explain(error, self._config.server)) from error
        except BaseException:
            curl.close()
            raise
        self._give_back(curl)
        return Response(code, buffer.getvalue(), float(retry_after) if retry_after else None)

    def stream(self, request: Request, on_status: Callable[[str], None]) -> Stream:
        """An answer without end, read line by line on a connection of its own."""
        curl = self._new_handle()
        return Stream(curl, lambda: self._prepare(curl, request), self._config, on_status)

    def _borrow(self) -> pycurl.Curl:
        try:
            return self._idle.pop()
        except IndexError:
            return self._new_handle()

    def _give_back(self, curl: pycurl.Curl) -> None:
        if self._closed:
            curl.close()
        else:
            self._idle.append(curl)

    def _new_handle(self) -> pycurl.Curl:
        config = self._config
        curl = pycurl.Curl()
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.USERAGENT, self._user_agent)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTPS | pycurl.PROTO_HTTP)
        # HTTP/2 brought nothing in any client we measured, and one connection would be shared.
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, _CONNECT_TIMEOUT_MS)
        curl.setopt(pycurl.TCP_KEEPALIVE, 1)
        curl.setopt(pycurl.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        curl.setopt(pycurl.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        curl.setopt(pycurl.SSLVERSION, pycurl.SSLVERSION_TLSv1_2)
        if config.ca_file is not None:
            curl.setopt(pycurl.CAINFO, str(config.ca_file))
        if not config.verify:
            curl.setopt(pycurl.SSL_VERIFYPEER, 0)
            curl.setopt(pycurl.SSL_VERIFYHOST, 0)
        if config.cert_file is not None and config.key_file is not None:
            curl.setopt(pycurl.SSLCERT, str(config.cert_file))
            curl.setopt(pycurl.SSLKEY, str(config.key_file))
        # An empty string keeps curl from reading proxy variables that are not meant for us.
        curl.setopt(pycurl.PROXY, config.proxy or "")
        return curl

    def _prepare(self, curl: pycurl.Curl, request: Request) -> None:
        headers = ["Accept: application/json", "Expect:"]
        token = self._config.tokens.token()
        if token:
            headers.append(f"Authorization: Bearer {token}")
        if request.body is None:
            curl.setopt(pycurl.HTTPGET, 1)
        else:
            headers.append(f"Content-Type: {request.content_type}")
            curl.setopt(pycurl.POSTFIELDS, request.body)
        curl.setopt(pycurl.CUSTOMREQUEST, request.method)
        curl.setopt(pycurl.URL, self._config.server + request.target)
        curl.setopt(pycurl.HTTPHEADER, headers)
        curl.setopt(pycurl.TIMEOUT_MS, int(request.timeout_s * 1000))
        # None, not "": an empty string would ask for every encoding that curl knows.
        if request.compressed:
            curl.setopt(pycurl.ACCEPT_ENCODING, "gzip")
        else:
            curl.unsetopt(pycurl.ACCEPT_ENCODING)


class Stream:
    """A watch in progress: ``run`` blocks in one thread, ``close`` ends it from another at once."""

    def __init__(
        self,
        curl: pycurl.Curl,
        prepare: Callable[[], None],
        config: ClientConfig,
        on_status: Callable[[str], None],
    ) -> None:
        self._curl = curl
        self._prepare = prepare
        self._config = config
        self._on_status = on_status
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._closed = False
        self._partial = bytearray()
        self._on_line: Callable[[bytes], None] = lambda _line: None
        self._failure: BaseException | None = None
        self._code = 0

    def run(self, on_line: Callable[[bytes], None]) -> None:
        """Call ``on_line`` with each line until the server or ``close()`` ends the stream.

        Raises:
            StatusError: the server refused the stream.
            Unavailable: the connection failed or was cut.
            Exception: whatever ``on_line`` raised.
        """
        self._on_line = on_line
        try:
            self._perform()
        finally:
            self._curl.close()
            with self._lock:
                self._closed = True
                for sock in self._sockets:
                    sock.close()
                self._sockets.clear()

    def close(self) -> None:
        """End the stream now; ``run`` returns without an error. Safe from any thread, any time."""
        with self._lock:
            self._closed = True
            for sock in self._sockets:
                # curl reads from a duplicate of it: a shutdown wakes curl, a close would not.
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def _perform(self) -> None:
        curl = self._curl
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        curl.setopt(pycurl.HEADERFUNCTION, self._header)
        curl.setopt(pycurl.WRITEFUNCTION, self._write)
        curl.setopt(pycurl.NOPROGRESS, 0)
        curl.setopt(pycurl.XFERINFOFUNCTION, self._progress)
        try:
            self._prepare()
            curl.perform()
        except pycurl.error as error:
            if self._failure is not None:
                raise self._failure from None
            if self._closed:
                return
            if not self._code:
                self._on_status("error")
            raise Unavailable(_explain(error, self._config.server)) from error
        if self._code >= 300:
            refusal = from_response(self._code, bytes(self._partial))
            if isinstance(refusal, Unauthorized):
                self._config.tokens.refresh()
            raise refusal

    def _open_socket(
        self, purpose: int, address: tuple[int, int, int, object]
    ) -> socket.socket | int:
        family, kind, protocol, _ = address
        with self._lock:
            if self._closed:
                return pycurl.SOCKET_BAD
            sock = socket.socket(family, kind, protocol)
            self._sockets.append(sock)
            return sock

    def _progress(self, *_totals: float) -> int:
        # Called at least once a second: also ends a stream that is still resolving a name.
        return 1 if self._closed else 0

    def _header(self, line: bytes) -> None:
        # A status line comes first, and again after an answer of 1xx or of a proxy.
        if line.startswith(b"HTTP/"):
            self._code = int(line.split()[1])
            self._on_status(str(self._code))

    def _write(self, chunk: bytes) -> int | None:
        if self._code >= 300:
            self._partial += chunk
            return None
        try:
            self._split(chunk)
        except BaseException as error:
            self._failure = error
            return 0
        return None

    def _split(self, chunk: bytes) -> None:
        lines = chunk.split(b"\n")
        if len(lines) == 1:
            self._partial += chunk
            return
        if self._partial:
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
        self._partial += lines.pop()
        for line in lines:
            if line and not self._closed:
                self._on_line(line)


def _explain(error: pycurl.error, server: str) -> str:
    detail = (
        error.args[1] if len(error.args) > 1 and error.args[1] else f"curl error {error.args[0]}"
    )
    return f"{server}: {detail}"
