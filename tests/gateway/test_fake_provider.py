"""The fake providers: what they say, how they misbehave on command, and what they remember."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.demo.formats import FORMATS, Format, Reply, ToolCall
from gateway.demo.providers import Behaviour, FakeProviders, reply_to, serving

BODY = {"model": "m", "max_tokens": 40, "messages": [{"role": "user", "content": "hello"}]}
PATHS = [made.path for made in FORMATS]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}


def choices_arguments(event: dict[str, Any]) -> str:
    calls = [call for choice in event["choices"] for call in choice["delta"].get("tool_calls", [])]
    return "".join(call["function"].get("arguments", "") for call in calls)


def cohere_arguments(event: dict[str, Any]) -> str:
    if event["type"] != "tool-call-delta":
        return ""
    return str(event["delta"]["message"]["tool_calls"]["function"]["arguments"])


ARGUMENTS: dict[str, Any] = {
    "openai": choices_arguments,
    "mistral": choices_arguments,
    "anthropic": lambda event: event.get("delta", {}).get("partial_json", ""),
    "cohere": cohere_arguments,
}


def by_name(name: str) -> Format:
    return next(made for made in FORMATS if made.name == name)


def data_of(events: list[bytes]) -> list[dict[str, Any]]:
    lines = b"".join(events).split(b"\n")
    return [orjson.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


@pytest.mark.parametrize(
    ("name", "text_of"),
    [
        ("openai", lambda body: body["choices"][0]["message"]["content"]),
        ("mistral", lambda body: body["choices"][0]["message"]["content"]),
        ("anthropic", lambda body: body["content"][0]["text"]),
        ("cohere", lambda body: body["message"]["content"][0]["text"]),
    ],
)
def test_a_plain_answer_holds_the_text_where_its_provider_puts_it(name: str, text_of: Any) -> None:
    reply = Reply("m", ("one", " two"), "stop", 3)
    assert text_of(by_name(name).plain(reply)) == "one two"


@pytest.mark.parametrize(
    ("name", "pieces_of"),
    [
        ("openai", lambda event: [c["delta"].get("content") for c in event["choices"]]),
        ("mistral", lambda event: [c["delta"].get("content") for c in event["choices"]]),
        ("anthropic", lambda event: [event.get("delta", {}).get("text")]),
        ("cohere", lambda event: [event.get("delta", {}).get("message", {}).get("content", {}).get("text")]),
    ],
)
def test_the_pieces_of_a_stream_are_the_text_of_the_plain_answer(name: str, pieces_of: Any) -> None:
    reply = Reply("m", ("one", " two", " three"), "stop", 3, include_usage=True)
    events = data_of(by_name(name).events(reply))
    texts = [pieces_of(event) for event in events if event.get("type") not in ("message-start",)]
    assert "".join(piece for pieces in texts for piece in pieces if piece) == "one two three"


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.name)
def test_a_tool_call_is_whole_in_a_stream(wire: Format) -> None:
    """Name and arguments are found in the stream of every provider, the arguments possibly in parts."""
    call = ToolCall("weather", '{"city":"Paris"}')
    reply = Reply("m", (), "tool", 3, call)
    raw = b"".join(wire.events(reply))
    assert b'"weather"' in raw
    assert "".join(ARGUMENTS[wire.name](event) for event in data_of(wire.events(reply))) == call.arguments


@pytest.mark.parametrize(
    ("provider", "status", "code", "place"),
    [
        ("openai", 429, None, lambda body: body["error"]["code"] == "rate_limit_exceeded"),
        ("openai", 400, "context_length_exceeded", lambda body: "maximum context length" in body["error"]["message"]),
        ("anthropic", 529, None, lambda body: body["error"]["type"] == "overloaded_error"),
        ("anthropic", 401, None, lambda body: body["error"]["type"] == "authentication_error"),
        ("mistral", 401, None, lambda body: body == {"detail": "no"}),
        ("mistral", 500, None, lambda body: body["object"] == "error"),
        ("cohere", 500, None, lambda body: body["message"] == "no"),
    ],
)
def test_errors_have_the_shape_of_their_provider(provider: str, status: int, code: str | None, place: Any) -> None:
    assert place(by_name(provider).error(status, "no", code))


@pytest.mark.parametrize(
    ("provider", "body", "status"),
    [
        ("openai", {"messages": []}, 400),
        ("anthropic", {"messages": [{"role": "user", "content": "hi"}]}, 400),
        ("mistral", BODY | {"logit_bias": {}}, 422),
        ("cohere", {}, 400),
    ],
)
def test_a_provider_refuses_what_the_real_one_refuses(provider: str, body: dict[str, Any], status: int) -> None:
    refusal = by_name(provider).refusal(body)
    assert refusal is not None
    assert refusal[0] == status


@pytest.mark.parametrize(
    ("more", "finish", "tokens"),
    [({}, "stop", 11), ({"max_tokens": 3}, "length", 3), ({"max_tokens": 11}, "stop", 11)],
)
def test_an_answer_ends_at_max_tokens(more: dict[str, Any], finish: str, tokens: int) -> None:
    reply = reply_to(BODY | more, "openai", None)
    assert (reply.finish, reply.completion_tokens) == (finish, tokens)


@pytest.mark.parametrize("chunks", [1, 5, 50])
def test_the_number_of_pieces_can_be_chosen(chunks: int) -> None:
    assert len(reply_to({"model": "m", "messages": []}, "openai", chunks).pieces) == chunks


@pytest.mark.parametrize(
    ("asked", "called"), [("use the tool", True), ("the weather please", True), ("hello", False), ("", False)]
)
def test_a_tool_is_called_when_the_last_message_asks_for_it(asked: str, called: bool) -> None:
    body = {"model": "m", "tools": [TOOL], "messages": [{"role": "user", "content": asked}]}
    assert (reply_to(body, "openai", None).call is not None) is called


def test_the_official_openai_client_reads_both_forms() -> None:
    """A client that is not ours takes the plain answer and the stream, and both say the same."""

    async def scenario() -> None:
        async with (
            serving(FakeProviders()) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
        ):
            messages: Any = BODY["messages"]
            plain = await client.chat.completions.create(model="m", messages=messages)
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert plain.choices[0].message.content == "".join(pieces)
            assert plain.usage is not None
            assert plain.usage.completion_tokens == 11

    asyncio.run(scenario())


@pytest.mark.parametrize("path", PATHS)
def test_every_request_is_remembered_with_its_body(path: str) -> None:
    async def scenario() -> None:
        app = FakeProviders()
        async with serving(app) as url, httpx.AsyncClient(base_url=url, verify=False) as client:
            await client.post(path, json=BODY, headers={"authorization": "Bearer k"})
            await client.post(path, content=b"\xff not json")
            log = (await client.get("/_log")).json()
            assert log["requests"][0]["body"] == BODY
            assert log["requests"][0]["headers"]["authorization"] == "Bearer k"
            assert (log["received"], log["in_flight"], log["disconnects"]) == (2, 0, 0)
            await client.delete("/_log")
            assert (await client.get("/_log")).json()["received"] == 0

    asyncio.run(scenario())


def test_behaviours_are_used_once_each_and_then_the_standing_one() -> None:
    """The queue comes first, in order; one provider's orders do not touch another."""

    async def scenario() -> None:
        async with serving(FakeProviders()) as url, httpx.AsyncClient(base_url=url, verify=False) as client:
            order = {"provider": "openai", "queue": [{"status": 500}, {"status": 429, "retry_after": "7"}]}
            assert (await client.post("/_control", json=order | {"always": {"status": 503}})).status_code == 204
            answers = [await client.post("/v1/chat/completions", json=BODY) for _ in range(4)]
            assert [one.status_code for one in answers] == [500, 429, 503, 503]
            assert answers[1].headers["retry-after"] == "7"
            assert "retry-after" not in answers[0].headers
            assert (await client.post("/v1/messages", json=BODY)).status_code == 200
            await client.delete("/_control")
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200

    asyncio.run(scenario())


def test_an_order_that_cannot_be_read_is_refused_with_its_place() -> None:
    async def scenario() -> None:
        async with serving(FakeProviders()) as url, httpx.AsyncClient(base_url=url, verify=False) as client:
            answer = await client.post("/_control", json={"queue": [{"fault": "explode"}], "often": True})
            assert answer.status_code == 400
            assert {one["field"] for one in answer.json()["error"]} == {"queue.0.fault", "often"}

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(
    ("fault", "seen"),
    [("reset", httpx.TransportError), ("cut", None), ("malformed", None), ("content_type", None)],
)
def test_a_fault_strikes_after_the_events_that_were_ordered(fault: Any, seen: Any, after: int) -> None:
    async def scenario() -> None:
        app = FakeProviders(Behaviour(fault=fault, after=after))
        async with serving(app) as url, httpx.AsyncClient(base_url=url, verify=False) as client:
            received = b""
            try:
                async with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as answer:
                    async for block in answer.aiter_bytes():
                        received += block
            except httpx.TransportError as error:
                assert seen is not None, error
            else:
                assert seen is None
                assert b"[DONE]" not in received
            whole = [event for event in received.split(b"\n\n") if event.startswith(b"data: ") and event.endswith(b"}")]
            assert len(whole) <= after if fault == "reset" else len(whole) == after

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "behaviour", [Behaviour(fault="silence"), Behaviour(fault="silence", after=2), Behaviour(delay=3600)]
)
def test_a_client_that_goes_away_is_counted_at_once(behaviour: Behaviour) -> None:
    async def scenario() -> None:
        app = FakeProviders(behaviour)
        async with serving(app) as url:
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            raw = orjson.dumps(BODY | {"stream": True})
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw
            )
            await app.until(lambda app: app.in_flight == 1)
            if behaviour.after:
                await reader.readuntil(b"data: ")
            writer.close()
            async with asyncio.timeout(10):
                await app.until(lambda app: app.in_flight == 0)
            assert (app.disconnects, app.in_flight, app.received) == (1, 0, 1)

    asyncio.run(scenario())
