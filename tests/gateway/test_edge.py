"""The edge: whatever goes wrong inside, the client gets an end that says so, and the terminal no traceback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import pytest

from gateway.backends.base import Chunk
from gateway.chat import Reply
from gateway.edge import Endpoint
from tests.fakes import STREAM, Ids, Log

SECRET = "zebra-crossing-7741"


class Client:
    """Sends one body, stays, and keeps what it gets."""

    def __init__(self, *, silent: bool = False) -> None:
        self.got: list[dict[str, Any]] = []
        self._requests = [] if silent else [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive(self) -> dict[str, Any]:
        if self._requests:
            return self._requests.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Any) -> None:
        self.got.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)

    @property
    def complete(self) -> bool:
        return self.got[-1]["type"] == "http.response.body" and not self.got[-1].get("more_body", False)


class Chunks:
    """Yields chunks, then waits for ever or raises."""

    def __init__(self, chunks: list[Chunk], then: Exception | None = None) -> None:
        self.closed = 0
        self._chunks, self._then = list(chunks), then

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._chunks:
            return self._chunks.pop(0)
        if self._then is not None:
            raise self._then
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        self.closed += 1


def endpoint(chunks: Chunks | None, log: Log) -> Endpoint:
    async def answer(headers: Mapping[str, str], body: bytes) -> Reply:
        if chunks is None:
            await asyncio.Event().wait()
        assert chunks is not None
        return Reply(200, [], chunks, chunks.close, b"text/event-stream")

    return Endpoint(lambda _: None, answer, max_body_bytes=1000, log=log, new_id=Ids())


def run(client: Client, chunks: Chunks | None, log: Log, *, stop: bool) -> None:
    async def serve() -> None:
        scope = {"type": "http", "headers": []}
        task = asyncio.create_task(endpoint(chunks, log)(scope, client.receive, client.send))
        if stop:
            await asyncio.sleep(0.01)
            task.cancel()
        async with asyncio.timeout(10):
            await task

    asyncio.run(serve())


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_defect_is_logged_without_its_text_and_ends_the_answer_with_an_error(sent: int) -> None:
    client, chunks, log = Client(), Chunks(STREAM[:sent], ValueError(SECRET)), Log()
    run(client, chunks, log, stop=False)
    assert client.complete and b"internal error" in client.body and b"[DONE]" not in client.body
    assert client.got[0]["status"] == (200 if sent else 500) and chunks.closed == 1
    assert log.lines[0]["error"] == "ValueError" and "test_edge.py" in log.lines[0]["where"]
    assert SECRET not in repr(log.lines) and SECRET.encode() not in client.body


@pytest.mark.parametrize("silent", [True, False], ids=["while the body comes", "while the answer is awaited"])
def test_a_request_that_is_not_answered_when_the_gateway_stops_is_told_so(silent: bool) -> None:
    client = Client(silent=silent)
    run(client, None, Log(), stop=True)
    assert client.complete and client.got[0]["status"] == 503
    assert "stopping" in orjson.loads(client.body)["error"]["message"]


def test_a_stream_that_is_open_when_the_gateway_stops_ends_with_an_error_event() -> None:
    client, chunks = Client(), Chunks(STREAM[:2])
    run(client, chunks, Log(), stop=True)
    events = client.body.split(b"\n\n")
    assert client.complete and chunks.closed == 1 and events[1] == b"data: b" and b"[DONE]" not in client.body
    assert "stopping" in orjson.loads(events[2][6:])["error"]["message"]
