"""Engines are asked how busy they are and what they serve; one that does not answer is missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import orjson
import pytest

from gateway.engines import Known
from gateway.fleet import Fleet
from gateway.loads import Loads, Source
from gateway.snapshot import EngineLoad
from gateway.types import Capability, Deployment, Replica
from tests.fakes import deployment
from tests.gateway.test_readings import LOAD, metrics


@dataclass
class Told:
    """What a fleet would be told."""

    loads: list[tuple[str, EngineLoad]] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    described: dict[str, Known] = field(default_factory=dict)

    def loaded(self, name: str, load: EngineLoad, asked_at: float, now: float, replica: Replica | None = None) -> None:
        self.loads.append((name, load))

    def missed(self, name: str, replica: Replica | None = None) -> None:
        self.misses.append(name)

    def describe(self, name: str, known: Known) -> None:
        self.described[name] = known


def engine(**changed: object) -> Deployment:
    values = {"backend": "local", "urls": ("http://engine:8000/v1",), "zone": "on_premises"}
    return deployment("home", **(values | changed))


def asked(answer: Callable[[httpx.Request], httpx.Response], d: Deployment, until: Callable[[Told], bool]) -> Told:
    """Follow one deployment, whose address answers so, until the condition holds."""
    told = Told()

    def client(source: Source) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=source.root, transport=httpx.MockTransport(answer))

    async def run() -> None:
        loads = Loads(told, told.describe, lambda: 0.0, client=client)
        source = Source.of(d, None, None)
        assert source is not None
        loads.follow([source])
        async with asyncio.timeout(5):
            while not until(told):  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.005)
        await loads.stop()

    asyncio.run(run())
    return told


@pytest.mark.parametrize(
    ("d", "root"),
    [
        (engine(), "http://engine:8000"),
        (engine(backend="openai", load="vllm", urls=("https://a/llm/v1",)), "https://a/llm"),
        (engine(backend="openai"), None),
        (engine(unavailable="URL is not set"), None),
        (engine(urls=()), None),
    ],
)
def test_who_says_how_busy_it_is(d: Deployment, root: str | None) -> None:
    source = Source.of(d, None, None)
    assert (source and source.root) == root


def test_the_socket_of_an_engine_of_our_own_is_asked() -> None:
    source = Source.of(engine(urls=()), "/tmp/x.sock", None)
    assert source is not None and (source.uds, source.root) == ("/tmp/x.sock", "http://engine")


def test_a_reading_reaches_the_fleet() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=orjson.dumps(LOAD)) if request.url.path == "/load" else httpx.Response(404)

    told = asked(answer, engine(), lambda t: bool(t.loads))
    assert told.loads[0][0] == "home" and told.loads[0][1].queued_prefill_tokens == 700 and not told.misses


def test_vllm_is_asked_for_its_metrics() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://engine:8000/metrics"
        return httpx.Response(200, content=metrics(5000, 1.0, 2.0, 100))

    told = asked(answer, engine(backend="openai", load="vllm"), lambda t: bool(t.loads))
    assert told.loads[0][1].running == 4


@pytest.mark.parametrize("status", [200, 404, 500, 0])
def test_what_cannot_be_read_is_missed(status: int) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if not status:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(status, text="<html>")

    told = asked(answer, engine(), lambda t: bool(t.misses))
    assert not told.loads and not told.described


def test_an_engine_elsewhere_is_asked_what_it_serves_until_it_says_so() -> None:
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    able = ["schema", "something newer"]
    described = {"tokenizer": tokenizer, "chat_template": "{{ messages }}", "context_window": 77, "capabilities": able}

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=LOAD if request.url.path == "/load" else described)

    told = asked(answer, engine(), lambda t: bool(t.described))
    assert told.described["home"].window == 77
    assert told.described["home"].capabilities == frozenset[Capability]({"schema"})


def test_only_what_is_followed_is_asked() -> None:
    paths: list[str] = []

    def client(source: Source) -> httpx.AsyncClient:
        def answer(request: httpx.Request) -> httpx.Response:
            paths.append(request.url.host)
            return httpx.Response(200, json=LOAD)

        return httpx.AsyncClient(base_url=source.root, transport=httpx.MockTransport(answer))

    async def run() -> None:
        told = Told()
        loads = Loads(told, told.describe, lambda: 0.0, client=client)
        a, b = (Source(name, "vllm", f"http://{name}") for name in ("a", "b"))
        loads.follow([a])
        await asyncio.sleep(0.02)
        loads.follow([b])
        await asyncio.sleep(0.02)
        loads.follow([])
        await asyncio.sleep(0.02)
        await loads.stop()

    asyncio.run(run())
    assert paths == ["a", "b"]


A, B = (Replica("https://engines.example:8443/v1", address) for address in ("10.0.0.1", "fd00::1"))


def test_a_replica_is_asked_at_its_address_under_the_name_of_all() -> None:
    d = engine(urls=(A.url,))
    for replica, host in ((A, "10.0.0.1"), (B, "[fd00::1]")):
        source = Source.of(d, None, None, replica)
        assert source is not None and source.extensions == {"sni_hostname": "engines.example"}
        client = source.client()
        assert client.base_url == f"https://{host}:8443" and client.headers["host"] == "engines.example:8443"


def followed(answer: Callable[[httpx.Request, Replica], httpx.Response], until: Callable[[Fleet], bool]) -> list[str]:
    """Ask two replicas of a fleet, which answer so, until the condition holds: the paths that were asked for."""
    fleet, paths = Fleet(["home"]), list[str]()
    fleet.follow("home", [A, B])

    def client(source: Source) -> httpx.AsyncClient:
        def answered(request: httpx.Request) -> httpx.Response:
            assert source.replica is not None
            paths.append(request.url.path)
            return answer(request, source.replica)

        return httpx.AsyncClient(base_url=source.root, transport=httpx.MockTransport(answered))

    async def run() -> None:
        loads = Loads(fleet, lambda *_: None, lambda: 0.0, client=client)
        sources = (Source.of(engine(urls=(A.url,)), None, None, replica) for replica in (A, B))
        loads.follow([source for source in sources if source is not None])
        async with asyncio.timeout(10):
            while not until(fleet):  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.005)
        await loads.stop()

    asyncio.run(run())
    return paths


def test_each_replica_has_readings_of_its_own() -> None:
    def answer(request: httpx.Request, replica: Replica) -> httpx.Response:
        return httpx.Response(200, json={**LOAD, "running": 3 if replica == A else 6})

    def apart(fleet: Fleet) -> bool:
        one, other = (member.busy for member in fleet.members("home", 0.0))
        return one is not None and other is not None and one < other

    followed(answer, apart)


def test_a_replica_that_is_not_well_is_down_whatever_it_says_of_its_load() -> None:
    def answer(request: httpx.Request, replica: Replica) -> httpx.Response:
        failed = request.url.path == "/health" and replica == B
        return httpx.Response(503 if failed else 200, json=LOAD)

    followed(answer, lambda fleet: [m.up for m in fleet.members("home", 0.0)] == [True, False])


def test_what_one_replica_said_of_the_model_is_not_read_again_from_the_next() -> None:
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    described = {"tokenizer": tokenizer, "chat_template": "", "context_window": 77}
    built, asked_for = list[str](), list[Replica]()
    told = Told()

    def client(source: Source) -> httpx.AsyncClient:
        def answered(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/tokenizer" and source.replica is not None:
                asked_for.append(source.replica)
            return httpx.Response(200, json=described if request.url.path == "/tokenizer" else LOAD)

        return httpx.AsyncClient(base_url=source.root, transport=httpx.MockTransport(answered))

    async def run() -> None:
        loads = Loads(told, lambda name, _: built.append(name), lambda: 0.0, client=client)
        for replicas in ((A,), (A, B), (B,)):
            sources = (Source.of(engine(urls=(A.url,)), None, None, replica) for replica in replicas)
            loads.follow([source for source in sources if source is not None])
            async with asyncio.timeout(5):
                while len(asked_for) < min(2, len(replicas)) or not built:  # noqa: ASYNC110 - without an event
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
        assert loads.known["home"].window == 77
        await loads.stop()

    asyncio.run(run())
    assert asked_for == [A, B] and built == ["home"]
