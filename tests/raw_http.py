"""A server that does on each connection what a test says, byte for byte, and counts what it saw."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path


def answer(body: bytes = b"{}", *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole answer with a Content-Length."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(body), lines, body)


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Peer:
    """One connection as the server sees it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: Seen

    async def head(self) -> bytes:
        """A request's head; empty where the client has gone."""
        try:
            return await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            self.seen.gone += 1
            self.seen.left.set()
            return b""

    async def request(self) -> bytes:
        """A whole request; empty where the client has gone."""
        head = await self.head()
        if not head:
            return b""
        length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
        body = await self.reader.readexactly(int(length))
        self.seen.requests.append(head + body)
        self.seen.asked.set()
        return head + body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """End it with a RST."""
        self.writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
        self.writer.transport.abort()


@dataclass
class Seen:
    """`gone` counts clients that closed while a request was awaited; `asked` and `left` are set by the first."""

    url: str = ""
    connections: int = 0
    gone: int = 0
    requests: list[bytes] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)


Script = Callable[[Peer], Awaitable[None]]


def always(data: bytes, *, close: bool = False) -> Script:
    """Answers each request with the same bytes."""

    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.send(data)
            if close:
                break

    return script


@asynccontextmanager
async def serving(script: Script, *, uds: Path | None = None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Seen]:
    """A server on a free port of 127.0.0.1, or on a Unix socket. Each connection is closed when the script has
    ended."""
    seen = Seen()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        seen.connections += 1
        try:
            await script(Peer(reader, writer, seen))
        except (ConnectionError, asyncio.IncompleteReadError):
            seen.gone += 1
            seen.left.set()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            writer.close()
            tasks.discard(task)

    if uds is not None:
        server = await asyncio.start_unix_server(connected, uds)
    else:
        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, backlog=200)
        seen.url = f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield seen
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
