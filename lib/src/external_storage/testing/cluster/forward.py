"""Passes connections on: ``forward.py DESCRIPTOR ADDRESS PORT``; standard library only.

``DESCRIPTOR`` is a listening socket that was made in another network namespace, and so takes the
connections of that one; ``ADDRESS`` is reached in the namespace this process is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

_CHUNK = 64 * 1024


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the reader ends, then end the writer, so that the other way may go on."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def main(listener: socket.socket, address: str, port: int) -> None:
    """Never returns."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                there_reader, there_writer = await asyncio.open_connection(address, port)
            except OSError:
                return
            with contextlib.closing(there_writer):
                await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    server = await asyncio.start_server(serve, sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
