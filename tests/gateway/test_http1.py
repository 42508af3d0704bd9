"""The gateway's HTTP/1.1, byte for byte: requests however they are cut, answers in one write, pipelining,
back-pressure, and what becomes of a connection after each."""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.exchange import Exchange
from gateway.http1 import BEGUN_IN_ONE_TURN, MOST_HEAD_BYTES, MOST_UNREAD_BYTES
from tests.raw_http import Answer, Client

HEADERS = [(b"content-type", b"text/plain")]


def request(body: bytes = b"hi", *lines: bytes, target: bytes = b"/x", method: bytes = b"POST") -> bytes:
    head = b"".join(line + b"\r\n" for line in (b"host: h", *lines))
    return b"%b %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (method, target, head, len(body), body)


async def echo(exchange: Exchange) -> None:
    exchange.answer(200, HEADERS, await exchange.body(1_000_000))


async def other(exchange: Exchange) -> None:
    exchange.answer(404, [(b"x-path", exchange.path.encode()), (b"x-query", exchange.query)], b"other")


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def talk(
    pieces: Sequence[bytes],
    serve: Callable[[Exchange], Any] = echo,
    then: Callable[[Client], Awaitable[None]] | None = None,
) -> Client:
    """A client that has sent these pieces, a turn of the loop after each."""

    async def run() -> Client:
        client = Client({"/x": serve}, other)
        for piece in pieces:
            if not client.transport.closed:
                client.send(piece)
            await settled()
        if then is not None:
            await then(client)
        for task in list(client.state.tasks):
            task.cancel()
        return client

    return asyncio.run(run())


def bodies(client: Client) -> list[bytes]:
    return [answer.body for answer in client.answers()]


CHUNKED = (
    b"POST /x HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\nh\r\n1;x=y\r\ni\r\n0\r\nx-t: 1\r\n\r\n"
)


@given(st.sampled_from([request(), CHUNKED]), st.lists(st.integers(1, 200), max_size=6))
def test_a_request_may_be_cut_into_any_pieces(data: bytes, places: list[int]) -> None:
    marks = [0, *sorted({place for place in places if place < len(data)}), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(marks)]
    client = talk([*pieces, *pieces])
    assert bodies(client) == [b"hi", b"hi"] and not client.transport.closed


def test_a_plain_answer_and_the_beginning_of_a_stream_are_one_write_each() -> None:
    async def stream(exchange: Exchange) -> None:
        await exchange.body(10)
        exchange.begin(200, HEADERS, b"one")
        exchange.send(b"")
        exchange.send(b"two")
        exchange.end(b"three")

    plain, streamed = talk([request()]), talk([request()], stream)
    assert plain.transport.writes == 1 and plain.answers() == [
        Answer(200, {"content-type": "text/plain", "content-length": "2"}, b"hi", True)
    ]
    assert streamed.transport.writes == 4 and streamed.answers() == [
        Answer(200, {"content-type": "text/plain", "transfer-encoding": "chunked"}, b"onetwothree", True)
    ]


def test_headers_keep_all_their_values_and_a_trailer_is_none() -> None:
    seen: list[dict[str, str]] = []

    async def look(exchange: Exchange) -> None:
        await exchange.body(10)
        seen.append(exchange.headers)
        exchange.answer(200, HEADERS, b"")

    talk([request(b"hi", b"X-A: 1", b"x-a: 2", b"x-empty:"), CHUNKED], look)
    assert seen[0]["x-a"] == "1,2" and seen[0]["x-empty"] == "" and "x-t" not in seen[1]


def test_only_a_post_to_an_endpoint_reaches_it() -> None:
    for target in (b"/x", b"/x?a=b", b"/%78", b"http://h/x"):
        assert talk([request(target=target)]).answers()[0].status == 200
    client = talk([request(method=b"PUT"), request(target=b"/y%20z?a=%20")])
    assert [answer.status for answer in client.answers()] == [404, 404]
    assert client.answers()[1].headers["x-path"] == "/y z" and client.answers()[1].headers["x-query"] == "a=%20"


def test_head_gets_a_length_and_no_body() -> None:
    assert b"content-length: 5\r\n\r\n" in talk([request(b"", method=b"HEAD")]).transport.written
    assert b"other" not in talk([request(b"", method=b"HEAD")]).transport.written


@pytest.mark.parametrize(
    ("lines", "version"), [((b"connection: close",), b"1.1"), ((), b"1.0"), ((b"connection: keep-alive",), b"1.0")]
)
def test_a_connection_ends_where_the_client_wants_it_to(lines: tuple[bytes, ...], version: bytes) -> None:
    data = request(b"hi", *lines).replace(b"HTTP/1.1", b"HTTP/" + version)
    client = talk([data + request()])
    assert client.transport.closed and bodies(client) == [b"hi"]
    assert client.answers()[0].headers["connection"] == "close"


def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection() -> None:
    async def stream(exchange: Exchange) -> None:
        exchange.begin(200, HEADERS, b"one ")
        exchange.end(b"two")

    client = talk([request(b"").replace(b"HTTP/1.1", b"HTTP/1.0")], stream)
    assert client.transport.written.endswith(b"\r\n\r\none two") and client.transport.closed


def test_pipelined_requests_are_answered_in_their_order_and_reading_stops_meanwhile() -> None:
    first = asyncio.Event()

    async def serve(exchange: Exchange) -> None:
        body = await exchange.body(10)
        if body == b"1":
            await first.wait()
        exchange.answer(200, HEADERS, body)

    async def then(client: Client) -> None:
        assert not client.answers() and not client.transport.reading
        first.set()
        await settled()
        assert client.transport.reading

    client = talk([request(b"1") + request(b"2") + request(b"3")], serve, then)
    assert bodies(client) == [b"1", b"2", b"3"]


def test_what_cannot_be_parsed_after_a_request_does_not_disturb_its_answer() -> None:
    answer_now = asyncio.Event()

    async def serve(exchange: Exchange) -> None:
        exchange.begin(200, HEADERS, b"half, ")
        await answer_now.wait()
        exchange.end(b"whole")

    async def then(client: Client) -> None:
        client.send(b"junk\r\n\r\n")
        answer_now.set()
        await settled()

    client = talk([request()], serve, then)
    (answer,) = client.answers()
    assert answer.body == b"half, whole" and answer.whole and client.transport.closed


@pytest.mark.parametrize(
    "data",
    [
        b"junk\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /x HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /\xff HTTP/1.1\r\n\r\n",
    ],
)
def test_what_cannot_be_parsed_is_answered_and_ends_the_connection(data: bytes) -> None:
    client = talk([data, request()])
    assert [answer.status for answer in client.answers()] == [400] and client.transport.closed


@pytest.mark.parametrize("endless", [b"x: " + b"a" * 50 + b"\r\n", b"x: " + b"a" * 50], ids=["headers", "one header"])
def test_a_head_without_end_is_refused(endless: bytes) -> None:
    client = talk([b"GET / HTTP/1.1\r\n", *[endless * 100] * 40])
    assert [answer.status for answer in client.answers()] == [431] and client.transport.closed
    assert len(endless) * 100 * 40 > MOST_HEAD_BYTES


def test_a_trailer_without_end_is_refused() -> None:
    client = talk([CHUNKED[: CHUNKED.index(b"x-t")], *[b"x-t: " + b"a" * 5000 + b"\r\n"] * 20])
    assert [answer.status for answer in client.answers()] == [431] and client.transport.closed


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it() -> None:
    head, body = request(b"hi", b"expect: 100-continue").split(b"\r\n\r\n")
    client = talk([head + b"\r\n\r\n", body])
    assert client.transport.written.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_an_answer_before_the_body_has_come_closes_the_connection_when_it_has() -> None:
    async def hasty(exchange: Exchange) -> None:
        exchange.answer(413, HEADERS, b"no")

    async def then(client: Client) -> None:
        assert not client.transport.closed
        client.send(b"x" * 100_000)
        assert not client.transport.closed
        client.send(b"x" * 900_000 + request())
        await settled()

    client = talk([request(b"x" * 1_000_000)[:100]], hasty, then)
    (answer,) = client.answers()
    assert answer.headers["connection"] == "close" and client.transport.closed


def test_a_body_that_nobody_reads_stops_the_reading() -> None:
    wanted = asyncio.Event()

    async def late(exchange: Exchange) -> None:
        await wanted.wait()
        exchange.answer(200, HEADERS, b"%d" % len(await exchange.body(10_000_000)))

    async def then(client: Client) -> None:
        while client.is_read():
            client.send(b"x" * 50_000)
        sent = len(client.server._coming._parts)  # type: ignore[union-attr]
        assert sent * 50_000 <= MOST_UNREAD_BYTES + 50_000
        wanted.set()
        await settled()
        assert client.is_read()
        client.send(b"x" * (1_000_000 - sent * 50_000))
        await settled()

    assert bodies(talk([request(b"x" * 1_000_000)[:-1_000_000]], late, then)) == [b"1000000"]


def test_a_slow_client_slows_the_stream_down() -> None:
    steps: list[str] = []

    async def stream(exchange: Exchange) -> None:
        exchange.begin(200, HEADERS, b"a")
        assert exchange.blocked
        await exchange.drained()
        steps.append("drained")
        exchange.end(b"b")

    async def run() -> None:
        client = Client({"/x": stream}, other)
        client.server.pause_writing()
        client.send(request())
        await settled()
        assert steps == []
        client.server.resume_writing()
        await settled()
        (answer,) = client.answers()
        assert answer.whole

    asyncio.run(run())
    assert steps == ["drained"]


def test_a_header_that_is_no_line_is_not_sent() -> None:
    raised: list[Exception] = []

    async def evil(exchange: Exchange) -> None:
        for value in (b"a\r\nset-cookie: x", b"a\nb", b"a\r"):
            try:
                exchange.begun = False
                exchange.answer(200, [(b"x", value)], b"")
            except ValueError as error:
                raised.append(error)

    assert not talk([request()], evil).transport.written and len(raised) == 3


def test_a_server_that_stops_closes_idle_connections_and_ends_the_others_after_their_answer() -> None:
    go = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await go.wait()
        exchange.answer(200, HEADERS, b"done")

    async def idle(client: Client) -> None:
        client.server.shutdown()
        assert client.transport.closed

    async def busy(client: Client) -> None:
        client.server.shutdown()
        assert not client.transport.closed
        go.set()
        await settled()

    talk([request()], echo, idle)
    client = talk([request()], slow, busy)
    assert client.answers()[0].headers["connection"] == "close" and client.transport.closed


def test_a_client_that_leaves_cancels_what_answers_it_and_what_waits_is_never_begun() -> None:
    begun: list[bytes] = []
    ended: list[bool] = []

    async def serve(exchange: Exchange) -> None:
        begun.append(await exchange.body(10))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(exchange.gone)

    async def then(client: Client) -> None:
        client.leave()
        await settled()

    talk([request(b"1") + request(b"2")], serve, then)
    assert begun == [b"1"] and ended == [True]


def test_after_its_end_an_answers_task_is_left_alone() -> None:
    ended: list[str] = []

    async def serve(exchange: Exchange) -> None:
        exchange.answer(200, HEADERS, await exchange.body(10))
        await asyncio.sleep(0.01)
        ended.append("in peace")

    async def then(client: Client) -> None:
        client.leave()
        await asyncio.sleep(0.05)

    talk([request()], serve, then)
    assert ended == ["in peace"]


def test_few_requests_begin_in_one_turn_of_the_loop_and_all_in_their_order() -> None:
    turns: list[list[int]] = [[]]

    async def serve(exchange: Exchange) -> None:
        turns[-1].append(int(await exchange.body(10)))
        exchange.answer(200, HEADERS, b"")

    async def run() -> None:
        first = Client({"/x": serve}, other)
        clients = [first, *(Client({"/x": serve}, other, like=first) for _ in range(2 * BEGUN_IN_ONE_TURN))]
        for number, client in enumerate(clients):
            client.send(request(b"%d" % number))
        while sum(map(len, turns)) < len(clients):
            turns.append([])
            await asyncio.sleep(0)

    asyncio.run(run())
    assert [len(turn) for turn in turns if turn] == [BEGUN_IN_ONE_TURN, BEGUN_IN_ONE_TURN, 1]
    assert functools.reduce(operator.iadd, turns, []) == list(range(2 * BEGUN_IN_ONE_TURN + 1))
