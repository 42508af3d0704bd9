"""The relay's HTTP clients, ours and aiohttp, against one table: what is an answer, what is a failure and of which
kind, and what becomes of connections. Each case runs on uvloop, as in production, and ours on asyncio's loop as well.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from gateway.backends.aiohttp_client import AiohttpUpstream
from gateway.backends.build import authorities_of, upstream_of
from gateway.backends.http1_client import Http1Upstream
from gateway.backends.upstream import Response, Upstream
from gateway.errors import ConnectFailed, ConnectionLost, Retryable, UpstreamFailed, UpstreamTimeout
from gateway.networks import Networks
from gateway.types import Replica
from tests.fakes import deployment
from tests.raw_http import CHUNKED_HEAD, Peer, Script, Seen, always, answer, chunk, serving

T = TypeVar("T")
Make = Callable[..., Upstream]


def _aiohttp(url: str, **options: Any) -> Upstream:
    return AiohttpUpstream(url, **({"connect": 2.0, "proxy": None} | options))


def _ours(url: str, **options: Any) -> Upstream:
    return Http1Upstream(url, **({"connect": 2.0} | options))


class Client:
    """One kind of client on one kind of event loop."""

    def __init__(self, make: Make, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.make = make
        self._loop = loop

    def run(
        self,
        script: Script,
        work: Callable[[Upstream, Seen], Awaitable[T]],
        tls: ssl.SSLContext | None = None,
        **options: Any,
    ) -> T:
        """The work's result, with a client of a server that follows the script."""

        async def both() -> T:
            async with serving(script, tls=tls) as seen, self.open(seen.url + "/v1", **options) as upstream:
                return await work(upstream, seen)

        with asyncio.Runner(loop_factory=self._loop) as runner:
            return runner.run(both())

    @asynccontextmanager
    async def open(self, url: str, **options: Any) -> AsyncIterator[Upstream]:
        upstream = self.make(url, **options)
        try:
            yield upstream
        finally:
            await upstream.close()


@pytest.fixture(params=["ours on uvloop", "ours on asyncio", "aiohttp on uvloop"])
def client(request: pytest.FixtureRequest) -> Client:
    make = _aiohttp if request.param.startswith("aiohttp") else _ours
    return Client(make, uvloop.new_event_loop if request.param.endswith("uvloop") else asyncio.SelectorEventLoop)


async def post(upstream: Upstream, body: bytes = b"{}", silence: float | None = 5.0) -> Response:
    return await upstream.post("/chat/completions", body, {"x-request-id": "r1"}, silence)


async def whole(upstream: Upstream, seen: Seen) -> tuple[int, bytes]:
    response = await post(upstream)
    body = await response.read()
    assert response.at_end
    response.close()
    return response.status, body


ANSWERS: dict[str, tuple[bytes, int, bytes]] = {
    "a body with its length": (answer(b'{"a":1}'), 200, b'{"a":1}'),
    "an empty body": (answer(b""), 200, b""),
    "no body at all": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "chunks": (CHUNKED_HEAD + chunk(b"hel") + chunk(b"lo") + b"0\r\n\r\n", 200, b"hello"),
    "chunks and a trailer": (CHUNKED_HEAD + chunk(b"hi") + b"0\r\nx-sum: 1\r\nstatus: 500\r\n\r\n", 200, b"hi"),
    "a chunk with an extension": (CHUNKED_HEAD + b'2;sig="ab"\r\nhi\r\n0\r\n\r\n', 200, b"hi"),
    "chunk sizes in capitals and zeros": (CHUNKED_HEAD + b"00A\r\n0123456789\r\n000\r\n\r\n", 200, b"0123456789"),
    "a body until the close": (b"HTTP/1.1 200 OK\r\nx: y\r\n\r\nto the end", 200, b"to the end"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", 200, b"hi"),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nhi", 200, b"hi"),
    "an interim answer first": (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"hi"), 200, b"hi"),
    "two interim answers first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + answer(b"hi"),
        200,
        b"hi",
    ),
    "a refusal": (answer(b"no", status=b"429 Too Many Requests"), 429, b"no"),
    "a server's error": (answer(b"oh", status=b"500 Internal Server Error"), 500, b"oh"),
    "identity is no compression": (answer(b"hi", b"Content-Encoding: identity"), 200, b"hi"),
    "a header with an empty value": (answer(b"hi", b"x-empty:"), 200, b"hi"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_is_read_whole(client: Client, case: str) -> None:
    data, status, body = ANSWERS[case]
    assert client.run(always(data, close=True), whole) == (status, body)


FAILURES: dict[str, tuple[bytes, type[Retryable]]] = {
    "nothing": (b"", ConnectionLost),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", UpstreamFailed),
    "HTTP/0.9": (b"<html>hello</html>", UpstreamFailed),
    "a status that is none": (b"HTTP/1.1 abc OK\r\n\r\n", UpstreamFailed),
    "a status of two digits": (b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n", UpstreamFailed),
    "a length that is none": (b"HTTP/1.1 200 OK\r\ncontent-length: ten\r\n\r\n", UpstreamFailed),
    "a negative length": (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", UpstreamFailed),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi", UpstreamFailed),
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        UpstreamFailed,
    ),
    "a chunk size that is none": (CHUNKED_HEAD + b"zz\r\nhi\r\n0\r\n\r\n", UpstreamFailed),
    "a chunk longer than its size": (CHUNKED_HEAD + b"1\r\nhi\r\n0\r\n\r\n", UpstreamFailed),
    "a chunk size that overflows": (CHUNKED_HEAD + b"fffffffffffffffff\r\nhi\r\n", UpstreamFailed),
    "a switch of protocols": (b"HTTP/1.1 101 Switching\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", UpstreamFailed),
    "compression": (answer(b"\x1f\x8b", b"content-encoding: gzip"), UpstreamFailed),
    "an endless header": (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 400_000, UpstreamFailed),
    "headers without end": (b"HTTP/1.1 200 OK\r\n" + b"x: aaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 20_000, UpstreamFailed),
    "a body shorter than its length": (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", UpstreamFailed),
    "a chunk that breaks off": (CHUNKED_HEAD + b"9\r\nhi", UpstreamFailed),
    "chunks without the last": (CHUNKED_HEAD + chunk(b"hi"), UpstreamFailed),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_is_no_answer_is_a_failure_that_another_deployment_may_mend(client: Client, case: str) -> None:
    data, kind = FAILURES[case]

    async def fails(upstream: Upstream, seen: Seen) -> BaseException:
        with pytest.raises(Retryable) as error:
            await whole(upstream, seen)
        assert "127.0.0.1" not in error.value.message
        return error.value

    assert type(client.run(always(data, close=True), fails)) is kind


def test_a_request_is_sent_as_it_should_be(client: Client) -> None:
    async def sent(upstream: Upstream, seen: Seen) -> bytes:
        await (await post(upstream, b'{"x":1}')).read()
        return seen.requests[0].replace(seen.url[7:].encode(), b"HOST")

    head, _, body = client.run(always(answer()), sent).lower().partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first == b"post /v1/chat/completions http/1.1" and body == b'{"x":1}'
    assert sorted(lines) == [
        b"accept-encoding: identity",
        b"content-length: 7",
        b"content-type: application/json",
        b"host: host",
        b"x-request-id: r1",
    ]


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nx", "a\r", "a\r\n\r\nPOST /", "a\0"])
def test_a_header_of_several_lines_is_not_sent(client: Client, value: str) -> None:
    async def refused(upstream: Upstream, seen: Seen) -> int:
        with pytest.raises(UpstreamFailed):
            await upstream.post("/x", b"{}", {"authorization": value, "x-request-id": "r"}, 5.0)
        return len(seen.requests)

    assert client.run(always(answer()), refused) == 0


def test_headers_are_found_whatever_their_case(client: Client) -> None:
    async def headers(upstream: Upstream, seen: Seen) -> list[str | None]:
        response = await post(upstream)
        response.close()
        return [response.header(name) for name in ("retry-after", "content-type", "x-none")]

    data = answer(b"{}", b"Retry-After: 7", b"CONTENT-TYPE: text/event-stream; charset=utf-8")
    assert client.run(always(data), headers) == ["7", "text/event-stream; charset=utf-8", None]


def test_a_redirect_is_an_answer_and_goes_nowhere(client: Client) -> None:
    async def redirected(upstream: Upstream, seen: Seen) -> tuple[int, int]:
        return (await whole(upstream, seen))[0], len(seen.requests)

    assert client.run(always(answer(b"", b"location: /elsewhere", status=b"307 Temporary")), redirected) == (307, 1)


def test_nobody_listening_is_a_failed_connection(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def refused(_: Upstream, seen: Seen) -> None:
        async with client.open(url) as upstream:
            with pytest.raises(ConnectFailed):
                await post(upstream)
        async with client.open("http://no-such-host.invalid") as upstream:
            with pytest.raises(ConnectFailed):
                await post(upstream)

    client.run(always(b""), refused)


def test_a_handshake_that_never_ends_is_a_failed_connection(client: Client) -> None:
    async def stalled(_: Upstream, seen: Seen) -> str:
        url = seen.url.replace("http:", "https:")
        async with client.open(url, connect=0.05, authorities=ssl.create_default_context()) as upstream:
            with pytest.raises(ConnectFailed) as error:
                await post(upstream)
        return error.value.message

    async def silent(peer: Peer) -> None:
        await peer.reader.read()

    assert "in time" in client.run(silent, stalled)


@pytest.mark.parametrize("before", [b"", CHUNKED_HEAD, CHUNKED_HEAD + b"5\r\nhe"])
def test_a_silent_server_is_given_up(client: Client, before: bytes) -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.send(before)
        await peer.head()

    async def given_up(upstream: Upstream, seen: Seen) -> int:
        with pytest.raises(UpstreamTimeout):
            await (await post(upstream, silence=0.05)).read()
        await asyncio.wait_for(seen.left.wait(), 5)
        return seen.gone

    assert client.run(silent, given_up) == 1


def test_a_server_that_says_something_now_and_then_is_not_silent(client: Client) -> None:
    async def slow(peer: Peer) -> None:
        await peer.request()
        for byte in b"HTTP/1.1 200 OK\r\n":
            await peer.send(bytes([byte]))
        for piece in (b"transfer-encoding: chunked\r\n", b"\r\n", b"2\r\n", b"hi", b"\r\n0\r\n", b"\r\n"):
            await asyncio.sleep(0.05)
            await peer.send(piece)

    async def patient(upstream: Upstream, seen: Seen) -> bytes:
        return await (await post(upstream, silence=0.25)).read()

    assert client.run(slow, patient) == b"hi"


def test_without_a_bound_silence_is_the_callers_affair(client: Client) -> None:
    async def slow(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(0.1)
        await peer.send(answer(b"late"))

    async def patient(upstream: Upstream, seen: Seen) -> bytes:
        return await (await post(upstream, silence=None)).read()

    assert client.run(slow, patient) == b"late"


def test_chunks_that_have_come_are_handed_on_together(client: Client) -> None:
    events = [b"data: %d\n\n" % number for number in range(50)]

    async def read(upstream: Upstream, seen: Seen) -> list[bytes]:
        response = await post(upstream)
        await asyncio.sleep(0.05)
        pieces = []
        while piece := await response.some():
            pieces.append(piece)
        return pieces

    data = CHUNKED_HEAD + b"".join(map(chunk, events)) + b"0\r\n\r\n"
    assert client.run(always(data), read) == [b"".join(events)]


def test_a_connection_is_used_again_once_its_answer_was_whole(client: Client) -> None:
    async def thrice(upstream: Upstream, seen: Seen) -> int:
        for _ in range(3):
            await whole(upstream, seen)
        return seen.connections

    assert client.run(always(answer()), thrice) == 1
    assert client.run(always(CHUNKED_HEAD + chunk(b"hi") + b"0\r\n\r\n"), thrice) == 1
    assert client.run(always(answer(b"{}", b"connection: close")), thrice) == 3
    assert client.run(always(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi"), thrice) == 3


def test_what_comes_after_an_answer_is_never_the_answer_to_another_request(client: Client) -> None:
    async def twice(upstream: Upstream, seen: Seen) -> list[bytes]:
        return [(await whole(upstream, seen))[1] for _ in range(2)]

    for surplus in (answer(b"other"), b"HTT", b"HTTP/1.1 200 OK\r\nx: "):
        assert client.run(always(answer(b"mine") + surplus), twice) == [b"mine", b"mine"]


def test_an_answer_that_is_left_unread_closes_its_connection(client: Client) -> None:
    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED_HEAD + chunk(b"hi"))
        await peer.head()

    async def left(upstream: Upstream, seen: Seen) -> int:
        response = await post(upstream)
        response.close()
        response.close()
        assert not response.at_end
        await asyncio.wait_for(seen.left.wait(), 5)
        return seen.gone

    assert client.run(endless, left) == 1


@pytest.mark.parametrize("waiting_for", ["head", "some", "read"])
def test_whoever_is_cancelled_closes_the_connection_at_once(client: Client, waiting_for: str) -> None:
    async def stuck(peer: Peer) -> None:
        await peer.request()
        if waiting_for != "head":
            await peer.send(CHUNKED_HEAD + chunk(b"hi"))
        await peer.head()

    async def cancelled(upstream: Upstream, seen: Seen) -> int:
        async def call() -> None:
            response = await post(upstream, silence=60.0)
            if waiting_for == "read":
                await response.read()
            while True:
                await response.some()

        task = asyncio.create_task(call())
        await seen.asked.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(seen.left.wait(), 5)
        return seen.gone

    assert client.run(stuck, cancelled) == 1


def test_an_answer_to_half_a_request_counts_and_the_connection_is_not_used_again(client: Client) -> None:
    """A server may refuse a large request before it has read it."""

    async def hasty(peer: Peer) -> None:
        if await peer.head():
            await peer.send(answer(b"too large", status=b"413 Content Too Large"))
            await peer.head()

    async def refused(upstream: Upstream, seen: Seen) -> tuple[int, bytes, int]:
        response = await post(upstream, b"x" * 20_000_000)
        body = await response.read()
        response.close()
        await post(upstream)
        return response.status, body, seen.connections

    assert client.run(hasty, refused) == (413, b"too large", 2)


def test_a_hundred_requests_at_once_get_their_own_answers(client: Client) -> None:
    async def echo(peer: Peer) -> None:
        while request := await peer.request():
            await asyncio.sleep(0)
            body = request.partition(b"\r\n\r\n")[2]
            await peer.send(CHUNKED_HEAD + b"".join(map(chunk, [body[:2], body[2:]])) + b"0\r\n\r\n")

    async def many(upstream: Upstream, seen: Seen) -> tuple[list[bytes], int]:
        async def one(number: int) -> list[bytes]:
            return [await (await post(upstream, b"%06d-%d" % (number, turn))).read() for turn in range(5)]

        bodies = await asyncio.gather(*(one(number) for number in range(100)))
        return [body for few in bodies for body in few], seen.connections

    bodies, connections = client.run(echo, many)
    assert bodies == [b"%06d-%d" % (number, turn) for number in range(100) for turn in range(5)]
    assert connections <= 100


def test_a_server_that_resets_its_connection_fails_the_answer(client: Client) -> None:
    async def resetting(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED_HEAD + chunk(b"hi"))
        await asyncio.sleep(0.02)
        peer.reset()

    async def cut(upstream: Upstream, seen: Seen) -> None:
        response = await post(upstream)
        assert await response.some() == b"hi"
        with pytest.raises(UpstreamFailed):
            await response.some()

    client.run(resetting, cut)


def test_a_slow_reader_slows_the_server_down(client: Client) -> None:
    piece, pieces = b"x" * 100_000, 160
    sent = 0

    async def eager(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        peer.writer.transport.set_write_buffer_limits(0)
        await peer.send(CHUNKED_HEAD)
        for _ in range(pieces):
            await peer.send(chunk(piece))
            sent += len(piece)
        await peer.send(b"0\r\n\r\n")

    async def slowly(upstream: Upstream, seen: Seen) -> tuple[int, int]:
        response = await post(upstream, silence=0.2)
        await asyncio.sleep(0.4)  # longer than the server may be silent: it is not the server who is
        unread, size = sent, 0
        while data := await response.some():
            size += len(data)
        return unread, size

    unread, size = client.run(eager, slowly)
    assert unread < pieces * len(piece) // 2  # the rest of it lies in the kernel's buffers
    assert size == pieces * len(piece)


def test_a_request_that_takes_long_to_send_is_no_silence_of_the_server(client: Client) -> None:
    size = 8_000_000  # more than both kernels hold

    async def slow_reader(peer: Peer) -> None:
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        await peer.head()
        for _ in range(35):
            await asyncio.sleep(0.02)
            await peer.reader.readexactly(20_000)
        await peer.reader.readexactly(size - 35 * 20_000)
        await peer.send(answer(b"done"))

    async def large(upstream: Upstream, seen: Seen) -> bytes:
        return await (await post(upstream, b"x" * size, silence=0.5)).read()

    assert client.run(slow_reader, large) == b"done"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 and localhost; its key lies beside it."""
    path = tmp_path_factory.mktemp("tls") / "server.crt"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*openssl, *names, "-keyout", f"{path}.key", "-out", path], check=True, capture_output=True)
    return path


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, f"{certificate}.key")
    return context


def test_https_checks_the_certificate_names_the_host_and_keeps_the_connection(
    client: Client, certificate: Path
) -> None:
    named: list[str | None] = []
    server = server_context(certificate)
    server.sni_callback = lambda _, name, __: named.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def ask(mistrusting: Upstream, seen: Seen) -> int:
        with pytest.raises(ConnectFailed):
            await post(mistrusting)
        before = seen.connections
        async with client.open(seen.url.replace("127.0.0.1", "localhost"), authorities=trusting) as upstream:
            for _ in range(2):
                assert await whole(upstream, seen) == (200, b"{}")
        return seen.connections - before

    assert client.run(always(answer()), ask, tls=server, authorities=ssl.create_default_context()) == 1
    assert named == [None, "localhost"]  # an address is no name


@pytest.mark.parametrize("waiting_for", ["handshake", "head", "some"])
def test_a_cancelled_call_over_https_leaves_nothing_open(client: Client, certificate: Path, waiting_for: str) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def stuck(peer: Peer) -> None:
        if waiting_for == "handshake":
            await peer.reader.readexactly(1)
            peer.seen.asked.set()
            await peer.reader.read()
            peer.seen.left.set()
            return
        await peer.request()
        if waiting_for == "some":
            await peer.send(CHUNKED_HEAD)
        await peer.head()

    async def cancelled(_: Upstream, seen: Seen) -> None:
        async with client.open(seen.url.replace("http:", "https:"), authorities=trusting) as upstream:

            async def call() -> None:
                await (await post(upstream, silence=60.0)).some()

            task = asyncio.create_task(call())
            await seen.asked.wait()
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(seen.left.wait(), 5)

    tls = None if waiting_for == "handshake" else server_context(certificate)
    client.run(stuck, cancelled, tls=tls, authorities=trusting)


def test_on_premises_the_environment_is_trusted_in_nothing(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is self-signed. An environment that trusts it must count for a cloud zone alone."""

    async def status(zone: str, **declared: Any) -> int:
        async with serving(always(answer()), tls=server_context(certificate)) as seen:
            one = deployment("it", zone=zone, urls=(seen.url,), **declared)
            upstream = upstream_of(one, authorities_of(one), Replica(one.urls[0]))
            try:
                return (await post(upstream)).status
            finally:
                await upstream.close()

    assert asyncio.run(status("on_premises", ca_file=str(certificate))) == 200
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert asyncio.run(status("us_cloud")) == 200
    with pytest.raises(ConnectFailed):
        asyncio.run(status("on_premises"))


@pytest.mark.parametrize(("name", "known"), [("localhost", True), ("engines.example", False)])
def test_a_replica_must_prove_to_be_what_its_address_in_the_file_says(
    name: str, known: bool, certificate: Path
) -> None:
    """The certificate is for localhost and 127.0.0.1: the IP address to which we connect does not count."""
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def asked() -> bytes:
        async with serving(always(answer()), tls=server_context(certificate)) as seen:
            url = seen.url.replace("127.0.0.1", name)
            upstream = Http1Upstream(url, connect=2.0, authorities=trusting, address="127.0.0.1")
            try:
                response = await post(upstream)
                assert response.status == 200
                return seen.requests[0]
            finally:
                await upstream.close()

    if known:
        assert b"\r\nhost: localhost:" in asyncio.run(asked())
    else:
        with pytest.raises(ConnectFailed, match="cannot be reached"):
            asyncio.run(asked())


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_nothing_is_sent_outside_of_the_networks(address: str | None) -> None:
    async def asked(*networks: str) -> int:
        async with serving(always(answer())) as seen:
            upstream = Http1Upstream(seen.url, connect=2.0, address=address, within=Networks(networks))
            try:
                return (await post(upstream)).status
            finally:
                await upstream.close()
                assert seen.connections == ("127.0.0.0/8" in networks)

    assert asyncio.run(asked("10.0.0.0/8", "127.0.0.0/8")) == 200
    with pytest.raises(ConnectFailed, match="outside of its networks"):
        asyncio.run(asked("10.0.0.0/8"))


def test_a_client_that_is_retired_lets_what_is_under_way_end_and_keeps_no_connection() -> None:
    async def slow(peer: Peer) -> None:
        while await peer.request():
            await peer.send(CHUNKED_HEAD + chunk(b"a"))
            await asyncio.sleep(0.05)
            await peer.send(chunk(b"b") + chunk(b""))

    async def run() -> None:
        async with serving(slow) as seen:
            upstream = Http1Upstream(seen.url, connect=2.0)
            idle, running = await post(upstream), await post(upstream)
            assert await idle.read() == b"ab"
            running = await post(upstream)
            upstream.retire()
            rest = [upstream.at_rest]
            assert await running.read() == b"ab"
            await asyncio.sleep(0.05)
            assert [*rest, upstream.at_rest] == [False, True]
            await upstream.close()

    asyncio.run(run())
