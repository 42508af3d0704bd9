"""HTTP byte for byte: a server that does on each connection what a test says and counts what it saw, and a transport
that remembers what was done to it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from gateway.exchange import Serve
from gateway.http1 import Http1, http1_for


def answer(body: bytes = b"{}", *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole answer with a Content-Length."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(body), lines, body)


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Transport(asyncio.Transport):
    """Without a socket: what is written is kept and counts as sent, but for `unsent` bytes. `writes` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.writes = 0
        self.unsent = 0
        self.closed = False
        self.reading = True

    def write(self, data: Any) -> None:
        self.written += data
        self.writes += 1

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


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


@dataclass
class Answer:
    """One answer of a server under test. `whole`: nothing of it is missing."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool


class Client:
    """One connection of the gateway's own HTTP server, on a transport without a socket."""

    def __init__(self, endpoints: Mapping[str, Serve], otherwise: Serve, like: Client | None = None) -> None:
        """`like`: a client of the same server."""
        self.state: ServerState = like.state if like else ServerState()
        self.transport = Transport()
        kind: type[Http1] = type(like.server) if like else http1_for(endpoints, otherwise)
        self.server: Http1 = kind(Config("unused:app"), self.state, {})
        self.server.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.server.data_received(data)

    def is_read(self) -> bool:
        return self.transport.reading

    def leave(self) -> None:
        self.transport.close()
        self.server.connection_lost(None)

    def answers(self) -> list[Answer]:
        """What has come so far."""
        found, rest = [], self.transport.written
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            status = int(first.split()[1])
            if "content-length" in headers:
                length = int(headers["content-length"])
                found.append(Answer(status, headers, rest[:length], len(rest) >= length))
                rest = rest[length:]
                continue
            body, whole = b"", False
            while headers.get("transfer-encoding") == "chunked" and rest and not whole:
                size, _, rest = rest.partition(b"\r\n")
                body += rest[: int(size, 16)]
                rest = rest[int(size, 16) + 2 :]
                whole = size == b"0"
            found.append(Answer(status, headers, body, whole))
        return found
