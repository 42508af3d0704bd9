"""Stored answers over real sockets: the official client, clients that leave, and what an operator counts and purges."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gateway.admin import admin_app
from gateway.cli import main
from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.edge import Application, Edge
from gateway.embedded import embedded
from gateway.running import new_id
from gateway.server import config_of
from gateway.settings import Settings, SettingsError
from tests.bench.replicas import rows
from tests.fakes import CARD, Log
from tests.redis_server import redis_server
from tests.running import Running, running_from

POLICY = """
version: 1
deployments: deployments.yaml
labels: {personal: {any: [{detects: credit_card}]}}
invariants: [{name: home, when: {any_label: personal}, stay_in: on_premises}]
cache: {ttl: 1h}
default: {candidates: home}
"""
DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: openai, url: URL, model: m, zone: on_premises, cost: {usd_per_million_tokens: {input: 1, output: 2}}}
"""


@dataclass
class World:
    gateway: Running
    provider: FakeProviders
    admin: str

    async def ask(self, stream: bool = False, text: str = "hi", **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        create = self.gateway.openai.chat.completions.create
        return await create(model="auto", messages=messages, temperature=0, stream=stream, **more)

    async def text(self, **more: Any) -> str:
        chunks = [chunk async for chunk in await self.ask(stream=True, **more)]
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    async def command(self, *arguments: str) -> str:
        """What `hybridgate cache` prints, which must succeed."""
        runner = CliRunner(env={"COLUMNS": "120"})
        told = await asyncio.to_thread(runner.invoke, main, ["cache", *arguments, "--admin", self.admin])
        assert told.exit_code == 0, told.output
        return told.output


def in_world(folder: Path, check: Callable[[World], Awaitable[None]], behaviour: Behaviour | None = None) -> None:
    async def run() -> None:
        async with world(folder, FakeProviders(behaviour)) as w, asyncio.timeout(30):
            await check(w)

    asyncio.run(run())


@asynccontextmanager
async def world(folder: Path, provider: FakeProviders, settings: Settings | None = None) -> AsyncIterator[World]:
    """A gateway in front of one provider, with its admin port."""
    async with serving(provider) as url:
        (folder / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", f"{url}/v1"))
        (folder / "policy.yaml").write_text(POLICY)
        async with running_from(folder / "policy.yaml", settings=settings) as (gateway, reloader):
            pages = Application.small(admin_app(gateway.gateway, reloader), Edge(Log(), new_id))
            with socket.create_server(("127.0.0.1", 0)) as listener:
                async with embedded(config_of(pages, 1.0), listener):
                    yield World(gateway, provider, f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_the_official_client_reads_what_another_form_stored(tmp_path: Path) -> None:
    async def check(w: World) -> None:
        streamed = await w.text()
        plain = await w.ask()
        assert plain.choices[0].message.content == streamed != "" and plain.usage.completion_tokens > 0
        chunks = [chunk async for chunk in await w.ask(stream=True, stream_options={"include_usage": True})]
        assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens and chunks[-1].usage.cost_usd == 0
        assert w.provider.received == 1
        assert [line["cache"] for line in w.gateway.log.lines if line["event"] == "request"] == ["miss", "hit", "hit"]

    in_world(tmp_path, check)


def test_fifty_streams_at_once_are_one_stream_and_each_has_it_as_it_comes(tmp_path: Path) -> None:
    async def check(w: World) -> None:
        texts = await asyncio.gather(*(w.text() for _ in range(50)))
        assert len(set(texts)) == 1 and texts[0] and w.provider.received == 1
        first = [
            line["first_token_ms"] < line["total_ms"] for line in w.gateway.log.lines if line["event"] == "request"
        ]
        assert len(first) == 50 and all(first)

    in_world(tmp_path, check, Behaviour(chunk_delay=0.02, chunks=10))


def test_a_client_that_leaves_takes_nothing_from_the_others_and_the_last_ends_the_call(tmp_path: Path) -> None:
    async def check(w: World) -> None:
        first = asyncio.create_task(w.text())
        while not w.provider.in_flight:  # noqa: ASYNC110 - it happens in a server, without an event
            await asyncio.sleep(0.005)
        others = [asyncio.create_task(w.text()) for _ in range(3)]
        await asyncio.sleep(0.1)
        first.cancel()
        assert len(set(await asyncio.gather(*others))) == 1 and w.provider.received == 1
        assert w.provider.disconnects == 0
        alone = asyncio.create_task(w.text(text="another"))
        while not w.provider.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        alone.cancel()
        while not w.provider.disconnects:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    in_world(tmp_path, check, Behaviour(chunk_delay=0.05, chunks=10))


def test_an_operator_counts_and_purges_without_seeing_a_word(tmp_path: Path) -> None:
    async def check(w: World) -> None:
        for text in ("zebra", "zebra", "giraffe"):
            await w.ask(text=text)
        told = await w.command("stats")
        assert "memory" in told and "default" in told and "home" in told and "33.3 % of them hits" in told
        assert "zebra" not in told and "2 answers stored" in told
        assert "0 answers forgotten" in await w.command("purge", "--tenant", "nobody")
        assert "2 answers forgotten" in await w.command("purge", "--model", "auto", "--deployment", "home")
        await w.ask(text="zebra")
        assert w.provider.received == 3 and "1 answer forgotten" in await w.command("purge", "--all")
        async with httpx.AsyncClient(base_url=w.admin, trust_env=False) as admin:
            text = (await admin.get("/metrics")).text
        assert 'hybridgate_cache_requests_total{result="hit"} 1.0' in text and "hybridgate_cache_entries 0.0" in text
        assert 'hybridgate_tokens_total{deployment="home",kind="prompt"}' in text

    in_world(tmp_path, check)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


def unavailable(w: World) -> int:
    return w.gateway.gateway.answers.counts.unavailable


def test_two_gateways_share_answers_in_redis_and_an_operator_purges_them(tmp_path: Path, redis: str) -> None:
    (tmp_path / "secret").write_text(bytes(range(32)).hex())
    secret = str(tmp_path / "secret")
    one = Settings(drain_seconds=1.0, redis_url=redis, redis_zone="on_premises", cache_secret=secret)

    async def check() -> None:
        provider = FakeProviders(Behaviour(delay=0.3))
        async with world(tmp_path, provider, one) as w, world(tmp_path, provider, one) as other:
            for attempt in range(10):  # where the machine is so busy that Redis is late, it counts as a miss
                provider.received = 0
                late = unavailable(w) + unavailable(other)
                text = f"card {CARD}, {attempt}"
                answers = await asyncio.gather(*((w, other)[n % 2].ask(text=text) for n in range(20)))
                for gateway in (w, other):
                    await gateway.gateway.gateway.answers.flights.settled()
                if late == unavailable(w) + unavailable(other):
                    break
            assert len({plain.choices[0].message.content for plain in answers}) == 1
            assert provider.received == 1, "a labelled request: this Redis is on premises"
            assert "0 answers" in await w.command("purge", "--tenant", "nobody")
            told = await other.command("stats")
            assert "redis" in told and "memory" in told
            assert "0 answers" not in await other.command("purge", "--tenant", "default")
            await w.ask(text=text)
            assert provider.received == 2

    asyncio.run(check())


def test_the_benchmark_tells_of_both_places_and_what_a_ping_takes(redis: str) -> None:
    told = asyncio.run(rows(redis, requests=3))
    names = ["a miss in Redis", "a miss in memory", "a hit in Redis", "a hit in memory", "a PING"]
    assert [row.name for row in told] == names and all(row.cpu_us > 0 and row.line() for row in told)
    assert [row.pings is None for row in told] == [False, True, False, True, False]


@pytest.mark.parametrize("held", [None, "hunter2", b"\xff\xfe"])
def test_a_file_without_a_secret_ends_the_gateway_and_is_not_repeated(tmp_path: Path, redis: str, held: Any) -> None:
    path = tmp_path / "secret"
    if held is not None:
        path.write_bytes(held if isinstance(held, bytes) else held.encode())
    settings = Settings(redis_url=redis, cache_secret=str(path))

    async def check() -> None:
        async with world(tmp_path, FakeProviders(), settings):
            raise AssertionError("it serves")

    with pytest.raises(SettingsError) as caught:
        asyncio.run(check())
    assert "HYBRIDGATE_CACHE_SECRET" in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("alone", [{"redis_zone": "on_premises"}, {"cache_secret": "file"}])
def test_what_has_no_effect_without_redis_is_refused(alone: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="HYBRIDGATE_REDIS_URL"):
        Settings(**alone)


def test_a_purge_says_what_and_a_gateway_that_is_not_there_is_named() -> None:
    runner = CliRunner()
    for arguments in (["purge"], ["purge", "--all", "--tenant", "a"]):
        told = runner.invoke(main, ["cache", *arguments])
        assert told.exit_code != 0 and "say which" in told.output
    told = runner.invoke(main, ["cache", "stats", "--admin", "http://127.0.0.1:1"])
    assert told.exit_code != 0 and "--admin" in told.output
