"""Stored answers that replicas share, through the whole request path over a real Redis: one call for all of them,
nothing private where it must not lie, and a Redis that fails counts as a miss."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.backends.base import Chunk
from gateway.cache import MemoryCache, RedisCache, Seal
from gateway.caching import Answers
from gateway.chat import ChatPath
from gateway.decision import Caching
from gateway.fleet import Fleet
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import Scanner
from gateway.ledger import Counting, Hold, MemoryLedger, Reservation
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import SharedLedger
from gateway.limits import Allowance, CallerLimits, Limits
from gateway.policy import Invariant, Policy
from gateway.record import facts_from_record
from gateway.serving import Serving
from gateway.store import MOST_WAIT, TIMEOUT, Store
from gateway.terms import NO_AMOUNTS, terms_of
from gateway.types import ON_PREMISES, Caller, Usage
from tests.fakes import CARD, CLOUD, HOME, OTHER, Clock, FakeBackend, Ids, Log, completion, policy
from tests.gateway.test_cache_path import stream, text_of
from tests.gateway.test_store import BUSY, break_
from tests.patient import PATIENT, PatientLedger
from tests.redis_proxy import Proxy, proxied
from tests.redis_server import redis_server

ALWAYS = Caching(60.0, "always")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["url", "cluster", "sentinel"])
def anywhere(request: pytest.FixtureRequest) -> str:
    """One server, a cluster, what a Sentinel names."""
    found: str = request.getfixturevalue(request.param)
    return found


class Gateway:
    """One replica over fakes, with the cache in Redis."""

    def __init__(
        self,
        store: Store,
        p: Policy,
        backends: dict[str, FakeBackend],
        *,
        zone: str | None = None,
        seal: Seal | None = None,
        keys: tuple[Caller, ...] = (),
        wait: float = PATIENT,
        ledger: Counting | None = None,
    ) -> None:
        fleet, log, clock, ids = Fleet(p.deployments), Log(), Clock(), Ids(id(self))
        shared = RedisCache(store, 10**6, seal, wait=wait)
        secret = b"" if seal is None else seal.digest_secret
        self.answers = Answers(MemoryCache(100, 10**6, 10**6), clock, ids, shared, zone, secret)
        serving = Serving(p, Scanner(p.kinds), {}, Backends(backends))
        books = Books(fleet, log, lambda _: None, clock)
        self.log = log
        limiter = Limiter(ledger or MemoryLedger(), fleet, clock, clock)
        self.path = ChatPath(serving, fleet, books, limiter, clock, clock, ids, answers=self.answers)
        if keys:
            self.path.keyring = Keyring([Key(digest_of(f"hg-{c.key_id}"), c) for c in keys])

    async def ask(self, text: str = "hi", key: str | None = None, **body: Any) -> tuple[dict[bytes, bytes], bytes]:
        headers = {"authorization": f"Bearer hg-{key}"} if key else {}
        reply = await self.path.complete(
            headers, orjson.dumps({"messages": [{"role": "user", "content": text}], **body})
        )
        try:
            return dict(reply.headers), b"".join([chunk.data async for chunk in reply.chunks])
        finally:
            await reply.close()
            await self.answers.flights.settled() if not len(self.answers.flights) else None


def on(url: str, check: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        prefix = f"t{os.urandom(4).hex()}"
        async with asyncio.timeout(60), Store(url, timeout=PATIENT, prefix=prefix) as store:
            await check(store)

    asyncio.run(run())


def slow(seconds: float = 0.3, text: str = "hello") -> Any:
    return [seconds, Chunk(completion(text), usage=Usage(5, 7), last=True)]


P = policy((HOME, CLOUD, OTHER), order_by="listed", cache=ALWAYS)


def backends(**scripts: Any) -> dict[str, FakeBackend]:
    return {name: FakeBackend(list(scripts.get(name, ()))) for name in ("home", "cloud", "other")}


def calls(known: dict[str, FakeBackend]) -> int:
    return sum(len(backend.calls) for backend in known.values())


async def called(known: dict[str, FakeBackend]) -> None:
    """Wait for the first call."""
    while not calls(known):  # noqa: ASYNC110 - without an event
        await asyncio.sleep(0.01)


async def settled(*gateways: Gateway) -> None:
    """Wait until nothing of theirs is left to store or to give up."""
    for gateway in gateways:
        await gateway.answers.flights.settled()


@pytest.mark.parametrize("streams", [False, True])
def test_a_hundred_equal_requests_to_four_replicas_make_one_call(anywhere: str, streams: bool) -> None:
    async def check(store: Store) -> None:
        known = backends(home=[stream("hel", "lo", wait=0.1) if streams else slow()])
        replicas = [Gateway(store, P, known) for _ in range(4)]
        answers = await asyncio.gather(*(replicas[n % 4].ask(stream=streams) for n in range(100)))
        assert calls(known) == 1 and {text_of(data) for _, data in answers} == {"hello"}
        assert sum(headers[b"x-hybridgate-cache"] == b"miss" for headers, _ in answers) == 1
        await settled(*replicas)
        assert text_of((await replicas[3].ask(stream=not streams))[1]) == "hello" and calls(known) == 1

    on(anywhere, check)


def test_when_the_replica_that_makes_it_dies_another_does_within_a_second(anywhere: str) -> None:
    async def check(store: Store) -> None:
        known = backends(home=[[60.0], slow(0.0, "second")])
        dying, living = (Gateway(store, P, known) for _ in range(2))
        use = asyncio.create_task(dying.ask())
        await called(known)
        waiting = asyncio.create_task(living.ask())
        await asyncio.sleep(0.2)
        assert calls(known) == 1
        for task in asyncio.all_tasks():  # nothing of it is run any more: no renewal, no release
            if task.get_coro().__qualname__ == "_renewed":  # type: ignore[union-attr]
                task.cancel()
        died = time.monotonic()
        assert text_of((await waiting)[1]) == "second"
        assert time.monotonic() - died < 1.5, "a lease and a look, on a machine that may be busy"
        use.cancel()
        await asyncio.gather(use, return_exceptions=True)
        await settled(dying, living)

    on(anywhere, check)


def test_when_its_client_leaves_another_replica_goes_on_at_once(anywhere: str) -> None:
    async def check(store: Store) -> None:
        known = backends(home=[[60.0], slow(0.0, "second")])
        one, other = (Gateway(store, P, known) for _ in range(2))
        first = asyncio.create_task(one.ask())
        await called(known)
        second = asyncio.create_task(other.ask())
        await asyncio.sleep(0.1)
        first.cancel()
        async with asyncio.timeout(1.5):
            assert text_of((await second)[1]) == "second"
        await settled(one, other)

    on(anywhere, check)


def test_who_waits_with_a_client_that_leaves_goes_on_waiting_for_the_other_replica(anywhere: str) -> None:
    async def check(store: Store) -> None:
        known = backends(home=[slow(1.0, "first")])
        one, other = (Gateway(store, P, known) for _ in range(2))
        first = asyncio.create_task(one.ask())
        await called(known)
        asking = [asyncio.create_task(other.ask()) for _ in range(7)]
        for leaving in asking[:4]:
            await asyncio.sleep(0.05)
            leaving.cancel()
        staying = asking[4:]
        async with asyncio.timeout(5):
            answers = await asyncio.gather(first, *staying)
        assert {text_of(data) for _, data in answers} == {"first"} and calls(known) == 1
        await settled(one, other)

    on(anywhere, check)


async def everything_in(store: Store) -> bytes:
    names = [name async for name in store.keys(f"{store.prefix}:*")]
    values = [(await store.run(("GET", name), within=PATIENT))[0] for name in names]
    return b"\n".join([*names, *(value for value in values if isinstance(value, bytes))])


@pytest.mark.parametrize(
    ("zone", "shared"), [(None, False), ("us_cloud", False), ("on_premises", True)], ids=["none", "cloud", "home"]
)
def test_a_labelled_answer_lies_in_redis_only_where_that_is_on_premises(
    url: str, zone: str | None, shared: bool
) -> None:
    async def check(store: Store) -> None:
        known = backends()
        one, other = (Gateway(store, P, known, zone=zone) for _ in range(2))
        await one.ask(CARD)
        await settled(one)
        headers, _ = await one.ask(CARD)
        assert headers[b"x-hybridgate-cache"] == b"hit" and one.answers.memory.entries == (not shared)
        await other.ask(CARD)
        await settled(one, other)
        assert calls(known) == 2 - shared and bool(await everything_in(store)) is shared

    on(url, check)


def test_with_a_seal_redis_holds_nothing_of_what_was_asked_and_answered(anywhere: str) -> None:
    async def check(store: Store) -> None:
        known = backends(home=[slow(0.0, "zebra")])
        one, other = (Gateway(store, P, known, zone=ON_PREMISES, seal=Seal(bytes(32))) for _ in range(2))
        await one.ask("giraffe")
        await settled(one)
        assert text_of((await other.ask("giraffe"))[1]) == "zebra" and calls(known) == 1
        held = await everything_in(store)
        assert held and b"zebra" not in held and b"giraffe" not in held

    on(anywhere, check)


def test_a_redis_that_cannot_be_asked_counts_as_a_miss() -> None:
    async def check() -> None:
        async with Store("redis://127.0.0.1:1") as store:
            known = backends(home=[slow(0.05)])
            gateway = Gateway(store, P, known, wait=0.04)
            began = time.monotonic()
            answers = await asyncio.gather(*(gateway.ask() for _ in range(10)))
            assert calls(known) == 1 and time.monotonic() - began < 2, "in a process equal requests still share a call"
            assert {text_of(data) for _, data in answers} == {"hello"}
            await settled(gateway)
            headers, _ = await gateway.ask()
            assert headers[b"x-hybridgate-cache"] == b"miss" and gateway.answers.counts.unavailable >= 2
            await settled(gateway)

    asyncio.run(check())


LIMITED = Caller(
    "acme",
    "limited",
    limits=CallerLimits(
        key=Limits((Allowance("requests_per_minute", 500), Allowance("tokens_per_minute", 10**6))),
        tenant=Limits((Allowance("concurrent_requests", 50), Allowance("usd_per_day", 10**12))),
    ),
)


class Counted(FakeBackend):
    """Notes how many exchanges there were when it is called."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self.proxy = proxy
        self.at: list[int] = []

    async def open(self, call: Any) -> Any:
        self.at.append(self.proxy.passed)
        return await super().open(call)


@pytest.mark.parametrize("streams", [False, True])
def test_limits_and_stored_answers_take_one_exchange_before_the_call_and_one_after(url: str, streams: bool) -> None:
    async def check() -> None:
        async with proxied(url) as proxy, Store(proxy.url, timeout=PATIENT) as store:
            await store.run(("FLUSHALL",), within=PATIENT)
            ledger, home = PatientLedger(store), Counted(proxy)
            if streams:
                home.scripts = [stream("hel", "lo") for _ in range(7)]
            gateway = Gateway(store, P, {**backends(), "home": home}, keys=(LIMITED,), ledger=ledger)

            async def exchanges(text: str) -> tuple[bytes, int, int]:
                began, called_before = proxy.passed, len(home.at)
                headers, _ = await gateway.ask(text, "limited", stream=streams)
                answered = home.at[-1] if len(home.at) > called_before else proxy.passed
                await settled(gateway)
                await ledger.close(patience=PATIENT)
                return headers[b"x-hybridgate-cache"], answered - began, proxy.passed - answered

            for text in ("the scripts are sent once", "and a connection is opened"):
                await exchanges(text)
            misses = [await exchanges(str(n)) for n in range(5)]
            hits = [await exchanges(str(n)) for n in range(5)]
            # The one in the middle: where the machine is busy a claim may be renewed meanwhile.
            assert sorted(misses)[2] == (b"miss", 1, 1) and sorted(hits)[2] == (b"hit", 1, 1)
            used = await store.run(("HGET", "hybridgate:{ledger}:key:limited requests/min/500ms", "s"), within=PATIENT)
            assert used == [b"12"], "each counts as a request"

    asyncio.run(check())


def test_wherever_redis_is_equal_requests_are_one_call_and_each_counts(anywhere: str) -> None:
    async def check(store: Store) -> None:
        known = backends(home=[slow()])
        ledgers = [PatientLedger(store) for _ in range(3)]
        replicas = [Gateway(store, P, known, keys=(LIMITED,), ledger=ledger) for ledger in ledgers]
        answers = await asyncio.gather(*(replicas[n % 3].ask(key="limited") for n in range(30)))
        assert calls(known) == 1 and {text_of(data) for _, data in answers} == {"hello"}
        await settled(*replicas)
        for ledger in ledgers:
            await ledger.close(patience=PATIENT)
        probe = terms_of("limited", "acme", LIMITED.limits, "", None).holds(NO_AMOUNTS, time.time())
        told = await ledgers[0].reserve(
            "probe", [Hold(h.limit, 0) for h in probe if h.limit.kind != "slots"], 30.0, 0.0
        )
        assert isinstance(told, Reservation)
        used = {hold.limit.account: used for hold, used in zip(told.holds, told.used, strict=True)}
        assert used["key:limited requests/min"] == 30 and used["key:limited tokens/min"] == 12, "5 and 7, once"
        (open_,) = [hold for hold in probe if hold.limit.kind == "slots"]
        slot = await ledgers[0].reserve("slot", [Hold(open_.limit, 1)], 30.0, 0.0)
        assert isinstance(slot, Reservation) and slot.used == (1,), "all others are free again"

    on(anywhere, check)


REPLICA = """
import asyncio, sys
from gateway.store import Store
from tests.gateway.test_cache_shared import PATIENT, P, Gateway, backends, calls, settled, slow, text_of

async def main(url, prefix, name):
    async with asyncio.timeout(60), Store(url, timeout=PATIENT, prefix=prefix) as store:
        known = backends(home=[slow(0.5)] * 20)
        gateway = Gateway(store, P, known)
        here = f"{prefix}:here"
        await store.run(("SADD", here, name), within=PATIENT)
        while (await store.run(("SCARD", here), within=PATIENT))[0] < 2:
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(*(gateway.ask() for _ in range(20)))
        assert {text_of(data) for _, data in answers} == {"hello"}
        await settled(gateway)
        print(calls(known))

asyncio.run(main(*sys.argv[1:]))
"""


def test_two_processes_make_one_call_for_equal_requests(anywhere: str) -> None:
    prefix = f"t{os.urandom(4).hex()}"
    command = [sys.executable, "-c", REPLICA, anywhere, prefix]
    running = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("one", "other")]
    told = [process.communicate(timeout=90)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0] and sum(map(int, told)) == 1


@pytest.mark.parametrize("how", ["slow", "silent", "gone"])
def test_a_redis_that_fails_keeps_a_request_with_limits_no_longer_than_it_may(url: str, how: str) -> None:
    async def check() -> None:
        async with proxied(url) as proxy, Store(proxy.url, prefix=how) as store:
            ledger, known = SharedLedger(store, RedisLedger(store)), backends()
            gateway = Gateway(store, P, known, keys=(LIMITED,), ledger=ledger, wait=TIMEOUT)
            await gateway.ask("first", "limited")
            await settled(gateway)
            break_(proxy, how)
            waits, told = [], []
            for number in range(10):
                began = time.monotonic()
                headers, data = await gateway.ask(str(number), "limited")
                waits.append(time.monotonic() - began)
                told.append(headers.get(b"x-hybridgate-cache", data))
            assert max(waits) < MOST_WAIT + BUSY
            refused = [answer for answer in told if answer != b"miss"]  # before anybody knows that it is slow
            assert len(refused) < 3 and told[-1] == b"miss", "what cannot be asked is a miss"
            assert all(b"limits_unavailable" in answer for answer in refused) and calls(known) == 11 - len(refused)
            await settled(gateway)
            await ledger.close()

    asyncio.run(check())


_callers = (
    Caller("acme", "a"),
    Caller("globex", "b"),
    Caller("acme", "labelled", labels=frozenset({"personal"})),
    Caller("acme", "tagged", tags=frozenset({"hr"})),
    Caller("globex", "narrow", deployments=frozenset({"home", "other"})),
)
_invariants = st.lists(
    st.builds(
        Invariant,
        st.just("i"),
        st.sets(st.sampled_from(["personal", "unscannable"])).map(frozenset),
        st.sets(st.sampled_from(["on_premises", "eu_cloud", "us_cloud"]), min_size=1).map(frozenset),
        tenant=st.sets(st.sampled_from(["acme", "globex"])).map(frozenset),
        key_tag=st.just(frozenset()),
        mask=st.sampled_from([frozenset(), frozenset({"personal"})]),
    ).filter(lambda i: bool(i.any_label or i.tenant)),
    max_size=2,
)
_asks = st.lists(
    st.tuples(
        st.sampled_from([c.key_id for c in _callers]),
        st.sampled_from(["hello", "bye", f"card {CARD}"]),
        st.booleans(),
        st.sampled_from([{}, {"temperature": 0}, {"seed": 1}]),
        st.integers(0, 1),
        st.sampled_from([None, None, "restricted"]),
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    _invariants,
    st.sampled_from([Caching(60.0, "always"), Caching(60.0), Caching(60.0, "always", "shared")]),
    st.sampled_from([None, "us_cloud", "on_premises"]),
    _asks,
)
def test_no_answer_crosses_tenants_or_labels_and_nothing_private_lies_in_redis(
    url: str, invariants: list[Invariant], caching: Caching, zone: str | None, asks: list[Any]
) -> None:
    p = policy((CLOUD, HOME, OTHER), order_by="listed", cache=caching, invariants=invariants)
    tenants = {caller.key_id: caller.tenant for caller in _callers}
    always = {caller.key_id: "personal" in caller.labels or "hr" in caller.tags for caller in _callers}

    async def check(store: Store) -> None:
        known = backends()
        replicas = [Gateway(store, p, known, zone=zone, keys=_callers) for _ in range(2)]
        made: dict[bytes, tuple[str, bool, str, str]] = {}
        for number, (key, text, streams, body, replica, header) in enumerate(asks):
            labelled = always[key] or CARD in text or header is not None
            word = f"word-{number:03}"
            script = stream(word) if streams else [Chunk(completion(word), usage=Usage(5, 7), last=True)]
            for backend in known.values():
                backend.scripts[:] = [script] * 3
            headers = {"authorization": f"Bearer hg-{key}"} | ({"x-data-class": header} if header else {})
            asked = orjson.dumps({"messages": [{"role": "user", "content": text}], "stream": streams, **body})
            gateway = replicas[replica]
            reply = await gateway.path.complete(headers, asked)
            data = b"".join([chunk.data async for chunk in reply.chunks])
            await reply.close()
            await gateway.answers.flights.settled()
            told = dict(reply.headers)
            if reply.status != 200:
                continue
            said = text_of(data).encode()
            permit = p.permit(gateway_facts(gateway))
            deployment = told[b"x-hybridgate-deployment"].decode()
            if told[b"x-hybridgate-cache"] == b"hit":
                whose, was_labelled, what, how = made[said]
                assert (what, how) == (text, str(body)) and was_labelled == labelled
                assert whose == tenants[key] or (caching.scope == "shared" and not labelled)
                assert permit.allows(p.deployments[deployment].zone), "an answer from where this one may not go"
                assert key != "narrow" or deployment != "cloud"
            else:
                assert said == word.encode()
                made[said] = tenants[key], labelled, text, str(body)
            if labelled and zone != ON_PREMISES:
                assert said not in await everything_in(store)
            if permit.zones is not None and (zone is None or zone not in permit.zones):
                assert said not in await everything_in(store), "an invariant keeps it from where Redis is"

    on(url, check)


def gateway_facts(gateway: Gateway) -> Any:
    """The facts of the last request, as its record has them."""
    line = gateway.log.lines[-1]
    return replace(facts_from_record(line["facts"]), labels=frozenset(line["labels"]))
