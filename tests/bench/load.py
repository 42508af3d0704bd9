"""The load: closed-loop clients, each sending its next request when the last one is answered, cheap enough not to be
the bottleneck.

Owns client connections and what they saw. Refuses pipelining, and refuses to count a wrong answer as an answer: every
response is judged. All times are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import cast

import uvloop

from tests.bench import wire

DRAIN_SECONDS = 40.0
RECONNECT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Address:
    """Where a target listens on 127.0.0.1, and the headers that it wants."""

    port: int
    headers: tuple[tuple[str, str], ...] = ()
    path: str = "/v1/chat/completions"

    def request(self, body: bytes) -> bytes:
        """The whole HTTP request."""
        own = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        head = f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-type: application/json\r\n{own}"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, how many at once, for how long. `spread`: seconds over which the clients start; 0 starts them all
    at once."""

    kind: wire.Kind
    body: bytes
    concurrency: int
    seconds: float
    spread: float = 0.0


@dataclass(slots=True)
class Tally:
    """What a run saw. Invariant: every request that was sent ends as one latency (a right answer) or one error."""

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    in_time: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Right answers a second while the load was on; what was drained afterwards does not count."""
        return self.in_time / self.seconds


class ClientConnection(asyncio.Protocol):
    """One client's connection. Invariant: `_sent_at` is set exactly while a request is unanswered."""

    def __init__(self, load: Load, request: bytes, tally: Tally, deadline: float, closed: asyncio.Future[None]) -> None:
        self._load = load
        self._request = request
        self._tally = tally
        self._deadline = deadline
        self._closed = closed
        self._sent_at: float | None = None
        self._first_token: float | None = None
        self._length: int | None = None
        self._parts: list[bytes] = []
        self._tail = b""
        self._forget()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """A request that is unanswered now is an error; an idle connection may be closed."""
        if self._sent_at is not None:
            self._sent_at = None
            self._tally.errors["connection lost"] += 1
        if not self._closed.done():
            self._closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Collect the response; judge it when it is whole."""
        if self._sent_at is None:
            self._tally.errors["bytes after the end"] += 1
            self._transport.abort()
            return
        if self._first_token is None and wire.WORD in data:
            self._first_token = perf_counter()
        if not self._in_body:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            data = self._head[end + 4 :]
            self._read_head(self._head[:end].lower())
        self._parts.append(data)
        self._size += len(data)
        self._tail = data[-5:] if len(data) >= 5 else (self._tail + data)[-5:]
        if self._tail == wire.CHUNKED_END if self._length is None else self._size >= self._length:
            self._finish()

    def _forget(self) -> None:
        """Be ready for a response: nothing of it has been read."""
        self._head = b""
        self._status = 0
        self._length = None
        self._in_body = False
        self._parts = []
        self._size = 0
        self._tail = b""
        self._first_token = None

    def _send(self) -> None:
        self._forget()
        self._sent_at = perf_counter()
        self._transport.write(self._request)

    def _read_head(self, head: bytes) -> None:
        """A response without a length counts as chunked; if it is not, it never ends well."""
        self._in_body = True
        self._status = int(head[9:12])
        at = head.find(b"content-length:")
        self._length = None if at < 0 else int(head[at + 15 :].split(b"\r\n", 1)[0])

    def _finish(self) -> None:
        now = perf_counter()
        assert self._sent_at is not None
        began, self._sent_at = self._sent_at, None
        wrong = wire.fault(self._load.kind, self._status, b"".join(self._parts), self._length is None)
        if wrong is not None:
            self._tally.errors[wrong] += 1
        else:
            self._tally.latencies.append(now - began)
            self._tally.first_tokens.append((self._first_token or now) - began)
            self._tally.in_time += now <= self._deadline
        if now < self._deadline and wrong is None:
            self._send()
        else:
            self._transport.close()


async def _client(address: Address, load: Load, tally: Tally, deadline: float, delay: float) -> None:
    """One client until the deadline, with one request at least; after an error it comes back on a new connection, a
    little later."""
    await asyncio.sleep(delay)
    loop = asyncio.get_running_loop()
    request = address.request(load.body)
    while True:
        closed: asyncio.Future[None] = loop.create_future()
        connection = partial(ClientConnection, load, request, tally, deadline, closed)
        try:
            await loop.create_connection(connection, "127.0.0.1", address.port)
        except OSError:
            tally.errors["cannot connect"] += 1
        else:
            await closed
        if perf_counter() >= deadline:
            return
        await asyncio.sleep(RECONNECT_SECONDS)


async def closed_loop(address: Address, load: Load) -> Tally:
    """Run the load. What is unanswered 40 s after its end is an error."""
    tally = Tally(seconds=load.seconds)
    deadline = perf_counter() + load.seconds
    delays = (load.spread * number / load.concurrency for number in range(load.concurrency))
    clients = [asyncio.create_task(_client(address, load, tally, deadline, delay)) for delay in delays]
    _, unfinished = await asyncio.wait(clients, timeout=load.seconds + DRAIN_SECONDS)
    if unfinished:
        tally.errors["unanswered"] += len(unfinished)
        for client in unfinished:
            client.cancel()
        await asyncio.wait(unfinished)
    return tally


def run(address: Address, load: Load) -> Tally:
    """Run the load on a uvloop of its own, the garbage collector off: a pause of ours is not the target's latency."""
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(closed_loop(address, load))
    finally:
        gc.enable()


@dataclass(frozen=True, slots=True)
class Reply:
    """One response, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(address: Address, body: bytes, timeout: float = 30.0) -> Reply:
    """Send one request with the standard library's client. Raises `OSError` or `http.client.HTTPException` where
    there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=timeout)
    try:
        headers = {"content-type": "application/json", **dict(address.headers)}
        connection.request("POST", address.path, body, headers)
        response = connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()
