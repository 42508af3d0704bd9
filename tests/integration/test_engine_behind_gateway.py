"""The real engine, supervised by a real gateway, asked by the official client.

The bundled model where the answer matters; where a request must be under way at a certain moment, a random model whose
answers are over only after max_tokens.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.loading import load_policy
from gateway.settings import Settings
from tests.fakes import CARD
from tests.running import Running, running
from tests.tiny_models import write_endless

SHIPPED = Path(__file__).parents[2] / "policies" / "default.yaml"
QUESTION = "What is TTFT?"
ENDLESS = 8000
"""Tokens of an answer that nobody waits for: more than ten seconds of steps on a fast core."""

Run = Callable[[Callable[[Running], Awaitable[None]]], None]


def served(environment: Mapping[str, str]) -> Iterator[Run]:
    """One gateway with its engine for all tests of a module; its event loop runs while a test does."""

    @asynccontextmanager
    async def ready() -> AsyncIterator[Running]:
        async with running(load_policy(SHIPPED, environment), Settings(drain_seconds=1.0)) as gateway:
            await gateway.ready("local", patience=180)
            yield gateway

    with asyncio.Runner() as runner:
        serving = ready()
        gateway = runner.run(serving.__aenter__())
        yield lambda test: runner.run(_awaited(test(gateway)))
        runner.run(serving.__aexit__(None, None, None))


async def _awaited(test: Awaitable[None]) -> None:
    await test


@pytest.fixture(scope="module")
def bundled() -> Iterator[Run]:
    """Served with the bundled model."""
    yield from served({})


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Served with a model that does not end."""
    yield from served({"HYBRIDGATE_LOCAL_MODEL": str(write_endless(tmp_path_factory.mktemp("endless")))})


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


def test_what_the_engine_is_able_to_do_decides_what_it_is_asked(bundled: Run) -> None:
    """The bundled model follows a schema, and its template knows no tools."""

    async def test(g: Running) -> None:
        schema = {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["n"],
        }
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema | {"additionalProperties": False}}}
        answer = await ask(g, response_format=form, temperature=0, extra_headers={"x-data-class": "personal"})
        assert set(orjson.loads(answer.choices[0].message.content)) == {"n"}
        tool = {"type": "function", "function": {"name": "look"}}
        with pytest.raises(openai.BadRequestError, match="no permitted deployment supports"):
            await ask(g, tools=[tool], extra_headers={"x-data-class": "personal"})

    bundled(test)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - what is awaited happens in a server, without an event
            await asyncio.sleep(0.005)


def test_answers_are_right_deterministic_and_stay_home(bundled: Run) -> None:
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

    bundled(check)


def test_a_prompt_that_fits_nowhere_is_told_each_window_and_the_count(bundled: Run) -> None:
    async def check(g: Running) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(g, "tokens " * 4000)
        assert caught.value.code == "context_length_exceeded" and "window of 1024" in caught.value.message
        assert (await ask(g, max_tokens=4)).choices

    bundled(check)


def test_sixteen_streams_all_progress_together(endless: Run) -> None:
    """Each has its first token and goes on while the fifteen others are under way."""

    async def check(g: Running) -> None:
        before = await load(g)
        together = asyncio.Barrier(16)

        async def stream() -> None:
            chunks = await ask(g, stream=True, max_tokens=ENDLESS, temperature=0)
            await anext(aiter(chunks))
            await together.wait()
            assert (await load(g))["running"] == 16
            await together.wait()
            for _ in range(20):
                await anext(aiter(chunks))
            await together.wait()
            await chunks.close()

        async with asyncio.timeout(120):
            await asyncio.gather(*(stream() for _ in range(16)))
        await until(lambda: _idle(g))
        assert (await load(g))["aborted_total"] == before["aborted_total"] + 16, "none had ended by itself"

    endless(check)


async def _idle(g: Running) -> bool:
    now = await load(g)
    return bool(now["running"] == now["waiting"] == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_sequence_and_frees_its_blocks(endless: Run, stream: bool) -> None:
    """In the engine's own, consistent counts: with the abort all blocks are free, and at most the step that was being
    computed is counted after it."""

    async def check(g: Running) -> None:
        before = await load(g)
        asking = asyncio.create_task(ask(g, stream=stream, max_tokens=ENDLESS, temperature=0))
        if stream:
            chunks = await asking
            await anext(aiter(chunks))
            await chunks.close()
        else:

            async def generating() -> bool:
                return bool((await load(g))["steps_total"] > before["steps_total"])

            await until(generating)
            asking.cancel()

        async def aborted() -> bool:
            return bool((await load(g))["aborted_total"] > before["aborted_total"])

        await until(aborted)
        at_abort = await load(g)
        assert at_abort["aborted_total"] == before["aborted_total"] + 1
        assert at_abort["finished_total"] == before["finished_total"]
        assert (at_abort["running"], at_abort["waiting"]) == (0, 0)
        assert at_abort["free_blocks"] == at_abort["total_blocks"]
        assert (await ask(g, max_tokens=3, temperature=0)).choices
        steps = (await load(g))["steps_total"]
        assert at_abort["steps_total"] - before["steps_total"] < ENDLESS, "it did not run to its end"
        assert steps - at_abort["steps_total"] <= 1 + 3, "one step that was under way, three of the next request"

    endless(check)


def test_a_killed_engine_ends_its_requests_cleanly_and_comes_back(endless: Run) -> None:
    """A stream that was cut ends with an error event; what waits for its first token, and has nowhere else to go, gets
    a 503. The engine is halted first, so that nothing can be answered in between."""

    async def check(g: Running) -> None:
        pid = g.gateway.supervisors["local"].pid
        assert pid is not None
        begun = await ask(g, stream=True, max_tokens=ENDLESS, temperature=0)
        await anext(aiter(begun))
        os.kill(pid, signal.SIGSTOP)
        waiting = [asyncio.create_task(ask(g, stream=stream, max_tokens=ENDLESS)) for stream in (True, False)]

        async def all_in_flight() -> bool:
            return g.gateway.fleet.snapshot(0.0, 0.0).deployments["local"].in_flight == 3

        await until(all_in_flight)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(openai.APIError) as cut:
            async for _ in begun:
                pass
        assert isinstance(cut.value.body, dict) and cut.value.body["code"], "an error event, not a broken connection"
        for task in (*waiting, asyncio.create_task(ask(g))):
            with pytest.raises(openai.InternalServerError) as refused:
                await task
            assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        assert (await g.http.get("/livez")).status_code == 200

        async def back() -> bool:
            with suppress(openai.APIError):
                return bool((await ask(g, max_tokens=4)).choices)
            return False

        await until(back, 180)
        assert g.gateway.supervisors["local"].pid != pid

    endless(check)
