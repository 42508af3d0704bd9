"""Stored answers over real sockets: the official client, clients that leave, and what an operator counts and purges."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from typer.testing import CliRunner

from gateway.admin import admin_app
from gateway.cli import main
from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.edge import Application, Edge
from gateway.embedded import embedded
from gateway.running import new_id
from gateway.server import config_of
from tests.fakes import Log
from tests.running import Running, running_from

POLICY = """
version: 1
deployments: deployments.yaml
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
async def world(folder: Path, provider: FakeProviders) -> AsyncIterator[World]:
    """A gateway in front of one provider, with its admin port."""
    async with serving(provider) as url:
        (folder / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", f"{url}/v1"))
        (folder / "policy.yaml").write_text(POLICY)
        async with running_from(folder / "policy.yaml") as (gateway, reloader):
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


def test_a_purge_says_what_and_a_gateway_that_is_not_there_is_named() -> None:
    runner = CliRunner()
    for arguments in (["purge"], ["purge", "--all", "--tenant", "a"]):
        told = runner.invoke(main, ["cache", *arguments])
        assert told.exit_code != 0 and "say which" in told.output
    told = runner.invoke(main, ["cache", "stats", "--admin", "http://127.0.0.1:1"])
    assert told.exit_code != 0 and "--admin" in told.output
