"""Cloud providers through litellm, against the fake providers over real sockets."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import httpx
import orjson
import pytest

from gateway.backends.base import Call, Chunk
from gateway.backends.cloud import PARAMETERS, CloudAnswer, CloudBackend, CloudLibrary
from gateway.backends.cloud_errors import COUNTERPARTS, MAX_MESSAGE, names, translate
from gateway.backends.cohere_stream import rewritten
from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.errors import (
    ConnectFailed,
    Retryable,
    UpstreamCut,
    UpstreamError,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
)
from gateway.types import ChatRequest, Deployment, Price, Timeouts, Usage

# litellm ignores these warnings of pydantic about itself when it is imported; pytest starts every test afresh.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ReadOnly. qualifier"),
    pytest.mark.filterwarnings("ignore:.*attribute on the instance is deprecated"),
    pytest.mark.filterwarnings("ignore:.*conflict with protected namespace"),
]

KEY = "sk-verysecret-0123456789abcdef"
PROMPT = "The launch code of the garden gnome"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PATIENT = Timeouts(connect=20.0, first_token=30.0, idle=30.0, total=60.0)


@dataclass(frozen=True)
class Provider:
    """A provider as a deployment names it. `path`: what its `api_base` has after the host."""

    name: str
    model: str
    path: str

    def deployment(self, url: str, **changed: Any) -> Deployment:
        declared = Deployment(
            name=f"{self.name}-cloud",
            backend="litellm",
            model=self.model,
            zone="us_cloud",
            api_key=KEY,
            api_base=url + self.path,
            price=Price(1000.0, 2000.0),
            timeouts=PATIENT,
        )
        return replace(declared, **changed)


OPENAI = Provider("openai", "openai/gpt-4o-mini", "/v1")
ANTHROPIC = Provider("anthropic", "anthropic/claude-sonnet-4-20250514", "")
MISTRAL = Provider("mistral", "mistral/mistral-small-latest", "/mistral/v1")
COHERE = Provider("cohere", "cohere_chat/command-r-plus-08-2024", "/v2/chat")
PROVIDERS = (OPENAI, ANTHROPIC, MISTRAL, COHERE)

every_provider = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
both_forms = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def call(text: str = PROMPT, *, stream: bool = False, include_usage: bool = False, **more: Any) -> Call:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], "stream": stream, **more}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    chat = ChatRequest(
        body=body,
        model="auto",
        stream=stream,
        include_usage=include_usage,
        max_tokens=more.get("max_tokens"),
        n=1,
        tools="tools" in more,
        images=False,
        schema=False,
        texts=(text,),
        parts=frozenset(),
    )
    return Call(chat, "request-1", prompt_tokens=9)


@asynccontextmanager
async def cloud(
    provider: Provider, behaviour: Behaviour | None = None, **changed: Any
) -> AsyncIterator[tuple[CloudBackend, FakeProviders]]:
    """A backend and the fake providers that it calls."""
    app = FakeProviders(behaviour)
    async with serving(app) as url:
        backend = CloudBackend(provider.deployment(url, **changed), CloudLibrary())
        try:
            yield backend, app
        finally:
            await backend.close()


async def read(answer: CloudAnswer) -> list[Chunk]:
    try:
        return [chunk async for chunk in answer]
    finally:
        await answer.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def events(chunks: list[Chunk]) -> list[dict[str, Any]]:
    lines = b"".join(chunk.data for chunk in chunks).split(b"\n\n")
    return [orjson.loads(line[6:]) for line in lines if line and line != b"data: [DONE]"]


def text_of(chunks: list[Chunk]) -> str:
    deltas = [choice["delta"] for event in events(chunks) for choice in event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


# Answers


@every_provider
def test_a_plain_answer_is_one_chunk_of_openai_wire(provider: Provider) -> None:
    async def scenario() -> None:
        async with cloud(provider) as (backend, _):
            [chunk] = await read(await backend.open(call()))
            body = orjson.loads(chunk.data)
            assert body["object"] == "chat.completion"
            assert body["model"] == provider.model.partition("/")[2]
            assert body["choices"][0]["message"]["content"].startswith(f"{provider.name} {body['model']} answers:")
            assert body["choices"][0]["finish_reason"] == "stop"
            assert chunk.last
            assert chunk.usage == Usage(8, 11)
            assert body["usage"]["cost_usd"] == pytest.approx(8 * 1e-6 + 11 * 2e-6)
            assert "provider_specific_fields" not in str(body)

    run(scenario)


@every_provider
def test_a_stream_says_what_the_plain_answer_says_and_proves_its_end(provider: Provider) -> None:
    async def scenario() -> None:
        async with cloud(provider) as (backend, app):
            [plain] = await read(await backend.open(call()))
            chunks = await read(await backend.open(call(stream=True)))
            assert text_of(chunks) == orjson.loads(plain.data)["choices"][0]["message"]["content"]
            assert len(chunks) == 13  # eleven words, the finish, the end
            assert chunks[-1].data == b"data: [DONE]\n\n"
            assert [chunk.last for chunk in chunks] == [False] * 12 + [True]
            assert [chunk.usage for chunk in chunks] == [None] * 12 + [Usage(8, 11)]
            assert [bool(received.body.get("stream")) for received in app.log] == [False, True]
            finish = [choice["finish_reason"] for event in events(chunks) for choice in event["choices"]]
            assert finish == [None] * (len(finish) - 1) + ["stop"]

    run(scenario)


@every_provider
def test_the_first_chunk_of_a_stream_holds_a_token(provider: Provider) -> None:
    """What only opens the answer waits for the first word, so that a failure before it can still go elsewhere."""

    async def scenario() -> None:
        async with cloud(provider) as (backend, _):
            chunks = await read(await backend.open(call(stream=True)))
            assert text_of(chunks[:1]) == provider.name
            assert events(chunks[:1])[0]["choices"][0]["delta"]["role"] == "assistant"

    run(scenario)


@every_provider
@pytest.mark.parametrize("asked", [False, True])
def test_the_usage_event_is_passed_on_only_where_it_was_asked_for(provider: Provider, asked: bool) -> None:
    async def scenario() -> None:
        async with cloud(provider) as (backend, _):
            chunks = await read(await backend.open(call(stream=True, include_usage=asked)))
            stated = [event for event in events(chunks) if "usage" in event]
            assert len(stated) == (1 if asked else 0)
            assert chunks[-1].usage == Usage(8, 11)
            if asked:
                assert stated[0] == events(chunks)[-1]
                assert stated[0]["choices"] == []
                assert stated[0]["usage"]["cost_usd"] == pytest.approx(30e-6)
                assert "cost" not in stated[0]["usage"]

    run(scenario)


@every_provider
def test_a_plain_tool_call_arrives_on_openai_wire(provider: Provider) -> None:
    async def scenario() -> None:
        async with cloud(provider) as (backend, _):
            [chunk] = await read(await backend.open(call("use the tool", tools=[TOOL], max_tokens=50)))
            choice = orjson.loads(chunk.data)["choices"][0]
            [made] = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "tool_calls"
            assert (made["function"]["name"], orjson.loads(made["function"]["arguments"])) == (
                "weather",
                {"city": "Paris"},
            )

    run(scenario)


@every_provider
def test_a_streamed_tool_call_is_put_together_by_its_index(provider: Provider) -> None:
    """Id and name come once, never empty; the arguments are the parts joined."""

    async def scenario() -> None:
        async with cloud(provider) as (backend, _):
            chunks = await read(await backend.open(call("use the tool", stream=True, tools=[TOOL], max_tokens=50)))
            choices = [choice for event in events(chunks) for choice in event["choices"]]
            parts = [part for choice in choices for part in choice["delta"].get("tool_calls", [])]
            assert {part["index"] for part in parts} == {0}
            assert [part["id"] for part in parts if "id" in part] == [parts[0]["id"]]
            assert [part["function"]["name"] for part in parts if part["function"].get("name") is not None] == [
                "weather"
            ]
            arguments = "".join(part["function"].get("arguments", "") for part in parts)
            assert orjson.loads(arguments) == {"city": "Paris"}
            assert choices[-1]["finish_reason"] == "tool_calls"

    run(scenario)


@every_provider
def test_many_streams_at_once_do_not_mix(provider: Provider) -> None:
    async def scenario() -> None:
        async with cloud(provider) as (backend, app):
            calls = [call("x" * (10 + number), stream=True) for number in range(12)]
            answers = await asyncio.gather(*[backend.open(one) for one in calls])
            read_all = await asyncio.gather(*[read(answer) for answer in answers])
            for number, chunks in enumerate(read_all):
                assert f"sent {10 + number} characters" in text_of(chunks)
            assert app.received == 12

    run(scenario)


# What is sent


@both_forms
@pytest.mark.parametrize(
    "hostile",
    [
        {"api_base": "URL"},
        {"base_url": "URL"},
        {"api_key": "mine"},
        {"custom_llm_provider": "openai"},
        {"extra_headers": {"x": "y"}},
        {"extra_body": {"x": "y"}},
        {"metadata": {"a": "b"}},
        {"fallbacks": ["gpt-4o"]},
        {"mock_response": "hi"},
        {"num_retries": 5},
        {"timeout": 0.001},
        {"litellm_params": {"api_base": "URL"}},
        {"shared_session": "x"},
    ],
    ids=lambda hostile: next(iter(hostile)),
)
def test_no_parameter_of_litellm_comes_from_a_caller(hostile: dict[str, Any], stream: bool) -> None:
    """The call goes where the deployment says, with its key, and the field is named as dropped."""

    async def scenario() -> None:
        trap = FakeProviders()
        async with serving(trap) as elsewhere, cloud(OPENAI) as (backend, app):
            body = orjson.loads(orjson.dumps(hostile).replace(b"URL", elsewhere.encode()))
            answer = await backend.open(call(stream=stream, **body))
            await read(answer)
            assert answer.dropped == tuple(hostile)
            assert trap.received == 0
            [received] = app.log
            assert received.headers["authorization"] == f"Bearer {KEY}"
            assert received.body.keys() <= {"model", "messages", "stream", "stream_options"}

    run(scenario)


def test_the_allow_list_holds_no_parameter_that_steers_litellm() -> None:
    steering = {"api_base", "api_key", "base_url", "custom_llm_provider", "metadata", "extra_headers", "extra_body"}
    assert not PARAMETERS & (steering | {"timeout", "model_list", "callbacks", "cache", "proxy_server_request"})


@pytest.mark.parametrize(
    ("provider", "asked", "dropped", "sent"),
    [
        (OPENAI, {"seed": 7, "logit_bias": {"1": 2}}, (), {"seed": 7, "logit_bias": {"1": 2}}),
        (OPENAI, {"top_k": 3, "min_p": 0.1}, ("min_p", "top_k"), {}),
        (ANTHROPIC, {"seed": 7, "temperature": 0.5}, ("seed",), {"temperature": 0.5}),
        (MISTRAL, {"seed": 7, "logit_bias": {"1": 2}}, ("logit_bias",), {"random_seed": 7}),
        (COHERE, {"user": "u", "top_p": 0.5}, ("user",), {"p": 0.5}),
        (OPENAI, {"temperature": None}, ("temperature",), {}),
    ],
)
def test_what_a_provider_does_not_know_is_named_and_not_sent(
    provider: Provider, asked: dict[str, Any], dropped: tuple[str, ...], sent: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with cloud(provider) as (backend, app):
            answer = await backend.open(call(**asked))
            await read(answer)
            assert answer.dropped == dropped
            added = {"model", "messages", "stream", "max_tokens"}
            assert {key: value for key, value in app.log[0].body.items() if key not in added} == sent

    run(scenario)


def test_a_parameter_that_only_this_model_refuses_is_dropped_before_anything_is_sent() -> None:
    """litellm knows that a reasoning model takes no temperature of its own; the rest of the request goes out once."""

    async def scenario() -> None:
        async with cloud(OPENAI, model="openai/o1") as (backend, app):
            answer = await backend.open(call(temperature=0.3, seed=4))
            await read(answer)
            assert answer.dropped == ("temperature",)
            [received] = app.log
            assert received.body["seed"] == 4
            assert "temperature" not in received.body

    run(scenario)


def test_an_imposed_bound_limits_the_answer() -> None:
    async def scenario() -> None:
        async with cloud(OPENAI) as (backend, app):
            [chunk] = await read(await backend.open(replace(call(), imposed_max_tokens=3)))
            assert app.log[0].body["max_tokens"] == 3
            assert orjson.loads(chunk.data)["choices"][0]["finish_reason"] == "length"

    run(scenario)


@every_provider
def test_a_key_of_the_environment_never_goes_to_a_stated_address(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployment with an address and no key is called without one, whatever the environment holds."""
    for name in ("OPENAI", "ANTHROPIC", "MISTRAL", "COHERE", "CO"):
        monkeypatch.setenv(f"{name}_API_KEY", "sk-of-the-environment")

    async def scenario() -> None:
        async with cloud(provider, api_key=None) as (backend, app):
            await read(await backend.open(call()))
            assert "sk-of-the-environment" not in str(app.log[0].headers)

    run(scenario)


@every_provider
def test_the_proxy_of_the_environment_is_used(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        app = FakeProviders()
        async with serving(app) as url:
            monkeypatch.setenv("HTTP_PROXY", url)
            backend = CloudBackend(provider.deployment("http://provider.invalid"), CloudLibrary())
            await read(await backend.open(call()))
            await backend.close()
            assert app.log[0].headers["host"] == "provider.invalid"

    run(scenario)


# Failures


@every_provider
@both_forms
@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(status=400), UpstreamRejected),
        (Behaviour(status=413), UpstreamRejected),
        (Behaviour(status=422), UpstreamRejected),
        (Behaviour(status=400, code="context_length_exceeded"), UpstreamRejected),
        (Behaviour(status=401), UpstreamUnauthorized),
        (Behaviour(status=402), UpstreamUnauthorized),
        (Behaviour(status=403), UpstreamUnauthorized),
        (Behaviour(status=404), UpstreamFailed),
        (Behaviour(status=429), UpstreamOverloaded),
        (Behaviour(status=500), UpstreamFailed),
        (Behaviour(status=502), UpstreamFailed),
        (Behaviour(status=503), UpstreamOverloaded),
        (Behaviour(status=529), UpstreamOverloaded),
        (Behaviour(fault="reset"), UpstreamFailed),
        (Behaviour(fault="cut"), UpstreamFailed),
        (Behaviour(fault="malformed"), UpstreamFailed),
        (Behaviour(fault="content_type"), UpstreamFailed),
    ],
    ids=lambda value: f"{value.status or value.fault}{value.code or ''}" if isinstance(value, Behaviour) else None,
)
def test_a_failure_before_the_first_token_is_told_by_its_kind(
    provider: Provider, stream: bool, behaviour: Behaviour, kind: type[UpstreamError]
) -> None:
    async def scenario() -> None:
        async with cloud(provider, behaviour) as (backend, _):
            with pytest.raises(kind) as caught:
                await read(await backend.open(call(stream=stream)))
            assert KEY not in str(caught.value)
            assert PROMPT not in str(caught.value)
            assert "127.0.0.1" not in str(caught.value)

    run(scenario)


@every_provider
@pytest.mark.parametrize("fault", ["reset", "cut", "malformed", "content_type"])
def test_a_stream_that_breaks_off_never_looks_complete(provider: Provider, fault: Any) -> None:
    """litellm ends a cut stream with "stop"; here it ends with an error, and no chunk is the last."""

    async def scenario() -> None:
        behaviour = Behaviour(chunks=30, chunk_delay=0.002, fault=fault, after=12)
        async with cloud(provider, behaviour) as (backend, _):
            answer = await backend.open(call(stream=True))
            chunks = []
            with pytest.raises(UpstreamError) as caught:
                async for chunk in answer:
                    chunks.append(chunk)
            await answer.close()
            assert isinstance(caught.value, UpstreamCut if chunks else Retryable)
            assert not any(chunk.last for chunk in chunks)
            assert all(choice["finish_reason"] is None for event in events(chunks) for choice in event["choices"])

    run(scenario)


@every_provider
def test_a_failure_after_the_first_token_is_a_cut(provider: Provider) -> None:
    """The client has read the first word, so no other deployment may be tried."""

    async def scenario() -> None:
        behaviour = Behaviour(chunks=30, fault="silence", after=12)
        impatient = Timeouts(connect=20.0, first_token=30.0, idle=0.2, total=60.0)
        async with cloud(provider, behaviour, timeouts=impatient) as (backend, app):
            answer = await backend.open(call(stream=True))
            assert (await anext(answer)).data
            with pytest.raises(UpstreamCut):
                async for _ in answer:
                    pass
            await answer.close()
            await app.until(lambda app: app.in_flight == 0)
            assert app.disconnects == 1

    run(scenario)


@every_provider
@pytest.mark.parametrize(
    ("stream", "behaviour"),
    [
        (False, Behaviour(fault="silence")),
        (True, Behaviour(fault="silence")),
        (True, Behaviour(fault="silence", after=1)),
    ],
    ids=["plain", "no headers", "no token"],
)
def test_silence_ends_at_the_deadline_and_closes_the_connection(
    provider: Provider, stream: bool, behaviour: Behaviour
) -> None:
    async def scenario() -> None:
        impatient = Timeouts(connect=20.0, first_token=0.3, idle=30.0, total=60.0 if stream else 0.3)
        async with cloud(provider) as (backend, _):
            await read(await backend.open(call(stream=stream)))  # litellm's first call takes longer than the deadline
        async with cloud(provider, behaviour, timeouts=impatient) as (backend, app):
            with pytest.raises(UpstreamTimeout):
                await read(await backend.open(call(stream=stream)))
            await app.until(lambda app: app.in_flight == 0)

    run(scenario)


@every_provider
@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("7", 7.0), ("0", 0.0), (None, 1.0), ("soon", 1.0), ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0)],
)
def test_retry_after_is_taken_over(provider: Provider, retry_after: str | None, seconds: float) -> None:
    async def scenario() -> None:
        async with cloud(provider, Behaviour(status=429, retry_after=retry_after)) as (backend, app):
            with pytest.raises(UpstreamOverloaded) as caught:
                await backend.open(call())
            assert caught.value.retry_after == seconds
            assert app.received == 1  # nothing is tried again

    run(scenario)


@both_forms
def test_nobody_listening_is_a_failed_connection(stream: bool) -> None:
    async def scenario() -> None:
        async with serving(FakeProviders()) as url:
            pass
        backend = CloudBackend(OPENAI.deployment(url), CloudLibrary())
        with pytest.raises(ConnectFailed):
            await read(await backend.open(call(stream=stream)))
        await backend.close()

    run(scenario)


def test_an_unknown_provider_is_a_failure_of_the_deployment() -> None:
    async def scenario() -> None:
        async with cloud(OPENAI, model="nosuchprovider/model") as (backend, app):
            with pytest.raises(UpstreamFailed):
                await backend.open(call())
            assert app.received == 0

    run(scenario)


# Closing


@every_provider
@pytest.mark.parametrize("read_first", [0, 3])
def test_closing_a_stream_closes_the_connection(provider: Provider, read_first: int) -> None:
    """The provider sees the client go, and stops; the invoice does too."""

    async def scenario() -> None:
        async with cloud(provider, Behaviour(chunks=10_000, chunk_delay=0.01)) as (backend, app):
            answer = await backend.open(call(stream=True))
            for _ in range(read_first):
                await anext(answer)
            await answer.close()
            await answer.close()
            async with asyncio.timeout(20):
                await app.until(lambda app: app.in_flight == 0)
            assert app.disconnects == 1

    run(scenario)


@every_provider
@both_forms
def test_cancelling_a_call_closes_the_connection(provider: Provider, stream: bool) -> None:
    async def scenario() -> None:
        async with cloud(provider, Behaviour(delay=3600)) as (backend, app):
            task = asyncio.create_task(backend.open(call(stream=stream)))
            await app.until(lambda app: app.in_flight == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(20):
                await app.until(lambda app: app.in_flight == 0)
            assert app.disconnects == 1

    run(scenario)


@every_provider
@both_forms
def test_the_last_backend_closes_all_connections(provider: Provider, stream: bool) -> None:
    """However often: what litellm keeps for all calls is made anew afterwards, and closed again."""

    def sessions() -> list[aiohttp.ClientSession]:
        return [one for one in gc.get_objects() if type(one) is aiohttp.ClientSession and not one.closed]

    async def scenario() -> None:
        before = sessions()
        for _ in range(2):
            async with cloud(provider) as (backend, _app):
                await read(await backend.open(call(stream=stream)))
            assert [one for one in sessions() if one not in before] == []

    run(scenario)


# Translation


def test_every_exception_of_litellm_has_a_counterpart() -> None:
    """A release of litellm that adds an exception fails here until somebody has decided what it means."""

    async def scenario() -> None:
        litellm = await CloudLibrary().start()
        classes = [
            kind
            for kind in vars(litellm.exceptions).values()
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == "litellm.exceptions"
        ]
        assert len(classes) > 25
        missing = [kind.__name__ for kind in classes if f"litellm.{kind.__name__}" not in COUNTERPARTS]
        assert missing == []
        known = {f"litellm.{kind.__name__}" for kind in classes}
        assert {name for name in COUNTERPARTS if name.startswith("litellm.")} - known == set()

    run(scenario)


@pytest.mark.parametrize("package", ["openai", "httpx", "aiohttp"])
def test_every_exception_of_the_clients_beneath_finds_a_counterpart(package: str) -> None:
    """Own entry or a base class's: none falls through to the name of nothing."""
    __import__(package)
    module = sys.modules[package]
    exported = [getattr(module, name) for name in dir(module)]
    classes = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, Exception)]
    ours = [
        kind for kind in classes if not issubclass(kind, Warning) and not kind.__name__.startswith(("WS", "Cookie"))
    ]
    assert len(ours) > 10
    reachable = {kind.__name__ for kind in ours if any(name in COUNTERPARTS for name in names(kind))}
    elsewhere = {
        "WebSocketError",
        "InvalidWebhookSignatureError",
        "LengthFinishReasonError",
        "EmptyMultipartError",
        "EofStream",
    }
    assert {kind.__name__ for kind in ours} - reachable - elsewhere == set()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("litellm.BadRequestError: OpenAIException - Invalid 'temperature'", "Invalid 'temperature'"),
        ('litellm.BadRequestError: AnthropicException - b\'{"error":{"message":"max_tokens: no"}}\'', "max_tokens: no"),
        ("Incorrect API key provided: sk-proj-abc123def456", "Incorrect API key provided: [redacted]"),
        ("see https://internal.example/doc for more", "see [redacted] for more"),
        ("bad token aGVsbG8gd29ybGQxMjM0NTY3ODkw here", "bad token [redacted] here"),
        ("x" * 1000, "x" * MAX_MESSAGE),
        ("litellm.BadRequestError: ", "no reason given"),
        ("first line\nTraceback (most recent call last)", "first line"),
    ],
)
def test_a_refusal_says_why_without_keys_and_addresses(text: str, told: str) -> None:
    class Refused(Exception):
        status_code = 400

    Refused.__module__, Refused.__name__ = "litellm.exceptions", "BadRequestError"
    error = translate(Refused(text), "gpt", now=0.0)
    assert isinstance(error, UpstreamRejected)
    assert error.message == f"gpt refused the request: {told}"
    assert error.upstream_status == 400


@every_provider
def test_a_prompt_beyond_the_window_names_the_messages(provider: Provider) -> None:
    async def scenario() -> None:
        async with cloud(provider, Behaviour(status=400, code="context_length_exceeded")) as (backend, _):
            with pytest.raises(UpstreamRejected, match="does not fit the window") as caught:
                await backend.open(call())
            assert (caught.value.param, caught.value.upstream_status) == ("messages", 400)

    run(scenario)


def test_a_date_in_retry_after_counts_from_now() -> None:
    class Full(Exception):
        status_code = 429
        litellm_response_headers = httpx.Headers({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"})

    assert translate(Full("full"), "gpt", now=40.0).retry_after == 60.0


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("event: message-start", None),
        ("", None),
        ("data: [DONE]", None),
        (": keep-alive", None),
        ("data: not json", "not json"),
        ('data: {"type":"content-end","index":0}', '{"type":"content-end","index":0}'),
        ('{"type":"content-end","index":0}', '{"type":"content-end","index":0}'),
    ],
)
def test_a_line_of_cohere_becomes_one_that_litellm_reads(line: str, becomes: str | None) -> None:
    assert rewritten(line) == becomes


# Quiet


def test_litellm_is_not_imported_before_it_is_used() -> None:
    """`hybridgate policy check` must not wait for it."""
    code = "import sys, gateway.backends.cloud as c; c.CloudLibrary(); sys.exit('litellm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_provider
@pytest.mark.parametrize("behaviour", [Behaviour(), Behaviour(status=400), Behaviour(fault="malformed")])
def test_nothing_that_a_caller_sent_and_no_key_is_logged(
    provider: Provider, behaviour: Behaviour, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even with the root logger at DEBUG, and nothing on the terminal either."""

    async def scenario() -> None:
        async with cloud(provider, behaviour) as (backend, _):
            for stream in (False, True):
                try:
                    await read(await backend.open(call(stream=stream)))
                except UpstreamError:
                    assert behaviour != Behaviour()

    with caplog.at_level(logging.DEBUG):
        run(scenario)
    out, err = capfd.readouterr()
    said = caplog.text + out + err
    assert PROMPT not in said
    assert KEY not in said
    assert not [one for one in caplog.records if one.name.startswith(("LiteLLM", "openai", "httpx"))]
