"""The edge: whatever goes wrong inside, the client gets an end that says so, and the terminal no traceback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import orjson
import pytest

from gateway.backends.base import Chunk
from gateway.edge import AsgiEndpoint, Edge, Endpoint
from gateway.errors import Unauthenticated
from gateway.reply import Reply
from tests.fakes import STREAM, Ids, Log
from tests.raw_http import Client

SECRET = "zebra-crossing-7741"


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


def answer_to(request: bytes, chunks: Chunks | None, log: Log, *, stop: bool = False, leave: bool = False) -> Client:
    """The client when its request has been served, with what it got."""

    async def answering(headers: Mapping[str, str], body: bytes) -> Reply:
        if chunks is None:
            await asyncio.Event().wait()
        assert chunks is not None
        return Reply(200, [], chunks, chunks.close, b"text/event-stream")

    def admit(headers: Mapping[str, str]) -> None:
        if headers.get("authorization") == "wrong":
            raise Unauthenticated("no such key")

    async def no_app(*_: object) -> None:
        raise ValueError(SECRET)

    async def serve() -> Client:
        edge = Edge(log, Ids())
        client = Client({"/x": Endpoint(admit, answering, max_body_bytes=1000, edge=edge)}, AsgiEndpoint(no_app, edge))
        client.send(request)
        await asyncio.sleep(0.01)
        if leave:
            client.leave()
        elif stop:
            for task in client.state.tasks:
                task.cancel()
        async with asyncio.timeout(10):
            while client.state.tasks:
                await asyncio.wait(client.state.tasks)
        return client

    return asyncio.run(serve())


POST = b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n"


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_defect_is_logged_without_its_text_and_ends_the_answer_with_an_error(sent: int) -> None:
    chunks, log = Chunks(STREAM[:sent], ValueError(SECRET)), Log()
    (answer,) = answer_to(POST + b"{}", chunks, log).answers()
    assert answer.whole and b"internal error" in answer.body and b"[DONE]" not in answer.body
    assert answer.status == (200 if sent else 500) and chunks.closed == 1
    assert log.lines[0]["error"] == "ValueError" and "test_edge.py" in log.lines[0]["where"]
    assert SECRET not in repr(log.lines) and SECRET.encode() not in answer.body


def test_a_defect_of_the_small_pages_is_an_error_too() -> None:
    log = Log()
    (answer,) = answer_to(b"GET /y HTTP/1.1\r\nhost: h\r\n\r\n", None, log).answers()
    assert answer.status == 500 and b"internal error" in answer.body
    assert log.lines[0]["error"] == "ValueError" and SECRET not in repr(log.lines)


@pytest.mark.parametrize("body", [b"", b"{}"], ids=["while the body comes", "while the answer is awaited"])
def test_a_request_that_is_not_answered_when_the_gateway_stops_is_told_so(body: bytes) -> None:
    (answer,) = answer_to(POST + body, None, Log(), stop=True).answers()
    assert answer.whole and answer.status == 503
    assert "stopping" in orjson.loads(answer.body)["error"]["message"]


def test_a_stream_that_is_open_when_the_gateway_stops_ends_with_an_error_event() -> None:
    chunks = Chunks(STREAM[:2])
    (answer,) = answer_to(POST + b"{}", chunks, Log(), stop=True).answers()
    events = answer.body.split(b"\n\n")
    assert answer.whole and chunks.closed == 1 and events[1] == b"data: b" and b"[DONE]" not in answer.body
    assert "stopping" in orjson.loads(events[2][6:])["error"]["message"]


@pytest.mark.parametrize("chunks", [None, Chunks(STREAM[:2])], ids=["before the answer", "in the midst of it"])
def test_what_answers_is_cancelled_when_the_client_leaves(chunks: Chunks | None) -> None:
    client = answer_to(POST + b"{}", chunks, Log(), leave=True)
    assert not any(answer.whole for answer in client.answers())
    assert chunks is None or chunks.closed == 1


def test_a_body_above_the_limit_is_refused_before_it_is_read() -> None:
    head = b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 1001\r\n\r\n"
    (answer,) = answer_to(head, None, Log()).answers()
    assert answer.status == 413 and answer.headers["connection"] == "close"
    chunked = b"POST /x HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001
    (answer,) = answer_to(chunked, None, Log()).answers()
    assert answer.status == 413 and orjson.loads(answer.body)["error"]["code"] == "request_too_large"


def test_whoever_has_no_key_has_nothing_of_a_body_read() -> None:
    head = b"POST /x HTTP/1.1\r\nhost: h\r\nauthorization: wrong\r\ncontent-length: 900\r\n\r\n"
    (answer,) = answer_to(head, None, Log()).answers()
    assert answer.status == 401 and answer.headers["connection"] == "close" and "www-authenticate" in answer.headers
