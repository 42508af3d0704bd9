"""One HTTP/1.1 connection of the relay as an `asyncio.Protocol`: a request out, an answer in, and again.

Owns parsing, back-pressure, the clock of a silent server, and when a connection may be used once more. Refuses
pipelining, upgrades, and to use a connection again on which anything unexpected has happened.

When a request may be sent a second time. A connection that the server closes while it is idle may be closed just as a
request is on its way. That the server has closed it without a byte of an answer proves nothing, it may have died of the
request; that its kernel has acknowledged none of the request when its FIN comes does: what arrives after that is
discarded. Where the operating system tells us so (Linux, TCP), the failure is `NeverRead`, everywhere else
`ConnectionLost`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from math import inf
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from gateway.backends import upstream as say
from gateway.errors import ConnectFailed, ConnectionLost, Retryable, UpstreamFailed, UpstreamTimeout

MOST_HEAD_BYTES = 64 * 1024  # of a head, a trailer or a chunk's extensions, and one read of the socket
MOST_BUFFERED_BYTES = 256 * 1024  # of a body that nobody has taken yet; then reading stops
IDLE_SECONDS = 4.0  # an idle connection is kept; less than the 5 of servers that do not say it (uvicorn, llama.cpp)
_COPY_BELOW = 16 * 1024  # head and body are sent as one piece

_TCP_INFO = getattr(socket, "TCP_INFO", None)  # Linux
_ACKNOWLEDGED = struct.Struct("=120xQ")  # tcpi_bytes_acked in struct tcp_info (linux/tcp.h, since Linux 4.1)


class NeverRead(ConnectFailed):
    """The server had closed the connection before the request reached it: it can be sent again."""


class Owner(Protocol):
    """Whoever keeps connections, and is told what becomes of them."""

    def opened(self, connection: Http1Connection) -> None: ...

    def freed(self, connection: Http1Connection) -> None:
        """It can take another request."""

    def gone(self, connection: Http1Connection) -> None:
        """It cannot be used any more, though it may not be closed yet. May be told several times."""

    def lost(self, connection: Http1Connection) -> None:
        """It is closed."""


class Http1Response:
    """Implements `Response`. Invariant: after `whole` or a failure nothing is added, and the connection is not its own
    any more.

    What the connection has parsed is put here; what the relay has not taken yet waits here.
    """

    __slots__ = ("_connection", "_failure", "_paused", "_waiter", "headers", "parts", "size", "status", "whole")

    def __init__(self, connection: Http1Connection) -> None:
        self._connection = connection
        self._failure: tuple[type[Retryable], str] | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self.headers: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []
        self.size = 0  # bytes that came since the relay took any, framing included
        self.status = 0  # until the head is whole
        self.whole = False

    @property
    def at_end(self) -> bool:
        return self.whole and not self.parts

    def header(self, name: str) -> str | None:
        value = self.headers.get(name.encode("latin-1"))
        return None if value is None else value.decode("latin-1")

    async def head(self) -> None:
        """Wait until the status and the headers are known. Raises a `Retryable`."""
        while not self.status:
            await self._news()

    async def read(self) -> bytes:
        if self.whole:
            return self._taken()
        return await say.whole(self)

    async def some(self) -> bytes:
        while not self.parts:
            if self.whole:
                return b""
            await self._news()
        return self._taken()

    def close(self) -> None:
        if not self.whole and self._failure is None:
            self._connection.give_up(UpstreamFailed, say.BROKE_OFF)
        self.parts.clear()

    def _taken(self) -> bytes:
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self.size = 0
        if self._paused:
            self._paused = False
            if not self.whole and self._failure is None:
                self._connection.resume()
        return data

    async def _news(self) -> None:
        """Wait until something has changed. Raises the failure where there is one."""
        if self._failure is None:
            waiter = self._waiter = self._connection.loop.create_future()
            try:
                await waiter
            except asyncio.CancelledError:
                self.close()
                raise
        if self._failure is not None and not self.parts:
            kind, message = self._failure
            raise kind(message)

    # What the connection tells.

    def pause(self) -> None:
        """Reading stops until what has come is taken."""
        self._paused = True

    def tell(self) -> None:
        """Wake whoever waits."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, kind: type[Retryable], message: str) -> None:
        """Nothing more will come."""
        self._failure = kind, message
        self.tell()


class Http1Connection(asyncio.Protocol):
    """Invariant: `_response` is set from the moment a request is written until its answer is whole or has failed; one
    timer at most exists, whatever happens, and is never later than the moment it is for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket | None, owner: Owner) -> None:
        """`sock`: of a TCP connection."""
        self.loop = loop
        self._sock = sock
        self._owner = owner
        self._parser = HttpResponseParser(self)
        self._response: Http1Response | None = None
        self._fresh = True  # no request was written yet
        self._begun = False  # a byte of the answer has come
        self._interim = False  # a 1xx head is being parsed
        self._ended = False  # the answer's last byte was parsed
        self._keep = False  # and the server lets the connection live on
        self._wrong: str | None = None  # why the answer is not taken
        self._dry = 0  # bytes that came since the last that meant progress
        self._progress = False
        self._silence: float | None = None
        self._heard = 0.0
        self._acknowledged = 0  # bytes that the server's kernel had of us when the request was written, if known
        self._never_read = False
        self._paused = False
        self._idle_until = inf
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = inf

    @property
    def usable(self) -> bool:
        """Whether a request can be written now. Where its idle time is over, the server may be closing it just now."""
        return not self._transport.is_closing() and self.loop.time() < self._idle_until

    async def exchange(self, head: bytes, body: bytes, silence: float | None) -> Http1Response:
        """Send a request, wait for the head of its answer. Raises a `Retryable`; `NeverRead` where the connection was
        used before and the request can be sent again."""
        response = self._response = Http1Response(self)
        self._begun = self._ended = self._never_read = False
        if self._fresh:
            self._fresh = False
        else:
            self._acknowledged = acknowledged(self._sock)
        self._silence = silence
        if silence is not None:
            self._heard = self.loop.time()
            self._ring_at(self._heard + silence)
        if len(body) < _COPY_BELOW:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        await response.head()
        return response

    def give_up(self, kind: type[Retryable], message: str) -> None:
        """The answer fails and the connection is closed at once."""
        response, self._response = self._response, None
        self._owner.gone(self)
        self._transport.abort()
        if response is not None:
            response.fail(kind, message)

    def resume(self) -> None:
        """Read on: what had come was taken."""
        self._paused = False
        self._heard = self.loop.time()
        self._transport.resume_reading()

    def close(self) -> None:
        """Close it in peace; nothing is under way."""
        self._owner.gone(self)
        self._transport.close()

    # The transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # nothing was asked
            self.give_up(UpstreamFailed, say.NOT_HTTP)
            return
        self._begun = True
        self._progress = False
        self._heard = self.loop.time()
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            if not self._ended:
                self.give_up(UpstreamFailed, say.NOT_HTTP)
                return
            self._keep = False  # more came than was asked for
        if self._wrong is not None:
            self.give_up(UpstreamFailed, self._wrong)
            return
        if self._ended:
            self._end(response)
            return
        self._dry = 0 if self._progress else self._dry + len(data)
        if self._dry > MOST_HEAD_BYTES:
            self.give_up(UpstreamFailed, say.NOT_HTTP)
            return
        response.size += len(data)
        if response.size > MOST_BUFFERED_BYTES and response.parts:
            self._paused = True
            response.pause()
            self._transport.pause_reading()
        if response.status:
            response.tell()

    def eof_received(self) -> None:
        self._owner.gone(self)
        if self._acknowledged and not self._begun:
            self._never_read = acknowledged(self._sock) == self._acknowledged

    def connection_lost(self, exc: Exception | None) -> None:
        response, self._response = self._response, None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._owner.gone(self)
        self._owner.lost(self)
        if response is None:
            return
        if exc is None and response.status and _until_close(response.headers):
            response.whole = True
            response.tell()
        elif self._begun:
            response.fail(UpstreamFailed, say.BROKE_OFF)
        else:
            response.fail(NeverRead if self._never_read else ConnectionLost, say.CLOSED)

    # The parser tells.

    def on_message_begin(self) -> None:
        if self._ended:
            raise HttpParserError("more than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        response = self._response
        if response is not None and not response.status:  # later ones are a trailer's
            response.headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        response = self._response
        assert response is not None
        status = self._parser.get_status_code()
        if status < 200:
            self._interim = True
            response.headers.clear()
        else:
            self._progress = True
            response.status = status
            self._wrong = _refusal(response)

    def on_body(self, body: bytes) -> None:
        self._progress = True
        assert self._response is not None
        self._response.parts.append(body)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self._ended = True
            self._keep = self._parser.should_keep_alive()

    def _end(self, response: Http1Response) -> None:
        """The answer is whole: the connection is free for the next, unless either side thinks otherwise."""
        self._dry = 0
        self._response = None
        response.whole = True
        if not self._keep or self._transport.is_closing():
            self.close()
        elif self._transport.get_write_buffer_size():  # it did not care to read the whole request
            self.give_up(UpstreamFailed, say.BROKE_OFF)
        else:
            self._idle_until = self.loop.time() + _idle_seconds(response.headers)
            self._ring_at(self._idle_until)
            self._owner.freed(self)
        response.tell()

    # The clock. One timer serves an exchange's silence and the idling after it; a later moment than the timer's is
    # looked at again when it rings, so that hardly any exchange sets one.

    def _ring_at(self, moment: float) -> None:
        if self._alarm is not None:
            if self._alarm_at <= moment:
                return
            self._alarm.cancel()
        self._alarm_at = moment
        self._alarm = self.loop.call_at(moment, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        now = self.loop.time()
        moment = self._moment(now)
        if moment > now:
            if moment != inf:
                self._ring_at(moment)
        elif self._response is None:
            self.close()
        else:
            self.give_up(UpstreamTimeout, say.SILENT)

    def _moment(self, now: float) -> float:
        """When something must happen if nothing else does."""
        if self._response is None:
            return self._idle_until
        if self._silence is None:
            return inf
        if self._paused or self._transport.get_write_buffer_size():  # it is our caller, or the request, that is slow
            self._heard = now
        return self._heard + self._silence


def acknowledged(sock: socket.socket | None) -> int:
    """How many bytes of ours the other side's kernel has had so far; 0 where that is not known."""
    if _TCP_INFO is None or sock is None:
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _ACKNOWLEDGED.size)
    except OSError:
        return 0
    return int(_ACKNOWLEDGED.unpack(info)[0]) if len(info) == _ACKNOWLEDGED.size else 0


def _refusal(response: Http1Response) -> str | None:
    """Why an answer with such headers is not taken."""
    headers = response.headers
    if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        return say.NOT_HTTP
    return say.ENCODED if headers.get(b"content-encoding", b"identity").lower() != b"identity" else None


def _until_close(headers: dict[bytes, bytes]) -> bool:
    """Whether the end of the connection is the end of the body (RFC 9112, section 6.3)."""
    return b"content-length" not in headers and b"transfer-encoding" not in headers


def _idle_seconds(headers: dict[bytes, bytes]) -> float:
    """How long to keep the connection: a second less than the server says it will, where it does."""
    stated = headers.get(b"keep-alive")
    if stated is None:
        return IDLE_SECONDS
    for part in stated.split(b","):
        name, _, value = part.strip().partition(b"=")
        if name.lower() == b"timeout" and value.isdigit():
            return max(0.0, min(IDLE_SECONDS, int(value) - 1))
    return IDLE_SECONDS
