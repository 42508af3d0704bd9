"""A real engine with one place, a request that does not end in it, and a cloud: a stream that waits for the place
leaves in time, the cloud answers it, and the engine has nothing left of it."""

from __future__ import annotations

import asyncio
import sys
import time
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
from tests.redis_server import free_port
from tests.running import Running, running
from tests.tiny_models import write_endless

pytestmark = pytest.mark.slow

WINDOW = 32_768
USUAL, ENDLESS = 500, 30_000  # tokens of an answer
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}

DEPLOYMENTS = """
version: 1
deployments:
  engine: {{backend: local, url: "{engine}/v1", model: "{model}", zone: on_premises, cost: {cheap}}}
  cloud: {{backend: openai, url: "{cloud}/v1", model: m, zone: us_cloud, context_window: 1M, cost: {dear}}}
"""
POLICY = """
version: 1
deployments: deployments.yaml
slo: {{soon: {{first_token_p95: {limit}ms}}}}
default: {{candidates: [engine, cloud], slo: soon, require: {{slo: met}}, order_by: marginal_cost}}
"""


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[tuple[Running, httpx.AsyncClient, float]]:
    """The gateway, the engine itself, and the milliseconds within which a first token is wanted: four times what the
    engine takes for a usual answer, on this machine at this moment, and 2 s. The cloud's first token takes 0.3 s."""
    model, url = str(write_endless(folder, window=WINDOW)), f"http://127.0.0.1:{(port := free_port())}"
    command = ("-m", "local_engine", "serve", "--model", model, "--port", str(port), "--max-running", "1")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        "--exit-with-parent",
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    provider = FakeProviders(Behaviour(delay=0.3))
    try:
        async with serving(provider) as cloud, httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as engine:
            limit = round(2000 + 4000 * await usual_answer_s(engine))
            cheap, dear = (f"{{usd_per_million_tokens: {{input: {usd}, output: {usd}}}}}" for usd in (0.01, 1))
            (folder / "deployments.yaml").write_text(
                DEPLOYMENTS.format(engine=url, cloud=cloud, model=model, cheap=cheap, dear=dear)
            )
            (folder / "policy.yaml").write_text(POLICY.format(limit=limit))
            async with running(load_policy(folder / "policy.yaml", {})) as gateway:
                await gateway.ready("engine", "cloud")
                yield gateway, engine, limit
    finally:
        process.kill()
        await process.wait()


async def usual_answer_s(engine: httpx.AsyncClient) -> float:
    """Seconds that an engine which may still be starting takes for a usual answer."""
    async with asyncio.timeout(180):
        while True:
            try:
                if (await engine.get("/health")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    began = time.monotonic()
    answer = await engine.post("/v1/chat/completions", json={**BODY, "max_tokens": USUAL})
    assert answer.json()["usage"]["completion_tokens"] == USUAL
    return time.monotonic() - began


async def stream(g: Running, model: str, max_tokens: int) -> AsyncStream[ChatCompletionChunk]:
    answer: AsyncStream[ChatCompletionChunk] = await g.openai.chat.completions.create(
        model=model, stream=True, max_tokens=max_tokens, **BODY
    )
    return answer


async def load(engine: httpx.AsyncClient) -> dict[str, Any]:
    told: dict[str, Any] = (await engine.get("/load")).json()
    return told


def test_a_stream_leaves_a_real_engines_queue_in_time_and_nothing_of_it_stays_there(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as (g, engine, limit):

            def known(name: str) -> Any:
                return g.gateway.fleet.snapshot(g.gateway.path.clock(), 0.0).deployments[name]

            for name, tokens in (("cloud", 3), ("cloud", 3), ("engine", USUAL)):  # what both are like
                assert [chunk async for chunk in await stream(g, name, tokens)]
            holds = await stream(g, "engine", ENDLESS)
            await anext(aiter(holds))
            await g.until(lambda: known("engine").busy == 1)
            before = await load(engine)

            waits = asyncio.create_task(stream(g, "auto", 3))
            while not waits.done() and not (await load(engine))["waiting"]:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.02)
            assert not waits.done(), "it waits at the engine"
            answer = await waits
            headers = answer.response.headers
            assert (headers["x-hybridgate-deployment"], headers["x-hybridgate-attempts"]) == ("cloud", "2")
            assert len([chunk async for chunk in answer]) > 1
            after = await load(engine)
            assert (after["waiting"], after["running"]) == (0, 1), "the engine keeps nothing for nobody"
            assert after["aborted_total"] == before["aborted_total"] + 1

            (line,) = [line for line in g.log.lines if line.get("failed")]
            assert (line["outcome"], line["deployment"], [*line["failed"]]) == ("ok", "cloud", ["engine"])
            assert line["first_token_ms"] < limit
            assert (known("engine").circuit, known("engine").in_flight) == ("closed", 1), "it has done nothing wrong"

            await holds.close()
            await g.until(lambda: known("engine").busy == 0)
            again = await stream(g, "auto", 3)
            assert again.response.headers["x-hybridgate-deployment"] == "engine"

    asyncio.run(check())
