"""Our HTTP client alone: answers however they are cut into pieces, connections that die while they idle, when a request
may be sent twice, where a name leads."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import uvicorn
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.http1_client import Addresses, Http1Upstream
from gateway.backends.http1_connection import (
    IDLE_SECONDS,
    MOST_BUFFERED_BYTES,
    MOST_HEAD_BYTES,
    Http1Connection,
    Http1Response,
)
from gateway.errors import ConnectFailed, ConnectionLost, Retryable, UpstreamFailed
from tests.raw_http import CHUNKED_HEAD, Peer, Seen, Transport, always, answer, chunk, serving

T = TypeVar("T")


async def post(upstream: Http1Upstream, body: bytes = b"{}") -> tuple[int, bytes]:
    response = await upstream.post("/x", body, {}, 5.0)
    return response.status, await response.read()


# One connection over a transport that a test plays.


class Keeper:
    """An owner that counts."""

    def __init__(self) -> None:
        self.free = 0
        self.usable = False  # when it was last free, before any clock has rung

    def opened(self, connection: Http1Connection) -> None: ...

    def freed(self, connection: Http1Connection) -> None:
        self.free += 1
        self.usable = connection.usable

    def gone(self, connection: Http1Connection) -> None: ...

    def lost(self, connection: Http1Connection) -> None: ...


class Played:
    """A connection, its transport and its owner."""

    def __init__(self) -> None:
        self.owner = Keeper()
        self.transport = Transport()
        self.connection = Http1Connection(asyncio.get_running_loop(), None, self.owner)
        self.connection.connection_made(self.transport)

    async def exchange(
        self, pieces: Sequence[bytes], *, end: bool = False, error: Exception | None = None
    ) -> Http1Response:
        """The response, when all pieces have come. Raises what the client raises."""
        task = asyncio.create_task(self.connection.exchange(b"POST", b"", None))
        await asyncio.sleep(0)
        for piece in pieces:
            if not self.transport.closed:
                self.connection.data_received(piece)
        if end and not self.transport.closed:
            self.connection.eof_received()
            self.connection.connection_lost(error)
        return await task


WHOLE = {
    "with a length": (answer(b'{"answer": 42}', b"content-type: application/json"), b'{"answer": 42}'),
    "in chunks": (
        CHUNKED_HEAD + chunk(b"data: a\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\nx-t: 1\r\n\r\n",
        b"data: a\n\ndata: [DONE]\n\n",
    ),
    "after interim answers": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 P\r\nx: y\r\n\r\n" + answer(b"hi"), b"hi"),
}


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    marks = [0, *sorted({place % len(data) for place in places} - {0}), len(data)]
    return [data[start:end] for start, end in pairwise(marks)]


def read_in(pieces: Sequence[bytes]) -> tuple[bytes, int]:
    """The body of an answer that comes in these pieces, and how often its connection became free."""

    async def run() -> tuple[bytes, int]:
        played = Played()
        response = await played.exchange(pieces)
        assert response.status == 200
        return await response.read(), played.owner.free

    return asyncio.run(run())


@pytest.mark.parametrize("case", WHOLE)
def test_an_answer_may_be_cut_at_any_byte(case: str) -> None:
    data, body = WHOLE[case]
    assert read_in([data[i : i + 1] for i in range(len(data))]) == (body, 1)
    for place in range(1, len(data)):
        assert read_in([data[:place], data[place:]]) == (body, 1)


@given(st.sampled_from(sorted(WHOLE)), st.lists(st.integers(0, 1000), max_size=8))
def test_an_answer_may_be_cut_into_any_pieces(case: str, places: list[int]) -> None:
    data, body = WHOLE[case]
    assert read_in(cut(data, places)) == (body, 1)


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 1000), st.lists(st.integers(0, 1000), max_size=4))
def test_an_answer_that_ends_early_is_never_taken_for_whole(case: str, length: int, places: list[int]) -> None:
    data, _ = WHOLE[case]
    data = data[: length % len(data)]

    async def run() -> type[Retryable]:
        played = Played()
        with pytest.raises(Retryable) as error:
            await (await played.exchange(cut(data, places) if data else [], end=True)).read()
        assert not played.owner.free
        return type(error.value)

    assert asyncio.run(run()) is (UpstreamFailed if data else ConnectionLost)


@given(st.binary(max_size=300), st.lists(st.integers(0, 1000), max_size=4))
def test_no_bytes_whatsoever_break_more_than_their_own_answer(data: bytes, places: list[int]) -> None:
    async def run() -> None:
        played = Played()
        try:
            await (await played.exchange(cut(data, places) if data else [], end=True)).read()
        except Retryable:
            assert not played.owner.free

    asyncio.run(run())


@pytest.mark.parametrize(
    "endless",
    [
        b"x: aaaaaaaaaaaaaa\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        CHUNKED_HEAD + b"1;",
        CHUNKED_HEAD + b"0\r\nx: ",
    ],
    ids=["a head", "interim answers", "a chunk's extension", "a trailer"],
)
def test_what_never_comes_to_the_point_is_bounded(endless: bytes) -> None:
    async def run() -> int:
        played = Played()
        start = b"" if endless.startswith((b"HTTP/1.1 1", CHUNKED_HEAD)) else b"HTTP/1.1 200 OK\r\n"
        more = b"a" * 1000 if endless.startswith(CHUNKED_HEAD) else endless * 10
        fed = [start + endless]
        while sum(map(len, fed)) < 2 * MOST_HEAD_BYTES:
            fed.append(more)
        with pytest.raises(UpstreamFailed):
            await (await played.exchange(fed)).read()
        return played.transport.closed

    assert asyncio.run(run())


def test_a_long_stream_of_tiny_chunks_is_not_taken_for_an_endless_head() -> None:
    assert len(read_in([CHUNKED_HEAD, *[chunk(b"x")] * 50_000, b"0\r\n\r\n"])[0]) == 50_000


def test_reading_stops_while_nobody_takes_what_has_come() -> None:
    async def run() -> list[bool]:
        played = Played()
        piece = chunk(b"x" * 100_000)
        response = await played.exchange([CHUNKED_HEAD, piece])
        reading = [played.transport.reading]
        for _ in range(MOST_BUFFERED_BYTES // 100_000):
            played.connection.data_received(piece)
        reading.append(played.transport.reading)
        await response.some()
        reading.append(played.transport.reading)
        response.close()
        return reading

    assert asyncio.run(run()) == [True, False, True]


def test_an_answer_to_an_unfinished_request_frees_no_connection() -> None:
    async def run() -> tuple[bytes, int, bool]:
        played = Played()
        played.transport.unsent = 1
        response = await played.exchange([answer(b"too large")])
        return await response.read(), played.owner.free, played.transport.closed

    assert asyncio.run(run()) == (b"too large", 0, True)


@pytest.mark.parametrize("surplus", [answer(b"other"), b"H", b"HTTP/1.1 200 OK\r\nx: ", b"junk"])
def test_a_connection_with_more_than_was_asked_for_is_closed(surplus: bytes) -> None:
    async def run(pieces: Sequence[bytes]) -> tuple[bytes, bool]:
        played = Played()
        response = await played.exchange(pieces)
        return await response.read(), played.transport.closed

    assert asyncio.run(run([answer(b"mine") + surplus])) == (b"mine", True)
    assert asyncio.run(run([answer(b"mine"), surplus])) == (b"mine", True)


# Over real sockets.


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.SelectorEventLoop

    def on_loop(work: Any) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(work)

    return on_loop


def test_a_unix_socket_is_an_address(run: Callable[[Any], Any], tmp_path: Path) -> None:
    async def work() -> bytes:
        async with serving(always(answer()), uds=tmp_path / "s") as seen:
            upstream = Http1Upstream("http://engine/v1", connect=2.0, uds=str(tmp_path / "s"))
            for _ in range(2):
                assert await post(upstream) == (200, b"{}")
            await upstream.close()
            assert seen.connections == 1
            return seen.requests[0]

    assert run(work()).startswith(b"POST /v1/x HTTP/1.1\r\nhost: engine\r\n")

    async def nowhere() -> None:
        with pytest.raises(ConnectFailed):
            await post(Http1Upstream("http://engine", connect=2.0, uds=str(tmp_path / "none")))

    run(nowhere())


def test_a_connection_that_the_server_closed_while_it_idled_is_not_used(run: Callable[[Any], Any]) -> None:
    async def once(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer())

    async def work() -> int:
        async with serving(once) as seen:
            upstream = Http1Upstream(seen.url, connect=2.0)
            for _ in range(3):
                await post(upstream)
                await asyncio.sleep(0.02)
            await upstream.close()
            return seen.connections

    assert run(work()) == 3


def test_an_idle_connection_is_closed_before_the_server_says_it_will(run: Callable[[Any], Any]) -> None:
    async def work() -> int:
        async with serving(always(answer(b"{}", b"Keep-Alive: timeout=1, max=100"))) as seen:
            upstream = Http1Upstream(seen.url, connect=2.0)
            await post(upstream)
            await asyncio.wait_for(seen.left.wait(), 5)
            await upstream.close()
            return seen.gone

    assert run(work()) == 1


def test_an_idle_connection_is_not_used_once_its_time_is_over_whoever_has_closed_it(run: Callable[[Any], Any]) -> None:
    """A busy process may come to the request before it comes to the clock."""

    async def usable(head: bytes) -> bool:
        played = Played()
        await played.exchange([answer(b"{}", head)])
        return played.owner.usable

    assert run(usable(b"Keep-Alive: timeout=60")) is True
    assert run(usable(b"Keep-Alive: timeout=1")) is False


def test_an_idle_connection_is_closed_before_uvicorn_does_which_does_not_say_when() -> None:
    """It waits 5 s, and so do vLLM, SGLang and llama.cpp's server. Both at once, and the request is lost."""
    assert uvicorn.Config("").timeout_keep_alive > IDLE_SECONDS


def test_the_connection_that_was_used_last_is_used_first(run: Callable[[Any], Any]) -> None:
    """So that those that a burst has opened are left to their idle time."""
    served: list[int] = []

    async def numbered(peer: Peer) -> None:
        number = peer.seen.connections
        while await peer.request():
            served.append(number)
            if len(served) <= 3:
                await asyncio.sleep(0.02 * number)
            await peer.send(answer())

    async def work() -> None:
        async with serving(numbered) as seen:
            upstream = Http1Upstream(seen.url, connect=2.0)
            await asyncio.gather(*(post(upstream) for _ in range(3)))
            for _ in range(3):
                await post(upstream)
            await upstream.close()

    run(work())
    assert served[3:] == [3, 3, 3]


def test_closing_closes_what_is_idle_and_ends_what_is_under_way(run: Callable[[Any], Any]) -> None:
    all_asked = asyncio.Event()

    async def first_only(peer: Peer) -> None:
        if peer.seen.connections == 1:
            await peer.request()
            await peer.send(answer())
        await peer.request()
        if len(peer.seen.requests) == 3:
            all_asked.set()
        await peer.head()

    async def work() -> int:
        async with serving(first_only) as seen:
            upstream = Http1Upstream(seen.url, connect=2.0)
            await post(upstream)
            stuck = [asyncio.create_task(post(upstream)) for _ in range(2)]
            await all_asked.wait()
            await upstream.close()
            for task in stuck:
                with pytest.raises(Retryable):
                    await task
            with pytest.raises(ConnectFailed):
                await post(upstream)
            await upstream.close()
            return seen.connections

    assert run(work()) == 2


class Hand:
    """A server that is moved by hand, on the loop of its client: what it does has happened when the call returns."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.requests = 0

    async def accept(self) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        connection.setblocking(False)
        return connection

    async def serve(self, connection: socket.socket) -> None:
        await self.take(connection)
        await asyncio.get_running_loop().sock_sendall(connection, answer())

    async def take(self, connection: socket.socket) -> None:
        """Read a request, which the tests keep short."""
        assert await asyncio.get_running_loop().sock_recv(connection, 65536)
        self.requests += 1

    async def used(self, upstream: Http1Upstream) -> socket.socket:
        """A connection that the client has used once and keeps."""
        asking = asyncio.create_task(post(upstream))
        connection = await self.accept()
        await self.serve(connection)
        await asking
        return connection


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what was acknowledged")
def test_a_request_that_met_a_closed_connection_is_sent_once_more(run: Callable[[Any], Any]) -> None:
    """The server closes while the request is on its way: nobody can have read it."""

    async def work() -> tuple[int, tuple[int, bytes]]:
        hand = Hand()
        upstream = Http1Upstream(hand.url, connect=2.0)
        connection = await hand.used(upstream)
        connection.close()  # the client's loop has had no time to notice
        asking = asyncio.create_task(post(upstream))
        fresh = await asyncio.wait_for(hand.accept(), 5)
        await hand.serve(fresh)
        result = await asking
        await upstream.close()
        fresh.close()
        hand.listener.close()
        return hand.requests, result

    assert run(work()) == (2, (200, b"{}"))


@pytest.mark.parametrize("used_before", [True, False])
def test_a_request_that_may_have_been_read_is_not_sent_again(run: Callable[[Any], Any], used_before: bool) -> None:
    """The server has read it and died of it, perhaps."""

    async def work() -> int:
        hand = Hand()
        upstream = Http1Upstream(hand.url, connect=2.0)
        connection = await hand.used(upstream) if used_before else None
        before = hand.requests
        asking = asyncio.create_task(post(upstream))
        connection = connection or await hand.accept()
        await hand.take(connection)
        connection.close()
        with pytest.raises(ConnectFailed):
            await asyncio.wait_for(asking, 5)
        await upstream.close()
        with pytest.raises(BlockingIOError):
            hand.listener.accept()
        hand.listener.close()
        return hand.requests - before

    assert run(work()) == 1


# Where a name leads.


class Named(asyncio.SelectorEventLoop):
    """A loop on which names lead where a test says; `asked` counts."""

    def __init__(self, *addresses: tuple[int, tuple[str, int]]) -> None:
        super().__init__()
        self.asked = 0
        self._addresses = addresses

    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        self.asked += 1
        await asyncio.sleep(0)
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in self._addresses]


V4, V6 = socket.AF_INET, socket.AF_INET6


def test_replicas_behind_a_name_take_turns_and_the_preferred_family_stays_in_front() -> None:
    replicas = [(V6, ("::1", 80)), (V6, ("::2", 80)), (V4, ("10.0.0.1", 80))]
    loop = Named(*cast(Any, replicas))

    async def work() -> list[list[str]]:
        addresses = Addresses("engine", 80)
        looked_up = await asyncio.gather(*(addresses.look_up() for _ in range(3)))
        return [[str(one[4][0]) for one in found] for found in looked_up]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(work()) == [
            ["::2", "::1", "10.0.0.1"],
            ["::1", "::2", "10.0.0.1"],
            ["::2", "::1", "10.0.0.1"],
        ]
    assert loop.asked == 1


@pytest.mark.skipif(sys.platform != "linux", reason="how a full backlog behaves")
def test_an_address_that_does_not_answer_is_passed_over() -> None:
    async def work(good: Seen) -> bytes:
        upstream = Http1Upstream("http://engine:80", connect=2.0)
        try:
            return (await post(upstream))[1]
        finally:
            await upstream.close()

    async def both() -> bytes:
        async with serving(always(answer(b"here"))) as seen:
            loop = cast(Named, asyncio.get_running_loop())
            loop._addresses = ((V4, deaf), (V4, closed), (V4, ("127.0.0.1", int(seen.url.rpartition(":")[2]))))
            return await work(seen)

    with socket.socket() as full, socket.socket() as filler, socket.create_server(("127.0.0.1", 0)) as gone:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filler.connect(full.getsockname())  # the only place in its backlog
        deaf, closed = full.getsockname(), gone.getsockname()
        gone.close()
        with asyncio.Runner(loop_factory=Named) as runner:
            assert runner.run(both()) == b"here"
