"""The gateway as its users meet it: a real server, the official client, fake providers behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.policy import Policy
from gateway.settings import Settings
from gateway.types import Deployment, Price, Timeouts
from tests.fakes import CARD, deployment, policy
from tests.running import Running, running

SECRET = "zebra-crossing-7741"
KEY = "sk-upstream-0123456789"


class World:
    """A gateway with two relayed deployments: `home` on premises and `cloud`, each a fake provider of its own."""

    def __init__(self, gateway: Running, home: FakeProviders, cloud: FakeProviders) -> None:
        self.gateway, self.home, self.cloud = gateway, home, cloud
        self.http, self.openai = gateway.http, gateway.openai

    async def ask(self, text: str = "hi", stream: bool = False, **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        return await self.openai.chat.completions.create(model="auto", messages=messages, stream=stream, **more)

    async def text(self, text: str = "hi", **more: Any) -> str:
        stream = await self.ask(text, stream=True, **more)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - what is awaited happens in a server, without an event
                await asyncio.sleep(0.005)


@asynccontextmanager
async def world(settings: Settings | None = None, **of_home: Any) -> AsyncIterator[World]:
    home, cloud = FakeProviders(), FakeProviders()
    async with serving(home) as home_url, serving(cloud) as cloud_url:

        def relayed(name: str, zone: str, url: str, **more: Any) -> Deployment:
            price = Price(10.0, 20.0)
            return deployment(name, zone=zone, urls=(f"{url}/v1",), api_key=KEY, price=price, window=None, **more)

        made: Policy = policy(
            [relayed("home", "on_premises", home_url, **of_home), relayed("cloud", "us_cloud", cloud_url)],
            order_by="listed",
        )
        async with running(made, settings) as gateway:
            yield World(gateway, home, cloud)


def in_world(test: Callable[[World], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with world(**options) as w:
            await test(w)

    asyncio.run(run())


def test_the_official_client_gets_plain_and_streamed_answers_and_usage() -> None:
    async def check(w: World) -> None:
        plain = await w.ask()
        assert plain.choices[0].message.content == await w.text() != ""
        assert plain.usage.completion_tokens > 0
        chunks = [c async for c in await w.ask(stream=True, stream_options={"include_usage": True})]
        assert chunks[-1].usage.completion_tokens > 0 and chunks[-1].usage.cost_usd > 0
        without = [c async for c in await w.ask(stream=True)]
        assert all(c.usage is None for c in without)
        assert [line["completion_tokens"] > 0 for line in w.gateway.log.lines] == [True] * 4

    in_world(check)


def test_fifty_at_once_are_all_answered() -> None:
    async def check(w: World) -> None:
        answers = await asyncio.gather(*(w.text() for _ in range(25)), *(w.ask() for _ in range(25)))
        assert all(answers) and w.home.received == 50 and w.home.in_flight == 0

    in_world(check)


def test_unknown_fields_are_forwarded_and_the_callers_credentials_are_not() -> None:
    async def check(w: World) -> None:
        await w.ask(extra_body={"vendor_option": {"a": 1}}, extra_headers={"x-api-key": "sk-caller"})
        (seen,) = w.home.log
        assert seen.body["vendor_option"] == {"a": 1} and seen.body["model"] == "home-model"
        assert seen.headers["authorization"] == f"Bearer {KEY}" and "sk-caller" not in repr(seen.headers)

    in_world(check)


def test_of_two_bounds_on_the_answer_the_smaller_is_sent_under_both_names() -> None:
    async def check(w: World) -> None:
        await w.ask(max_tokens=50, extra_body={"max_completion_tokens": 20})
        assert (w.home.log[0].body["max_tokens"], w.home.log[0].body["max_completion_tokens"]) == (20, 20)

    in_world(check)


def test_a_deployment_that_finds_the_prompt_too_long_says_so_in_our_words() -> None:
    async def check(w: World) -> None:
        w.home.behave(always=Behaviour(status=400, message="too many tokens", code="context_length_exceeded"))
        with pytest.raises(openai.BadRequestError) as caught:
            await w.ask()
        assert caught.value.code == "context_length_exceeded"

    in_world(check)


def test_the_decision_is_in_the_headers_and_a_given_request_id_is_kept() -> None:
    async def check(w: World) -> None:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        answer = await w.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1" and w.home.log[0].headers["x-request-id"] == "mine-1"
        assert answer.headers["x-hybridgate-deployment"] == "home"
        assert answer.headers["content-length"] == str(len(answer.content))
        streamed = await w.http.post("/v1/chat/completions", json={**body, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["x-hybridgate-cost-usd"] and streamed.text.endswith("data: [DONE]\n\n")

    in_world(check)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(status=500),
        Behaviour(status=429),
        Behaviour(status=429, retry_after="1"),
        Behaviour(status=401),
        Behaviour(status=404),
        Behaviour(status=307),
        Behaviour(fault="reset"),
        Behaviour(fault="cut"),
        Behaviour(fault="malformed"),
        Behaviour(fault="content_type"),
        Behaviour(fault="silence"),
    ],
    ids=lambda b: f"{b.status or b.fault}{'-wait' if b.retry_after else ''}",
)
def test_a_deployment_that_fails_before_its_first_token_is_replaced(behaviour: Behaviour, stream: bool) -> None:
    async def check(w: World) -> None:
        w.home.behave(always=behaviour)
        body = {"messages": [{"role": "user", "content": SECRET}], "stream": stream}
        answer = await w.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200 and answer.headers["x-hybridgate-deployment"] == "cloud"
        assert answer.headers["x-hybridgate-attempts"] == "2" and w.cloud.received == 1
        assert SECRET not in repr(w.gateway.log.lines) and KEY not in repr(w.gateway.log.lines)

    in_world(check, timeouts=Timeouts(first_token=0.5, total=0.5))


@pytest.mark.parametrize("fault", ["reset", "cut", "malformed", "silence"])
def test_a_stream_that_breaks_after_its_first_token_is_an_error_in_the_official_client(fault: Any) -> None:
    async def check(w: World) -> None:
        w.home.behave(always=Behaviour(fault=fault, after=3, chunks=8, chunk_delay=0.02))
        seen: list[Any] = []
        with pytest.raises(openai.APIError):
            async for part in await w.ask(stream=True):
                seen.append(part)
        assert seen and w.cloud.received == 0
        assert w.gateway.log.lines[-1]["outcome"] == "cut"

    in_world(check, timeouts=Timeouts(idle=0.5, first_token=0.5))


def test_a_refusal_by_the_deployment_reaches_the_caller_and_is_not_tried_elsewhere() -> None:
    async def check(w: World) -> None:
        w.home.behave(always=Behaviour(status=400, message="temperature and top_p exclude each other"))
        with pytest.raises(openai.BadRequestError, match="exclude each other"):
            await w.ask()
        assert w.cloud.received == 0

    in_world(check)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_client_that_disconnects_ends_the_upstream_request(stream: bool) -> None:
    async def check(w: World) -> None:
        w.home.behave(always=Behaviour(delay=0 if stream else 30, chunk_delay=0.02, chunks=2000))
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        async with httpx.AsyncClient(base_url=w.gateway.url, timeout=60) as leaving:
            request = leaving.build_request("POST", "/v1/chat/completions", json=body)
            if stream:
                answer = await leaving.send(request, stream=True)
                await anext(answer.aiter_bytes())
                await answer.aclose()
            else:
                sending = asyncio.create_task(leaving.send(request))
                await w.until(lambda: w.home.in_flight == 1)
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            await w.until(lambda: w.home.disconnects == 1 and w.home.in_flight == 0)
        await w.until(lambda: bool(w.gateway.log.lines))
        assert w.gateway.log.lines[-1]["outcome"] == "client_gone"
        w.home.behave()
        assert (await w.ask()).choices

    in_world(check)


def test_private_data_with_no_way_home_is_refused_and_the_cloud_sees_nothing() -> None:
    async def check(w: World) -> None:
        w.home.behave(always=Behaviour(fault="reset"))
        with pytest.raises(openai.InternalServerError) as caught:
            await w.ask(f"my card is {CARD}")
        assert caught.value.status_code == 503 and "private stays home" in caught.value.message
        assert w.cloud.received == 0 and "4111" not in caught.value.message
        assert "4111" not in repr(w.gateway.log.lines)

    in_world(check)


def test_route_tells_the_decision_and_calls_nothing() -> None:
    async def check(w: World) -> None:
        body = {"messages": [{"role": "user", "content": CARD}]}
        told = (await w.http.post("/v1/route", json=body)).json()
        assert told["deployment"] == "home" and told["labels"] == ["personal"]
        assert told["rejections"][0]["deployment"] == "cloud" and told["rejections"][0]["gate"] == "zone"
        assert "4111" not in orjson.dumps(told).decode()
        assert (await w.http.post("/v1/route", content=b"[]")).status_code == 400
        assert w.home.received == 0 == w.cloud.received

    in_world(check)


def test_models_and_states_are_listed() -> None:
    async def check(w: World) -> None:
        assert {m.id async for m in await w.openai.models.list()} == {"auto", "home", "cloud"}
        assert (await w.openai.models.retrieve("auto")).id == "auto"
        assert (await w.http.get("/v1/models/none")).status_code == 404
        assert (await w.http.get("/livez")).json() == {"status": "live"}
        state = (await w.http.get("/readyz")).json()
        assert state["status"] == "ready" and state["policy"]["hash"] == "0123456789ab"

    in_world(check)


GOOD = {"messages": [{"role": "user", "content": SECRET}]}


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", b"{" + SECRET.encode(), 400, "invalid_value"),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", b'{"messages": "\xff"}', 400, "invalid_value"),
        ("POST", "/v1/chat/completions", orjson.dumps({"messages": []}), 400, "invalid_value"),
        ("POST", "/v1/chat/completions", orjson.dumps({"model": SECRET}), 400, "invalid_value"),
        ("POST", "/v1/chat/completions", orjson.dumps({**GOOD, "max_tokens": -1}), 400, "invalid_value"),
        ("POST", "/v1/chat/completions", orjson.dumps({**GOOD, "temperature": 9}), 400, "invalid_value"),
        ("POST", "/v1/chat/completions", orjson.dumps({**GOOD, "model": SECRET}), 404, "model_not_found"),
        ("POST", "/v1/chat/completions", b"x" * 20_000, 413, "request_too_large"),
        ("GET", "/v1/chat/completions", b"", 405, "method_not_allowed"),
        ("POST", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/", b"", 404, "not_found"),
    ],
)
def test_bad_input_gets_an_error_in_openais_shape_and_harms_nothing(
    method: str, path: str, content: bytes, status: int, code: str
) -> None:
    async def check(w: World) -> None:
        answer = await w.http.request(method, path, content=content)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code) and set(error) == {
            "message",
            "type",
            "param",
            "code",
        }
        assert answer.headers["x-request-id"]
        assert SECRET not in answer.text and SECRET not in repr(w.gateway.log.lines)
        assert (await w.ask()).choices

    in_world(check, settings=Settings(max_body_bytes=10_000, drain_seconds=1.0))


def test_a_body_of_unknown_length_is_refused_before_it_is_read_whole() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b"x" * 10_000

    async def check(w: World) -> None:
        with suppress(httpx.TransportError):  # the connection is closed under a client that does not stop
            await w.http.post("/v1/chat/completions", content=endless())
        assert sent < 5_000
        answer = await w.http.post("/v1/chat/completions", content=b"x" * 150_000)
        assert answer.status_code == 413
        assert (await w.ask()).choices

    in_world(check, settings=Settings(max_body_bytes=100_000, drain_seconds=1.0))


def test_an_on_premises_deployment_is_reached_directly_whatever_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(w: World) -> None:
        assert (await w.ask(CARD)).choices and w.home.received == 1

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    in_world(lambda w: check(World(w.gateway, w.home, w.cloud)))


async def _raw(w: World, *parts: bytes) -> bytes:
    """What the gateway answers to these bytes, until it closes the connection or has said nothing for a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(w.gateway.url.rsplit(":", 1)[1]))
    got = b""
    with suppress(TimeoutError, ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
        while data := await asyncio.wait_for(reader.read(65_536), 1.0):
            got += data
    writer.close()
    return got


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([f"{SECRET}\r\n\r\n".encode()], b"400", "invalid_value"),
        (["GET /über HTTP/1.1\r\nhost: x\r\n\r\n".encode()], b"400", "invalid_value"),
        ([b"POST /v1/route HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n"], b"400", "invalid_value"),
        ([b"GET / HTTP/1.1\r\n", *[b"x-many: " + b"a" * 8000 + b"\r\n"] * 2000], b"431", "headers_too_large"),
        ([b"GET / HTTP/1.1\r\nx-long: ", *[b"a" * 8000] * 2000], b"431", "headers_too_large"),
        (
            [
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\n",
                b"upgrade: h2c\r\nhttp2-settings: AAMA\r\ncontent-length: 2\r\n\r\n",
            ],
            b"400",
            "invalid_value",
        ),
    ],
    ids=["no HTTP", "no ASCII", "no length", "many headers", "a long header", "HTTP/2"],
)
def test_what_is_no_request_is_answered_in_openais_shape_and_harms_nothing(
    parts: list[bytes], status: bytes, code: str
) -> None:
    async def check(w: World) -> None:
        answer = await _raw(w, *parts)
        if answer or len(parts) < 10:  # a client that goes on sending may be reset before it has read
            assert answer.split()[1] == status and f'"{code}"'.encode() in answer
        assert SECRET.encode() not in answer and (await w.ask()).choices

    in_world(check)


def test_headers_of_a_usual_size_are_taken_however_they_arrive() -> None:
    async def check(w: World) -> None:
        body = orjson.dumps(GOOD)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 30_000
        parts = [head, b"\r\ncontent-length: %d\r\n" % len(body), b"\r\n" + body]
        assert (await _raw(w, *parts, *parts)).count(b"HTTP/1.1 200 OK") == 2

    in_world(check)


def test_a_refusal_that_quotes_our_key_or_an_address_is_passed_on_without_them() -> None:
    async def check(w: World) -> None:
        w.home.behave(always=Behaviour(status=400, message=f"bad key {KEY} at http://10.0.0.1:8000/v1 for this model"))
        with pytest.raises(openai.BadRequestError, match="for this model") as caught:
            await w.ask()
        assert KEY not in caught.value.message and "10.0.0.1" not in caught.value.message

    in_world(check)
