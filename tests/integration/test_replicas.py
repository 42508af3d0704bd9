"""One deployment, several engines: processes of their own at addresses of loopback, behind one name that a test leads
where it wants. The engines are this project's, with a few lines of arithmetic for a model."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import orjson
import pytest

from gateway.admin import Admin
from gateway.types import Timeouts
from tests.fakes import deployment, policy
from tests.running import Running, running

LETTERS = (sys.executable, str(Path(__file__).parents[1] / "local_engine" / "program.py"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is loopback on Linux alone"),
]


@dataclass
class Engines:
    """Engines at 127.0.0.1, 127.0.0.2, … and the name that leads to some of them."""

    port: int
    named: list[str] = field(default_factory=list)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def resolve(self, host: str) -> Sequence[str]:
        assert host == "localhost"
        return list(self.named)

    async def start(self, *addresses: str) -> None:
        """Start engines there, wait until they are ready, and let the name lead to them, too."""
        for address in addresses:
            command = (*LETTERS, f"{address}:{self.port}", "1", "0", "--exit-with-parent")
            self.processes[address] = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
        async with httpx.AsyncClient(trust_env=False) as client:
            for address in addresses:
                while not await self._ready(client, address):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
        self.named += addresses

    async def _ready(self, client: httpx.AsyncClient, address: str) -> bool:
        try:
            return (await client.get(f"http://{address}:{self.port}/health")).is_success
        except httpx.HTTPError:
            return False

    async def kill(self, address: str) -> None:
        process = self.processes.pop(address)
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def stop(self) -> None:
        for address in list(self.processes):
            await self.kill(address)


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def world(*addresses: str) -> AsyncIterator[tuple[Running, Engines]]:
    """A gateway over engines at these addresses."""
    engines = Engines(free_port())
    try:
        async with asyncio.timeout(60):
            await engines.start(*addresses)
        home = deployment(
            "home",
            backend="local",
            model="letters",
            zone="on_premises",
            urls=(f"http://localhost:{engines.port}/v1",),
            networks=("127.0.0.0/8",),
            window=None,
            timeouts=Timeouts(connect=15.0),  # of a loop that callers, gateway and engines' readings share
        )
        async with running(policy([home], order_by="listed"), resolve=engines.resolve) as gateway:
            if len(addresses) > 1:
                await up(gateway, len(addresses))
            yield gateway, engines
    finally:
        await engines.stop()


def in_world(test: Callable[[Running, Engines], Awaitable[None]], *addresses: str) -> None:
    async def run() -> None:
        async with world(*addresses) as (gateway, engines):
            await test(gateway, engines)

    asyncio.run(run())


async def replicas(g: Running) -> dict[str, int]:
    """What /readyz says."""
    told: dict[str, int] = (await g.http.get("/readyz")).json()["deployments"]["home"].get("replicas", {})
    return told


async def up(g: Running, count: int, known: int | None = None) -> None:
    """Wait until so many replicas are up, of so many."""
    async with asyncio.timeout(30):
        while await replicas(g) != {"up": count, "known": known or count}:  # noqa: ASYNC110 - without an event
            await asyncio.sleep(0.02)


async def ask(g: Running, text: str, tokens: int = 20) -> list[str]:
    """The letters of an answer as they came. Raises where it fails, with what had come in `args`."""
    messages: Any = [{"role": "user", "content": text}]
    letters: list[str] = []
    try:
        stream = await g.openai.chat.completions.create(
            model="auto", messages=messages, stream=True, max_tokens=tokens, extra_body={"ignore_eos": True}
        )
        async for chunk in stream:
            letters += [chunk.choices[0].delta.content or ""] if chunk.choices else []
    except openai.APIError as error:
        raise RuntimeError("".join(letters)) from error
    return letters


def answered(g: Running) -> Counter[int]:
    """How many requests each replica answered, by the records."""
    return Counter(line["replica"] for line in g.log.lines if line.get("replica") is not None)


def word(number: int) -> str:
    """A conversation that no other number has, in the letters that the model knows."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:05}")


def test_engines_behind_one_name_share_the_requests_and_each_conversation_has_one_of_them() -> None:
    async def check(g: Running, engines: Engines) -> None:
        for first in range(0, 60, 6):
            answers = await asyncio.gather(*(ask(g, word(first + number)) for number in range(6)))
            assert all(len("".join(letters)) == 20 for letters in answers)
        shares = answered(g)
        assert set(shares) == {0, 1, 2} and min(shares.values()) >= 6, shares
        g.log.lines.clear()
        for _ in range(12):
            await ask(g, word(4711))
        assert answered(g).most_common(1)[0][1] >= 9, f"{answered(g)} all but where readings are late on a busy machine"
        metrics = g.gateway.metrics.exposition().decode()
        assert 'hybridgate_replica_up{deployment="home",replica="2"} 1.0' in metrics
        assert "127.0.0" not in metrics and "127.0.0" not in repr(g.log.lines)

    in_world(check, "127.0.0.1", "127.0.0.2", "127.0.0.3")


def test_an_engine_that_is_killed_under_load_costs_only_the_streams_that_it_had_begun() -> None:
    async def check(g: Running, engines: Engines) -> None:
        stop, cut, whole = asyncio.Event(), list[str](), list[int]()

        async def caller(number: int) -> None:
            while not stop.is_set():
                number += 1000
                try:
                    whole.append(len("".join(await ask(g, word(number), 40))))
                except RuntimeError as error:
                    cut.append(str(error))

        callers = [asyncio.create_task(caller(number)) for number in range(12)]
        await g.until(lambda: g.gateway.fleet.members("home", 0.0)[1].in_flight > 1, patience=15)
        under_way = g.gateway.fleet.members("home", 0.0)[1].in_flight
        await engines.kill("127.0.0.2")
        await up(g, 2, known=3)
        await engines.start("127.0.0.4")
        engines.named.remove("127.0.0.2")
        await up(g, 3)
        g.log.lines.clear()
        await g.until(lambda: len(answered(g)) == 3, patience=15)
        stop.set()
        await asyncio.gather(*callers)
        assert under_way and len(cut) <= under_way and all(cut), "each had begun: the caller had some of its answer"
        assert len(whole) > 30 and set(whole) == {40}

    in_world(check, "127.0.0.1", "127.0.0.2", "127.0.0.3")


def test_an_address_that_is_gone_from_the_name_gets_nothing_new_and_ends_what_it_has() -> None:
    async def check(g: Running, engines: Engines) -> None:
        long = [asyncio.create_task(ask(g, word(number), 1500)) for number in range(6)]
        await g.until(lambda: min(m.in_flight for m in g.gateway.fleet.members("home", 0.0)) > 0, patience=30)
        engines.named.remove("127.0.0.2")
        under_way = g.gateway.fleet.members("home", 0.0)[1].in_flight
        await up(g, 1)
        for number in range(20):
            await ask(g, word(100 + number))
        assert answered(g)[0] >= 20 and answered(g)[1] <= under_way
        assert [len("".join(letters)) for letters in await asyncio.gather(*long)] == [1500] * 6

    in_world(check, "127.0.0.1", "127.0.0.2")


def test_one_engine_becomes_two_and_its_streams_go_on() -> None:
    async def check(g: Running, engines: Engines) -> None:
        before = asyncio.create_task(ask(g, word(1), 1500))
        await g.until(lambda: g.gateway.fleet.snapshot(0.0, 0.0).deployments["home"].in_flight == 1)
        assert await replicas(g) == {}
        await engines.start("127.0.0.2")
        await up(g, 2)
        told = await Admin(g.gateway, cast(Any, None), None).replicas(cast(Any, None))
        (home,) = orjson.loads(told.body).values()
        assert [(one["replica"], one["address"], one["up"]) for one in home] == [
            (0, "127.0.0.1", True),
            (1, "127.0.0.2", True),
        ]
        await asyncio.gather(*(ask(g, word(number)) for number in range(20)))
        assert set(answered(g)) == {0, 1} and len("".join(await before)) == 1500

    in_world(check, "127.0.0.1")


def test_without_any_engine_the_deployment_is_down_and_says_no_address() -> None:
    async def check(g: Running, engines: Engines) -> None:
        for address in ("127.0.0.1", "127.0.0.2"):
            await engines.kill(address)
        messages: Any = [{"role": "user", "content": "a"}]
        for _ in range(4):
            with pytest.raises(openai.InternalServerError) as caught:
                await g.openai.chat.completions.create(model="auto", messages=messages)
            assert "127.0.0" not in str(caught.value) and "localhost" not in str(caught.value)
        state = (await g.http.get("/readyz")).json()
        assert state["status"] == "not ready" and state["deployments"]["home"]["replicas"] == {"up": 0, "known": 2}
        await engines.start("127.0.0.1")
        await up(g, 1, known=2)
        assert await ask(g, "a")

    in_world(check, "127.0.0.1", "127.0.0.2")
