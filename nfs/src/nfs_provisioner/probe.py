"""Whether an NFS server really answers.

A connection alone says nothing: the kernel takes it on behalf of a server that hangs. So the server
is asked to do nothing (the NULL procedure of NFSv4, RFC 7530) and has to say that it did.
"""

from __future__ import annotations

import os
import socket
import struct

_PROGRAM, _VERSION, _NULL = 100003, 4, 0
_CALL, _REPLY, _RPC_VERSION = 0, 1, 2
_LAST_FRAGMENT = 0x80000000
_ACCEPTED_SUCCESS = (0, 0, 0, 0)
"""reply_stat, the verifier's flavor and length, accept_stat."""


def null_call(address: tuple[str, int], *, timeout_s: float) -> None:
    """Ask once; ``OSError`` says what kept the answer from coming."""
    (xid,) = struct.unpack(">I", os.urandom(4))
    call = struct.pack(">10I", xid, _CALL, _RPC_VERSION, _PROGRAM, _VERSION, _NULL, 0, 0, 0, 0)
    with socket.create_connection(address, timeout=timeout_s) as connection:
        connection.sendall(struct.pack(">I", _LAST_FRAGMENT | len(call)) + call)
        reply = _receive(connection, 4 + 6 * 4)
    answered, kind, *rest = struct.unpack(">6I", reply[4:])
    if (answered, kind) != (xid, _REPLY) or tuple(rest) != _ACCEPTED_SUCCESS:
        raise ConnectionError("the answer is not that of an NFSv4 server")


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("closed without an answer")
        data += more
    return data
