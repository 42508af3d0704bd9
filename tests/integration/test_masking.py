"""Masked requests as their users meet them: a real server, the official client, a fake cloud that says back what it is
sent and shows what that was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.types import Deployment, Price
from tests.fakes import CARD, PRIVATE, deployment, policy
from tests.gateway.test_cloud import PROVIDERS, Provider
from tests.gateway.test_cloud import pytestmark as pytestmark  # litellm warns when it is imported
from tests.running import Running, running

MAIL = "jane.doe@example.org"
TEXT = f"Write to {MAIL} (card {CARD}) and to bob@example.org; {MAIL} first."
MASKED = "Write to [EMAIL_1] (card [CREDIT_CARD_1]) and to [EMAIL_2]; [EMAIL_1] first."
MASKING = replace(PRIVATE, mask=frozenset({"personal"}))
TOOL = {"type": "function", "function": {"name": "send_mail", "parameters": {"type": "object", "properties": {}}}}


@asynccontextmanager
async def world(provider: Provider | None, **of_cloud: Any) -> AsyncIterator[tuple[Running, FakeProviders]]:
    """A gateway with one deployment in the cloud (relayed where no provider is given) and one at home that is down."""
    cloud = FakeProviders(Behaviour(echo=3))
    async with serving(cloud) as url:
        price = Price(10.0, 20.0)
        relayed = deployment("cloud", urls=(f"{url}/v1",), api_key="sk-x", price=price, window=None, **of_cloud)
        there: Deployment = (
            replace(provider.deployment(url), name="cloud", capabilities=relayed.capabilities) if provider else relayed
        )
        home = deployment("home", zone="on_premises", urls=("http://127.0.0.1:9/v1",))
        made = policy([there, home], invariants=[MASKING], order_by="listed")
        async with running(made) as gateway:
            yield gateway, cloud


def in_world(
    test: Callable[[Running, FakeProviders], Awaitable[None]], provider: Provider | None = None, **options: Any
) -> None:
    async def run() -> None:
        async with world(provider, **options) as (gateway, cloud):
            await test(gateway, cloud)

    asyncio.run(run())


async def ask(gateway: Running, text: str = TEXT, *, stream: bool = False, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "stream": stream, **more}
    return await gateway.http.post("/v1/chat/completions", json=body, headers=more.pop("headers", None))


def said(answer: httpx.Response) -> tuple[str, str]:
    """The content, and a tool call's arguments, of a plain answer or a whole stream."""
    if answer.headers["content-type"].startswith("application/json"):
        messages = [choice["message"] for choice in answer.json()["choices"]]
    else:
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        messages = [choice["delta"] for event in events for choice in orjson.loads(event)["choices"]]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    content = "".join(message.get("content") or "" for message in messages)
    return content, "".join(call["function"].get("arguments") or "" for call in calls)


PROVIDED = [None, *PROVIDERS]
everywhere = pytest.mark.parametrize("provider", PROVIDED, ids=["relayed", *(one.name for one in PROVIDERS)])


@everywhere
def test_the_cloud_sees_placeholders_and_the_client_what_they_stand_for(provider: Provider | None) -> None:
    async def check(gateway: Running, cloud: FakeProviders) -> None:
        for stream in (False, True):
            answer = await ask(gateway, stream=stream)
            assert answer.status_code == 200, answer.text
            assert said(answer)[0] == TEXT
            assert answer.headers["x-hybridgate-masked"] == "3" and answer.headers["x-hybridgate-zone"] == "us_cloud"
        assert len(cloud.log) == 2
        for received in cloud.log:
            seen = orjson.dumps([received.body, received.headers]).decode()
            assert MASKED in seen and "@" not in seen and "1111" not in seen
        assert [line["masked"] for line in gateway.log.lines] == [3, 3]
        assert MAIL not in repr(gateway.log.lines) and "bob" not in repr(gateway.log.lines)

    in_world(check, provider)


@everywhere
def test_a_tool_call_comes_back_with_what_the_placeholders_stand_for(provider: Provider | None) -> None:
    async def check(gateway: Running, cloud: FakeProviders) -> None:
        for stream in (False, True):
            answer = await ask(gateway, f"use the tool for {MAIL}", stream=stream, tools=[TOOL])
            assert answer.status_code == 200, answer.text
            assert orjson.loads(said(answer)[1]) == {"text": f"use the tool for {MAIL}"}
        assert "@" not in orjson.dumps([received.body for received in cloud.log]).decode()

    in_world(check, provider)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x-data-class": "personal"}, {}),
        ({"x-data-class": "unscannable"}, {}),
        ({"x-data-class": "restricted"}, {}),
        ({}, {"metadata": {"n": 4111111111111111}}),
        ({}, {"previous_response_id": "resp_1"}),
        ({}, {"messages": [{"role": "user", "content": "4111 1111"}, {"role": "user", "content": "1111 1111"}]}),
        ({}, {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in (MAIL[:9], MAIL[9:])]}]}),
    ],
    ids=["label", "unscannable", "data class", "a number", "held", "split", "split over parts"],
)
def test_what_masking_does_not_answer_for_stays_home(headers: dict[str, str], body: dict[str, Any]) -> None:
    async def check(gateway: Running, cloud: FakeProviders) -> None:
        whole = {"messages": [{"role": "user", "content": TEXT}], **body}
        answer = await gateway.http.post("/v1/chat/completions", json=whole, headers=headers)
        assert answer.status_code == 503 and "cannot be reached" in answer.json()["error"]["message"]
        assert not cloud.received and "x-hybridgate-masked" not in answer.headers

    in_world(check)


def test_what_is_not_private_goes_as_it_is() -> None:
    async def check(gateway: Running, cloud: FakeProviders) -> None:
        answer = await ask(gateway, "[EMAIL_1]")
        assert said(answer)[0] == "[EMAIL_1]" and "x-hybridgate-masked" not in answer.headers

    in_world(check)


def test_the_providers_own_words_about_a_masked_request_hold_no_original() -> None:
    async def check(gateway: Running, cloud: FakeProviders) -> None:
        cloud.behave(always=Behaviour(status=400, message="[EMAIL_1] is not welcome"))
        answer = await ask(gateway)
        assert answer.status_code == 400 and "[EMAIL_1]" in answer.text and MAIL not in answer.text

    in_world(check)


def test_the_decision_says_which_deployments_get_the_request_masked() -> None:
    async def check(gateway: Running, _: FakeProviders) -> None:
        body = {"messages": [{"role": "user", "content": TEXT}]}
        told = (await gateway.http.post("/v1/route", json=body)).json()
        assert [(one["deployment"], one["note"]) for one in told["candidates"]] == [("cloud", "masked"), ("home", "")]

    in_world(check)


def test_an_answer_cut_by_the_provider_ends_with_an_error_and_not_as_complete() -> None:
    async def check(gateway: Running, cloud: FakeProviders) -> None:
        cloud.behave(always=Behaviour(echo=3, fault="cut", after=5))
        answer = await ask(gateway, stream=True)
        assert "upstream_cut" in answer.text and "[DONE]" not in answer.text

    in_world(check)
