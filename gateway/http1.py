"""HTTP/1.1 as the gateway serves it: a connection reads requests, one after the other, and each is an `Exchange` for
whoever answers it.

Owns bytes: heads and their bound, the back-pressure of bodies, keep-alive, pipelining, what cannot be parsed, and a
client that leaves, whose answering task is cancelled at once. Runs under uvicorn, which owns sockets, signals and
shutdown. Refuses HTTP/2 and WebSockets: an `Upgrade` is ignored, as HTTP allows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from urllib.parse import unquote

import orjson
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.errors import BadRequest, GatewayError, HeadTooLarge, body_of, status_of
from gateway.exchange import STATUS_LINES, Exchange, Serve

MOST_HEAD_BYTES = 64 * 1024  # of the request line and all headers, or a trailer; and one read of the socket
MOST_UNREAD_BYTES = 256 * 1024  # of a body that nobody reads yet; then reading stops
KEEP_ALIVE_SECONDS = 75.0  # longer than the balancers in front of us keep theirs (60 s), so that they close first
LINGER_SECONDS, MOST_LINGER_BYTES = 5.0, 32 * 1024 * 1024  # for a request that was answered before it was read
BEGUN_IN_ONE_TURN = 16


class Gate:
    """Begins few requests in one turn of the event loop. A hundred that arrive at the same moment would all be read and
    decided before the answer to the first is passed on; so what is under way is carried on in between."""

    def __init__(self, most: int = BEGUN_IN_ONE_TURN) -> None:
        self._most = most
        self._left = most
        self._counting = False  # a turn's end is awaited
        self._waiting: deque[Exchange] = deque()

    def enter(self, exchange: Exchange) -> None:
        """Start it, now or in its turn."""
        if not self._counting:
            self._counting = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left:
            self._left -= 1
            exchange.start()
        else:
            self._waiting.append(exchange)

    def _turn(self) -> None:
        self._counting = self._left < self._most
        self._left = self._most
        while self._left and self._waiting:
            self._left -= 1
            self._waiting.popleft().start()
        if self._counting:
            asyncio.get_running_loop().call_soon(self._turn)


@dataclass(frozen=True, slots=True)
class Site:
    """What the connections of one server share."""

    endpoints: Mapping[str, Serve]
    otherwise: Serve
    gate: Gate


class Http1(asyncio.Protocol):
    """One connection. Invariant: one exchange at most is being answered; a second one waits, and while one waits
    nothing is read. At most `MOST_HEAD_BYTES` and one read of the socket are kept of an unfinished head."""

    site: ClassVar[Site]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._state = server_state
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # after a last answer it is not read
        self._reading = True
        self.keeps = True  # until the server stops
        self._target = b""
        self._headers: dict[str, str] = {}
        self._in_head = True
        self._dry = 0  # bytes that came since the last that meant progress
        self._progress = False
        self._coming: Exchange | None = None  # whose request is being read
        self._answering: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._lingering = 0  # bytes that are still read and forgotten
        self._idle_since = self._loop.time()
        self._alarm: asyncio.TimerHandle | None = None
        self._default_headers: list[tuple[bytes, bytes]] = []
        self._default_lines = b""
        self.drain: asyncio.Future[None] | None = None  # until the client has taken what was written

    # The transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(cast(Any, self))
        self._alarm = self._loop.call_later(KEEP_ALIVE_SECONDS, self._ring)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast(Any, self))
        if self._alarm is not None:
            self._alarm.cancel()
        self.resume_writing()
        self._queue.clear()
        self._give_up()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._lingering -= len(data)
            if self._lingering <= 0:
                self._transport.close()
                return
        self._progress = False
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:  # no body is read after such a head: what comes next makes no sense
            self.keeps = False
        except HttpParserError:
            self._refuse(BadRequest("this is not a valid HTTP/1.1 request"))
            return
        self._dry = 0 if self._progress else self._dry + len(data)
        if self._dry > MOST_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the request's headers are larger than {MOST_HEAD_BYTES} bytes"))

    def pause_writing(self) -> None:
        self.drain = self._loop.create_future()

    def resume_writing(self) -> None:
        drain, self.drain = self.drain, None
        if drain is not None and not drain.done():
            drain.set_result(None)

    # The parser tells.

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = {}
        self._in_head = True
        self._idle_since = self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # later ones are a trailer's
            key, text = name.lower().decode("latin-1"), value.decode("latin-1")
            self._headers[key] = f"{self._headers[key]},{text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._progress = True
        parser, path, query = self._parser, self._target.decode("ascii"), b""
        if path not in self.site.endpoints:
            path, query = _split(self._target)
        version = parser.get_http_version()
        method = parser.get_method().decode("ascii")
        exchange = self._coming = Exchange(self, method, path, query, version, self._headers)
        exchange.keep = version != "1.0" and parser.should_keep_alive()
        if self._answering is None:
            self._answering = exchange
            self.site.gate.enter(exchange)
        else:
            self._queue.append(exchange)
            self._pause_reading()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        exchange = self._coming
        if exchange is not None and not exchange.ended and exchange.came(body) > MOST_UNREAD_BYTES:
            self._pause_reading()

    def on_message_complete(self) -> None:
        self._progress = True
        exchange, self._coming = self._coming, None
        if exchange is not None:
            exchange.came_whole()
            if self._lingering:
                self._transport.close()

    # Exchanges ask and tell.

    def start(self, exchange: Exchange) -> None:
        """Its turn has come."""
        if exchange.gone:
            return
        endpoint = self.site.endpoints.get(exchange.path) if exchange.method == "POST" else None
        serve = endpoint or self.site.otherwise
        task = exchange.task = self._loop.create_task(serve(exchange))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def more(self, exchange: Exchange) -> asyncio.Future[None]:
        """Read on. The future ends when something has come."""
        if exchange.continues:
            exchange.continues = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._resume_reading()
        return self._loop.create_future()

    def write(self, data: bytes) -> None:
        """To the client."""
        self._transport.write(data)

    def default_lines(self) -> bytes:
        """Header lines of every answer."""
        if self._state.default_headers is not self._default_headers:
            self._default_headers = self._state.default_headers
            self._default_lines = b"".join([b"%b: %b\r\n" % header for header in self._default_headers])
        return self._default_lines

    def answered(self, exchange: Exchange) -> None:
        """The answer has ended: on to the next request, or to the end of the connection."""
        self._state.total_requests += 1
        self._answering = None
        self._idle_since = self._loop.time()
        if exchange.keep and self.keeps:
            if self._queue:
                self._answering = self._queue.popleft()
                self.site.gate.enter(self._answering)
            if not self._queue:
                self._resume_reading()
        elif exchange.whole:
            self._transport.close()
        else:  # a socket that is closed on unread data is reset, and many clients would then never see the answer
            self._lingering = MOST_LINGER_BYTES
            self._resume_reading()
            self._loop.call_later(LINGER_SECONDS, self._transport.close)

    # uvicorn asks.

    def leave(self) -> None:
        """The server stops soon: the answer that is under way, or else the next one, is this connection's last."""
        self.keeps = False

    def shutdown(self) -> None:
        """The server stops: no request is taken any more."""
        self.keeps = False
        if self._answering is None:
            self._transport.close()

    def _ring(self) -> None:
        now = self._loop.time()
        due = (now if self._answering is not None else self._idle_since) + KEEP_ALIVE_SECONDS
        if due <= now:
            self._transport.close()
        else:
            self._alarm = self._loop.call_at(due, self._ring)

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    def _give_up(self) -> None:
        """Nobody waits for an answer any more."""
        exchange = self._answering
        if exchange is not None and not exchange.ended:
            exchange.gone = True
            if exchange.task is not None:
                exchange.task.cancel()

    def _refuse(self, error: GatewayError) -> None:
        """What comes cannot be read any further. A request before it, that could be, is answered yet."""
        if self._lingering:
            self._transport.close()
        if self._transport.is_closing():
            return
        exchange = self._answering
        if exchange is not None and exchange.whole:
            self.keeps = False
            self._pause_reading()
            return
        if exchange is None or not exchange.begun:
            body = orjson.dumps(body_of(error))
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.write(STATUS_LINES[status_of(error)] + head + body)
        self._give_up()
        self._transport.close()


def _split(target: bytes) -> tuple[str, bytes]:
    """A request's target as its path, decoded, and its query. Raises where it is none."""
    url = parse_url(target)
    return unquote(url.path.decode("ascii")), url.query or b""


def http1_for(endpoints: Mapping[str, Serve], otherwise: Serve) -> type[Http1]:
    """The protocol for uvicorn: a POST to an endpoint is served by it, whatever else by `otherwise`."""
    return type("Http1", (Http1,), {"site": Site(endpoints, otherwise, Gate())})
