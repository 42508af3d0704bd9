"""One HTTP/1.1 request and its answer, for whoever answers it.

Owns a body within its limit, and an answer as bytes: its head and what follows go out in one write, since a write is a
system call and costs more than anything else here. Refuses to read and to keep the connection (`http1.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Protocol

from gateway.errors import TooLarge

Headers = Sequence[tuple[bytes, bytes]]


def _status_line(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class Connection(Protocol):
    """What an exchange needs of the connection that it came on."""

    @property
    def keeps(self) -> bool:
        """Whether it stays open after an answer."""

    @property
    def drain(self) -> asyncio.Future[None] | None:
        """Until the client has taken what was written; None where it has."""

    def start(self, exchange: Exchange) -> None:
        """Its turn has come."""

    def more(self, exchange: Exchange) -> asyncio.Future[None]:
        """Read on. The future ends when something has come."""

    def write(self, data: bytes) -> None:
        """To the client."""

    def default_lines(self) -> bytes:
        """Header lines of every answer."""

    def answered(self, exchange: Exchange) -> None:
        """The answer has ended."""


class Exchange:
    """One request and its answer. Invariant: the answer begins at most once and ends at most once; the task that
    answers is cancelled by us at most once, only after its client has gone, never after the answer's end.

    `headers` have names in lower case; one that was sent several times is joined with commas, so that none of its
    values is lost. `gone`: the client has left. `begun`: the head of the answer was sent. `streaming`: more of it is to
    follow.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_parts",
        "_size",
        "_waiter",
        "begun",
        "continues",
        "ended",
        "gone",
        "headers",
        "keep",
        "method",
        "path",
        "query",
        "streaming",
        "task",
        "version",
        "whole",
    )

    def __init__(
        self, connection: Connection, method: str, path: str, query: bytes, version: str, headers: dict[str, str]
    ) -> None:
        self._connection = connection
        self.method = method
        self.path = path
        self.query = query
        self.version = version
        self.headers = headers
        self.keep = True  # the connection, after the answer
        self.whole = False  # the request has come to its end
        self.continues = headers.get("expect", "").lower() == "100-continue"
        self.gone = self.begun = self.streaming = self.ended = False
        self.task: asyncio.Task[None] | None = None
        self._chunked = False
        self._parts: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to answer it, in a task of its own."""
        self._connection.start(self)

    # The request.

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises `TooLarge` as soon as it is known, before the rest is read."""
        declared = self.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise TooLarge(f"the body is larger than the limit of {limit} bytes")
        while not self.whole and self._size <= limit:
            self._waiter = self._connection.more(self)
            await self._waiter
        if self._size > limit:
            raise TooLarge(f"the body is larger than the limit of {limit} bytes")
        parts = self._parts
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def came(self, data: bytes) -> int:
        """Some of the body. Returns how many bytes wait for somebody who reads them."""
        unread = self._waiter is None
        self._parts.append(data)
        self._size += len(data)
        self._tell()
        return self._size if unread else 0

    def came_whole(self) -> None:
        """The end of the request."""
        self.whole = True
        self._tell()

    def _tell(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # The answer.

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it. A request that has not come to its end yet is forgotten, and the connection closed after it."""
        head = self._head(status, headers)
        lines = b"" if status == 204 else b"content-length: %d\r\n" % len(body)
        self._connection.write(b"%b%b\r\n%b" % (head, lines, b"" if self.method == "HEAD" else body))
        self._end()

    def begin(self, status: int, headers: Headers, data: bytes) -> None:
        """The head, and the first of what `send` and `end` go on with."""
        head = self._head(status, headers)
        self.streaming = True
        self._chunked = self.version != "1.0"
        lines = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._connection.write(b"%b%b\r\n%b" % (head, lines, self._chunk(data)))

    def send(self, data: bytes) -> None:
        """More."""
        self._connection.write(self._chunk(data))

    def end(self, data: bytes) -> None:
        """The last."""
        self._connection.write(self._chunk(data) + (b"0\r\n\r\n" if self._chunked else b""))
        self._end()

    def _chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data and self._chunked else data

    @property
    def blocked(self) -> bool:
        """Whether the client is slower than we are: `drained` waits for it."""
        return self._connection.drain is not None

    async def drained(self) -> None:
        """Wait until the client has taken most of what was sent."""
        if self._connection.drain is not None:
            await self._connection.drain

    def _head(self, status: int, headers: Headers) -> bytes:
        assert not self.begun
        self.begun = True
        self.keep = self.keep and self.whole and self._connection.keeps
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers):
            raise ValueError("a header is no line")
        close = b"" if self.keep else b"connection: close\r\n"
        return b"%b%b%b%b" % (STATUS_LINES[status], self._connection.default_lines(), lines, close)

    def _end(self) -> None:
        self.streaming = False
        self.ended = True
        self._connection.answered(self)


Serve = Callable[[Exchange], Coroutine[None, None, None]]
