"""The real engine with the bundled model, supervised by a real gateway, asked by the official client."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.loading import load_policy
from gateway.settings import Settings
from tests.fakes import CARD
from tests.running import Running, running

SHIPPED = Path(__file__).parents[2] / "policies" / "default.yaml"
QUESTION = "What is TTFT?"


def with_engine(test: Callable[[Running], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running(load_policy(SHIPPED, {}), Settings(drain_seconds=1.0)) as gateway:
            await gateway.ready("local", patience=180)
            await test(gateway)

    asyncio.run(run())


async def ask(g: Running, text: str = QUESTION, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return await g.openai.chat.completions.create(model="auto", messages=messages, **more)


async def load(g: Running) -> dict[str, Any]:
    """The engine's own account of its work."""
    supervisor = g.gateway.supervisors["local"]
    transport = httpx.AsyncHTTPTransport(uds=supervisor.spec.uds)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        told: dict[str, Any] = (await client.get("/load")).json()
        return told


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - what is awaited happens in a server, without an event
            await asyncio.sleep(0.02)


def test_answers_are_right_deterministic_and_stay_home() -> None:
    async def check(g: Running) -> None:
        first = (await ask(g, temperature=0)).choices[0].message.content
        assert "first token" in first.lower()
        streamed = [c async for c in await ask(g, temperature=0, stream=True) if c.choices]
        assert "".join(c.choices[0].delta.content or "" for c in streamed) == first
        assert streamed[-1].choices[0].finish_reason == "stop" and streamed[0].model == "demo"
        answers = await asyncio.gather(*(ask(g, temperature=1.0, seed=7, max_tokens=24) for _ in range(50)))
        assert len({a.choices[0].message.content for a in answers}) == 1, "one seed, one answer, whoever else is asking"
        assert (await ask(g, f"my card number is {CARD}")).choices[0].message.content
        assert "4111" not in repr(g.log.lines)

    with_engine(check)


def test_sixteen_streams_all_progress_together() -> None:
    async def check(g: Running) -> None:
        async def stream() -> tuple[float, float]:
            times = []
            options: Any = {"ignore_eos": True}
            async for _ in await ask(g, stream=True, max_tokens=64, extra_body=options):
                times.append(time.monotonic())
            return times[0], times[-1]

        spans = await asyncio.gather(*(stream() for _ in range(16)))
        assert max(first for first, _ in spans) < min(last for _, last in spans), "each began before any had ended"

    with_engine(check)


def test_a_client_that_leaves_stops_its_sequence_and_frees_its_blocks() -> None:
    async def check(g: Running) -> None:
        before = await load(g)
        stream = await ask(g, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
        await anext(aiter(stream))
        await stream.close()

        async def stopped() -> bool:
            now = await load(g)
            return bool(
                now["aborted_total"] == before["aborted_total"] + 1
                and now["running"] == 0
                and now["free_blocks"] == before["free_blocks"]
            )

        await until(stopped)
        assert (await load(g))["steps_total"] - before["steps_total"] < 900, "it did not run to its end"

    with_engine(check)


def test_a_killed_engine_ends_its_requests_cleanly_and_comes_back() -> None:
    async def check(g: Running) -> None:
        stream = await ask(g, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
        chunks = aiter(stream)
        await anext(chunks)
        pid = g.gateway.supervisors["local"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            async for _ in chunks:
                pass
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(g)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        assert (await g.http.get("/livez")).status_code == 200

        async def back() -> bool:
            with suppress(openai.APIError):
                return bool((await ask(g, max_tokens=4)).choices)
            return False

        await until(back, 180)
        assert g.gateway.supervisors["local"].pid != pid

    with_engine(check)


def test_a_prompt_that_fits_nowhere_is_told_each_window_and_the_count() -> None:
    async def check(g: Running) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(g, "tokens " * 4000)
        assert caught.value.code == "context_length_exceeded" and "window of 1024" in caught.value.message
        assert (await ask(g, max_tokens=4)).choices

    with_engine(check)
