"""Limits over HTTP, as the official client sees them; and two gateways that share them through a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, RateLimitError
from redis.asyncio import Redis

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.keyfile import compile_keys
from gateway.keys import digest_of
from gateway.loading import known_names, read_policy
from gateway.pages import told_of_redis
from gateway.settings import Settings, SettingsError
from gateway.store import Store
from tests.redis_proxy import proxied
from tests.redis_server import redis_server
from tests.running import Running, running

DEPLOYMENTS = """
version: 1
deployments:
  first:
    backend: openai
    url: URL
    model: m
    zone: us_cloud
    cost: {usd_per_million_tokens: {input: 1000, output: 1000}}
    default_max_tokens: 100
    limits: {LIMITS}
  second: {backend: openai, url: URL, model: m, zone: us_cloud, cost: {usd_per_million_tokens: {input: 0, output: 0}}}
"""
POLICY = "version: 1\ndeployments: deployments.yaml\ndefault: {candidates: [first, second], order_by: listed}\n"


@asynccontextmanager
async def gateway(
    folder: Path, limits: str, there: str = "concurrent_requests: 1000", redis: str = ""
) -> AsyncIterator[Running]:
    """With one key, `hg-crm`, held to these limits."""
    async with serving(FakeProviders(Behaviour(chunk_delay=0.05))) as url:
        (folder / "policy.yaml").write_text(POLICY)
        written = DEPLOYMENTS.replace("URL", f"{url}/v1").replace("LIMITS", there)
        (folder / "deployments.yaml").write_text(written)
        loaded = read_policy(str(folder / "policy.yaml"), {})
        assert loaded.policy is not None, loaded.problems
        digest = digest_of("hg-crm").hex()
        text = f'version: 1\nkeys: [{{id: crm, sha256: "{digest}", limits: {{{limits}}}}}]\n'
        keys = compile_keys("keys.yaml", text, known_names(loaded.policy))
        async with running(loaded.policy, Settings(drain_seconds=1.0, redis_url=redis), keys) as g:
            yield g


async def create(g: Running, **changed: Any) -> Any:
    client = AsyncOpenAI(base_url=f"{g.url}/v1", api_key="hg-crm", max_retries=0, http_client=g.openai._client)
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], **changed}
    return await client.chat.completions.with_raw_response.create(**body)


def test_the_official_client_sees_what_is_left_and_then_a_rate_limit(tmp_path: Path) -> None:
    async def check() -> None:
        async with gateway(tmp_path, "requests_per_minute: 2, tokens_per_minute: 10k") as g:
            left = [(await create(g)).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
            assert left == ["1", "0"]
            with pytest.raises(RateLimitError) as caught:
                await create(g)
            headers = caught.value.response.headers
            assert caught.value.code == "rate_limit_exceeded" and 55 <= int(headers["retry-after"]) <= 62
            assert headers["x-ratelimit-limit-requests"] == "2" and headers["x-ratelimit-remaining-requests"] == "0"
            assert headers["x-ratelimit-limit-tokens"] == "10000" and headers["x-ratelimit-reset-requests"]

    asyncio.run(check())


def test_a_stream_holds_its_slot_until_its_end(tmp_path: Path) -> None:
    async def check() -> None:
        async with gateway(tmp_path, "concurrent_requests: 1") as g:
            stream = (await create(g, stream=True)).parse()
            with pytest.raises(RateLimitError, match="1 request open at once"):
                await create(g)
            async for _ in stream:
                pass
            assert (await create(g)).headers["x-hybridgate-deployment"] == "first"

    asyncio.run(check())


def test_a_spent_budget_and_what_never_fits(tmp_path: Path) -> None:
    async def check() -> None:
        async with gateway(tmp_path, "usd_per_day: 0.4, budget: strict") as g:
            with pytest.raises(APIStatusError) as caught:
                for _ in range(20):
                    assert (await create(g, model="first", max_tokens=50)).headers["x-hybridgate-deployment"] == "first"
            assert caught.value.status_code == 402 and caught.value.code == "budget_spent"
            assert "key crm may spend 0.4 USD a day" in caught.value.message
            assert (await create(g)).headers["x-hybridgate-deployment"] == "second", "what costs nothing goes on"
            with pytest.raises(BadRequestError) as never:
                await create(g, model="first", max_tokens=900)
            assert never.value.code == "exceeds_limit"

    asyncio.run(check())


def test_two_gateways_share_a_providers_limit_and_say_how_redis_is(tmp_path: Path) -> None:
    async def check(url: str) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir()
        two.mkdir()
        there = "requests_per_minute: 4"
        most = "requests_per_minute: 99"
        async with (
            proxied(url) as proxy,
            gateway(one, most, there, proxy.url) as a,
            gateway(two, most, there, url) as b,
        ):
            await a.until(lambda: store_of(a).state.replicas == store_of(b).state.replicas == 2)
            answered = [(await create(g)).headers["x-hybridgate-deployment"] for _ in range(4) for g in (a, b)]
            assert answered == ["first"] * 4 + ["second"] * 4
            assert (await a.http.get("/readyz")).json() == {"status": "ready"}, "more is for operators"
            proxy.hang_up()
            await a.until(lambda: not store_of(a).state.up)
            assert (await create(a)).status_code == 200, "its share, while it is alone"
            (line,) = [line for line in a.log.lines if line["event"] == "redis"]
            assert (line["state"], line["reason"], line["replicas"]) == ("down", "it cannot be reached", 2)
            assert b"hybridgate_redis_up 0.0" in a.gateway.metrics.exposition()

    with redis_server(tmp_path) as url:
        asyncio.run(check(url))


def test_a_counter_that_something_else_wrote_to_closes_a_strict_budget_and_is_told_once(tmp_path: Path) -> None:
    async def check(url: str) -> None:
        async with (
            gateway(tmp_path, "usd_per_day: 5, budget: strict, requests_per_minute: 9", redis=url) as g,
            Redis.from_url(url) as redis,
        ):
            assert (await create(g, max_tokens=50)).status_code == 200
            key = "hybridgate:{ledger}:key:crm usd/day"
            await redis.set(key, "4")
            for _ in range(2):
                with pytest.raises(APIStatusError, match="cannot be checked now") as caught:
                    await create(g, max_tokens=50)
                assert caught.value.status_code == 503 and caught.value.code == "limits_unavailable"
            (line,) = [line for line in g.log.lines if line["event"] == "ledger"]
            assert (line["state"], line["kind"], line["redis_key"]) == ("damaged", "period", key)
            assert b"hybridgate_redis_damaged_counters 1.0" in g.gateway.metrics.exposition()
            told = told_of_redis(store_of(g).state, g.gateway.shared)
            assert told["up"] and told["damaged"] == [{"key": key, "kind": "period"}]
            await redis.delete(key)
            assert (await create(g, max_tokens=50)).status_code == 200
            assert [line["state"] for line in g.log.lines if line["event"] == "ledger"] == ["damaged", "mended"]

    with redis_server(tmp_path) as url:
        asyncio.run(check(url))


def store_of(g: Running) -> Store:
    assert g.gateway.store is not None
    return g.gateway.store


def test_an_address_that_is_none_is_refused_at_start_and_not_repeated(tmp_path: Path) -> None:
    async def check() -> None:
        async with gateway(tmp_path, "requests_per_minute: 2", redis="http://secret"):
            raise AssertionError("it started")

    with pytest.raises(SettingsError, match="HYBRIDGATE_REDIS_URL must be an address") as caught:
        asyncio.run(check())
    assert "secret" not in str(caught.value)
