"""A real engine with one place, a request that does not end in it, and a cloud: a stream that waits for the place
leaves in time, the cloud answers it, and the engine has nothing left of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.loading import load_policy
from tests.raw_http import free_port
from tests.running import Running, running
from tests.tiny_models import write_endless

pytestmark = pytest.mark.slow

LIMIT = 4.0  # seconds; a place is forecast to be free after 256 steps of the tiny model, about half a second
ENDLESS = 100_000

DEPLOYMENTS = """
version: 1
deployments:
  engine: {{backend: local, url: "{engine}/v1", model: "{model}", zone: on_premises, cost: {cheap}}}
  cloud: {{backend: openai, url: "{cloud}/v1", model: m, zone: us_cloud, context_window: 1M, cost: {dear}}}
"""
POLICY = f"""
version: 1
deployments: deployments.yaml
slo: {{soon: {{first_token_p95: {LIMIT:g}s}}}}
default: {{candidates: [engine, cloud], slo: soon, require: {{slo: met}}, order_by: marginal_cost}}
"""


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[tuple[Running, httpx.AsyncClient, FakeProviders]]:
    """The gateway, the engine itself, and the cloud, whose first token takes 0.3 s."""
    provider = FakeProviders(Behaviour(delay=0.3))
    model, engine = str(write_endless(folder)), f"http://127.0.0.1:{(port := free_port())}"
    command = ("-m", "local_engine", "serve", "--model", model, "--port", str(port), "--max-running", "1")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        "--exit-with-parent",
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with serving(provider) as cloud, httpx.AsyncClient(base_url=engine, trust_env=False) as direct:
            prices = [f"{{usd_per_million_tokens: {{input: {usd}, output: {usd}}}}}" for usd in (0.01, 1)]
            (folder / "deployments.yaml").write_text(
                DEPLOYMENTS.format(engine=engine, cloud=cloud, model=model, cheap=prices[0], dear=prices[1])
            )
            (folder / "policy.yaml").write_text(POLICY)
            async with running(load_policy(folder / "policy.yaml", {})) as gateway:
                await gateway.ready("engine", "cloud", patience=120)
                yield gateway, direct, provider
    finally:
        process.kill()
        await process.wait()


async def stream(g: Running, model: str, max_tokens: int) -> AsyncStream[ChatCompletionChunk]:
    return await g.openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=max_tokens
    )


async def load(engine: httpx.AsyncClient) -> dict[str, Any]:
    told: dict[str, Any] = (await engine.get("/load")).json()
    return told


def test_a_stream_leaves_the_queue_of_a_real_engine_in_time_and_nothing_of_it_stays_there(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as (g, engine, provider):
            for _ in range(3):  # so that it is known how soon the cloud answers
                assert len([chunk async for chunk in await stream(g, "cloud", 3)]) > 1
            holds = await stream(g, "engine", ENDLESS)
            await anext(aiter(holds))
            await g.until(lambda: g.gateway.fleet.snapshot(g.gateway.path.clock(), 0.0).deployments["engine"].busy == 1)
            before = await load(engine)

            waits = asyncio.create_task(stream(g, "auto", 3))
            async with asyncio.timeout(LIMIT):
                while (await load(engine))["waiting"] == 0:
                    await asyncio.sleep(0.02)
            answer = await waits
            assert answer.response.headers["x-hybridgate-deployment"] == "cloud"
            assert answer.response.headers["x-hybridgate-attempts"] == "2"
            assert (await load(engine))["waiting"] == 0, "it is not computed for nobody"
            assert len([chunk async for chunk in answer]) > 1
            after = await load(engine)
            assert (after["running"], after["aborted_total"]) == (1, before["aborted_total"] + 1)
            assert provider.received == 4

            (line,) = [line for line in g.log.lines if line.get("failed")]
            assert (line["outcome"], line["deployment"]) == ("ok", "cloud") and set(line["failed"]) == {"engine"}
            assert line["first_token_ms"] < LIMIT * 1000
            known = g.gateway.fleet.snapshot(g.gateway.path.clock(), 0.0).deployments["engine"]
            assert (known.circuit, known.down, known.in_flight) == ("closed", None, 1), "it did nothing wrong"

            await holds.close()
            await g.until(lambda: g.gateway.fleet.snapshot(g.gateway.path.clock(), 0.0).deployments["engine"].busy == 0)
            again = await stream(g, "auto", 3)
            assert again.response.headers["x-hybridgate-deployment"] == "engine"
            assert len([chunk async for chunk in again]) > 1

    asyncio.run(check())
