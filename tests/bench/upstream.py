"""The fake upstream: an OpenAI server that answers at once, as cheaply as Python can, so that it is not what the
benchmark measures.

Owns its listening socket and the answers' bytes, rendered at start. Refuses everything but HTTP/1.1 requests with a
Content-Length or in chunks, one at a time on a connection; understands the prompt's markers of `wire.py`.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from typing import cast

import orjson
import uvloop

from tests.bench import wire

_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def rendered(status: bytes, body: bytes) -> bytes:
    """A whole plain HTTP response."""
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream's HTTP chunks, one an event, and all of it as one piece: what has been produced already is written at
    once."""

    chunks: tuple[bytes, ...]
    whole: bytes

    @classmethod
    def of(cls, include_usage: bool) -> Stream:
        """Render the stream with or without the usage chunk."""
        chunks = [wire.http_chunk(event) for event in wire.stream_events(include_usage)]
        chunks[-1] += wire.CHUNKED_END
        return cls(tuple(chunks), _STREAM_HEAD + b"".join(chunks))


ANSWER = rendered(b"200 OK", wire.answer_body())
FAILURE = rendered(
    b"500 Internal Server Error",
    b'{"error":{"message":"asked to fail","type":"server_error","code":null,"param":null}}',
)
MODELS = rendered(b"200 OK", orjson.dumps({"object": "list", "data": [{"id": wire.MODEL, "object": "model"}]}))
STREAMS = {include_usage: Stream.of(include_usage) for include_usage in (False, True)}


class UpstreamConnection(asyncio.Protocol):
    """One connection. Invariant: at most one answer is under way, and a timer exists only while a paced one is."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. TCP_NODELAY is the event loop's default."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        """A client that goes away stops its stream."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer as soon as the request is whole."""
        if self._buffer:
            data = self._buffer + data
        self._buffer = data
        head_end = data.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = data[:head_end].lower()
        body = data[head_end + 4 :]
        at = head.find(b"content-length:")
        if at >= 0:
            if len(body) < int(head[at + 15 :].split(b"\r\n", 1)[0]):
                return
        elif b"transfer-encoding: chunked" in head:
            whole = wire.unchunked(body)
            if whole is None:
                return
            body = whole
        self._buffer = b""
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        if not body:
            self._transport.write(MODELS)
            return
        request = orjson.loads(body)
        if b"[fail]" in body:
            self._transport.write(FAILURE)
        elif b"[garble]" in body:
            self._transport.write(ANSWER.replace(wire.WORD, b" hey"))
        elif not request.get("stream"):
            self._transport.write(ANSWER)
        else:
            stream = STREAMS[bool((request.get("stream_options") or {}).get("include_usage"))]
            self._answer_stream(stream, body)

    def _answer_stream(self, stream: Stream, body: bytes) -> None:
        if b"[cut]" in body:
            self._transport.write(_STREAM_HEAD + b"".join(stream.chunks[:20]))
            self._transport.close()
        elif pause := wire.pace_ms(body):
            self._transport.write(_STREAM_HEAD + stream.chunks[0])
            self._next_chunk(stream.chunks, 1, pause / 1000, self._loop.time() + pause / 1000)
        else:
            self._transport.write(stream.whole)

    def _next_chunk(self, chunks: tuple[bytes, ...], number: int, pause: float, due: float) -> None:
        """Wait until `due` (the loop's clock), so that lateness does not add up. What follows the words goes with the
        last of them."""
        self._timer = self._loop.call_at(due, self._write_chunk, chunks, number, pause, due)

    def _write_chunk(self, chunks: tuple[bytes, ...], number: int, pause: float, due: float) -> None:
        self._timer = None
        if number == wire.CHUNKS - 1:
            self._transport.write(b"".join(chunks[number:]))
        else:
            self._transport.write(chunks[number])
            self._next_chunk(chunks, number + 1, pause, due + pause)


async def serve(port: int) -> None:
    """Serve on 127.0.0.1 until cancelled."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: UpstreamConnection(loop), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    """`python -m tests.bench.upstream --port PORT`"""
    options = argparse.ArgumentParser(description="The benchmark's fake upstream.")
    options.add_argument("--port", type=int, required=True)
    uvloop.run(serve(options.parse_args().port))


if __name__ == "__main__":
    main()
