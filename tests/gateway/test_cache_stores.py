"""The cache's contract, in memory and in a real Redis: one server, a cluster, what a Sentinel names; claims, sealing,
and what an operator sees of it."""

from __future__ import annotations

import asyncio
import os
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.cache import (
    EVERYTHING,
    Cache,
    CacheUnavailable,
    Chosen,
    Entry,
    MemoryCache,
    RedisCache,
    Seal,
    packed,
    secret_in,
)
from gateway.store import Store
from gateway.types import Usage
from tests.redis_server import redis_server

NOW = 1_800_000_000.0
KEY, OTHER = bytes(32), bytes(31) + b"\1"
PATIENT = 30.0  # the machine that runs the tests may be busy
MOST = 4_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["server", "cluster", "sentinel"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


def entry(body: bytes = b'{"choices":[]}', **changed: Any) -> Entry:
    values: dict[str, Any] = {
        "tenant": "acme",
        "model": "auto",
        "deployment": "home",
        "zone": "on_premises",
        "target": "openai m none",
        "stored_at": NOW,
        "usage": Usage(3, 4, 1),
        "body": body,
        "dropped": ("top_k", "x" * 5000),
    }
    return Entry(**(values | changed))


Check = Callable[[Cache], Awaitable[None]]


@pytest.fixture(params=["memory", "server", "sealed", "cluster", "sentinel"])
def on(request: pytest.FixtureRequest) -> Callable[[Check], None]:
    """Runs a check on an empty cache that takes entries of up to MOST bytes."""
    kind: str = request.param
    if kind == "memory":
        return lambda check: asyncio.run(_awaited(check(MemoryCache(100, 10**6, MOST + 10_000))))
    url: str = request.getfixturevalue("server" if kind == "sealed" else kind)
    seal = Seal(bytes(range(32))) if kind == "sealed" else None

    return lambda check: shared(url, lambda store: check(RedisCache(store, MOST + 10_000, seal, wait=PATIENT)))


async def _awaited(check: Awaitable[None]) -> None:
    await check


def test_what_is_put_is_there_until_its_time_is_over(on: Callable[[Check], None]) -> None:
    async def check(cache: Cache) -> None:
        assert await cache.get(KEY, NOW) is None
        assert await cache.put(KEY, entry(), 60.0, NOW)
        assert await cache.get(KEY, NOW + 1) == entry()
        assert await cache.get(OTHER, NOW) is None
        assert await cache.put(KEY, entry(b"newer"), 0.05, NOW)
        found = await cache.get(KEY, NOW)
        assert found is not None and found.answer == b"newer"
        await asyncio.sleep(0.1)
        assert await cache.get(KEY, NOW + 0.1) is None

    on(check)


def test_what_compresses_well_comes_back_whole(on: Callable[[Check], None]) -> None:
    async def check(cache: Cache) -> None:
        body = b"the same again and again " * 1000
        small, deflated = packed(body)
        assert deflated and len(small) < len(body) / 10
        assert await cache.put(KEY, entry(small, deflated=True), 60.0, NOW)
        found = await cache.get(KEY, NOW)
        assert found is not None and found.answer == body

    on(check)


def test_what_is_too_large_is_not_put(on: Callable[[Check], None]) -> None:
    async def check(cache: Cache) -> None:
        assert not await cache.put(KEY, entry(bytes(MOST + 10_001)), 60.0, NOW)
        assert await cache.get(KEY, NOW) is None

    on(check)


def test_entries_are_counted_and_purged_by_tenant_model_and_deployment(on: Callable[[Check], None]) -> None:
    async def check(cache: Cache) -> None:
        for number in range(450):
            whose = "acme" if number % 3 else ""
            made = entry(tenant=whose, model=f"m{number % 2}", deployment=f"d{number % 5}")
            assert await cache.put(number.to_bytes(32, "big"), made, 60.0, NOW) or number >= 100
        figures = await cache.figures(NOW)
        everything = 100 if isinstance(cache, MemoryCache) else 450
        assert figures.entries == everything == sum(n for n, _ in figures.by.values()) and figures.bytes > everything
        left = everything
        for chosen, matches in (
            (Chosen(tenant="", model="m0"), lambda place: place[:2] == ("", "m0")),
            (Chosen(deployment="d1"), lambda place: place[2] == "d1"),
            (Chosen(tenant="nobody"), lambda place: False),
        ):
            expected = sum(n for place, (n, _) in (await cache.figures(NOW)).by.items() if matches(place))
            assert await cache.purge(chosen) == expected
            left -= expected
            assert (await cache.figures(NOW)).entries == left
        assert await cache.purge(EVERYTHING) == left and not (await cache.figures(NOW)).entries

    on(check)


def test_memory_keeps_what_was_used_of_late_within_its_bounds() -> None:
    async def check() -> None:
        size = entry(dropped=()).size
        for cache in (MemoryCache(3, 10**6, 10**6), MemoryCache(100, 3 * size, 10**6)):
            for number in range(3):
                await cache.put(bytes([number]), entry(), 60.0, NOW)
            assert await cache.get(b"\0", NOW)
            await cache.put(b"\3", entry(), 60.0, NOW)
            there = [number for number in range(4) if await cache.get(bytes([number]), NOW)]
            assert there == [0, 2, 3] and cache.entries == 3 and cache.size == 3 * size

    asyncio.run(check())


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(0, 900), st.floats(0.1, 5)),
        st.tuples(st.just("get"), st.integers(0, 5)),
        st.tuples(st.just("later"), st.floats(0, 3)),
        st.tuples(st.just("purge"), st.sampled_from(["acme", "other"])),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(_steps)
def test_memory_never_exceeds_its_bounds_and_never_tells_what_is_over(steps: list[Any]) -> None:
    async def check() -> None:
        cache, now = MemoryCache(4, 5000, 2000), NOW
        known: dict[int, tuple[Entry, float]] = {}
        for step, *values in steps:
            if step == "put":
                made = entry(bytes(values[1]), tenant="acme" if values[0] % 2 else "other")
                if await cache.put(bytes([values[0]]), made, values[2], now):
                    known[values[0]] = made, now + values[2]
            elif step == "get":
                found = await cache.get(bytes([values[0]]), now)
                expected = known.get(values[0])
                assert found is None or (expected is not None and found is expected[0] and now < expected[1])
            elif step == "later":
                now += values[0]
            else:
                await cache.purge(Chosen(tenant=values[0]))
                known = {n: (made, until) for n, (made, until) in known.items() if made.tenant != values[0]}
            assert cache.entries <= 4 and cache.size <= 5000
            figures = await cache.figures(now)
            assert figures.entries <= cache.entries and figures.bytes <= cache.size

    asyncio.run(check())


def shared(url: str, check: Callable[[Store], Awaitable[None]]) -> None:
    """Runs a check on a prefix of its own."""

    async def run() -> None:
        async with Store(url, timeout=PATIENT, prefix=f"t{os.urandom(4).hex()}") as store:
            await check(store)

    asyncio.run(run())


def test_one_replica_at_a_time_makes_an_answer(url: str) -> None:
    async def check(store: Store) -> None:
        one, other = (RedisCache(store, MOST * 3, wait=PATIENT) for _ in range(2))
        assert await one.claim(KEY, "a", NOW) == "won"
        assert await other.claim(KEY, "b", NOW) == "taken" and await other.claim(OTHER, "b", NOW) == "won"
        await other.release(KEY, "b")
        assert await other.claim(KEY, "b", NOW) == "taken", "it was not its own"
        await one.release(KEY, "a")
        assert await other.claim(KEY, "b", NOW) == "won"
        await other.put(KEY, entry(), 60.0, NOW)
        assert await one.claim(KEY, "a", NOW) == entry()

    shared(url, check)


def test_a_claim_ends_within_a_second_of_its_replicas_death_and_lives_while_it_is_renewed(url: str) -> None:
    async def check(store: Store) -> None:
        cache = RedisCache(store, MOST * 3, wait=PATIENT)
        assert await cache.claim(KEY, "a", NOW) == "won"
        for _ in range(6):
            await asyncio.sleep(0.2)
            await cache.renew(KEY, "a")
            assert await cache.claim(KEY, "b", NOW) == "taken"
        await cache.renew(KEY, "b")
        await asyncio.sleep(1.0)
        assert await cache.claim(KEY, "b", NOW) == "won"

    shared(url, check)


SECRET, NEXT = bytes(range(32)), bytes(range(1, 33))


async def _stored(store: Store) -> dict[bytes, bytes]:
    names = [name async for name in store.keys(f"{store.prefix}:*")]
    return {name: (await store.run(("GET", name), within=PATIENT))[0] for name in names}


def test_a_sealed_entry_says_nothing_opens_nowhere_else_and_under_no_other_secret(url: str) -> None:
    async def check(store: Store) -> None:
        sealing = RedisCache(store, MOST * 3, Seal(SECRET), wait=PATIENT)
        secretive = entry(b'{"choices":"zebra"}', dropped=("giraffe",))
        await sealing.put(KEY, secretive, 60.0, NOW)
        ((name, value),) = (await _stored(store)).items()
        assert b"zebra" not in value and b"giraffe" not in value and KEY.hex().encode() in name
        await store.run(("SET", name.replace(KEY.hex().encode(), OTHER.hex().encode()), value), within=PATIENT)
        assert await sealing.get(KEY, NOW) == secretive and await sealing.get(OTHER, NOW) is None
        assert await RedisCache(store, MOST, Seal(NEXT), wait=PATIENT).get(KEY, NOW) is None
        assert await RedisCache(store, MOST, None, wait=PATIENT).get(KEY, NOW) is None
        head = value.replace(b'"acme"', b'"evil"')
        assert head != value
        await store.run(("SET", name, head), within=PATIENT)
        assert await sealing.get(KEY, NOW) is None, "what stands in clear cannot be changed either"
        await RedisCache(store, MOST * 3, None, wait=PATIENT).put(KEY, entry(), 60.0, NOW)
        assert await sealing.get(KEY, NOW) is None, "what anybody could have put there is not believed"

    shared(url, check)


@pytest.mark.parametrize("value", [b"", b"x", b"\0\0\0\1{", b"\xff" * 40, b"\0\0\0\2{}rest", b"\0\0\0\4nullx"])
def test_what_is_no_entry_counts_as_none(url: str, value: bytes) -> None:
    async def check(store: Store) -> None:
        cache = RedisCache(store, MOST * 3, wait=PATIENT)
        await store.run(("SET", f"{store.prefix}:cache:{{{KEY.hex()}}}", value), within=PATIENT)
        assert await cache.get(KEY, NOW) is None and await cache.claim(KEY, "a", NOW) == "won"
        assert (await cache.figures(NOW)).entries == 0
        assert await cache.put(KEY, entry(), 60.0, NOW) and await cache.get(KEY, NOW) == entry()

    shared(url, check)


@pytest.mark.parametrize(
    "changed",
    [
        {"stored_at": "x"},
        {"deployment": ["home"]},
        {"zone": None},
        {"usage": Usage("3", 4, 1)},  # type: ignore[arg-type]
        {"dropped": (1,)},
        {"deflated": "yes"},
    ],
)
def test_an_entry_of_wrong_types_counts_as_none(url: str, changed: dict[str, Any]) -> None:
    async def check(store: Store) -> None:
        cache = RedisCache(store, MOST * 3, wait=PATIENT)
        await cache.put(KEY, entry(**changed), 60.0, NOW)
        assert await cache.get(KEY, NOW) is None

    shared(url, check)


def test_an_entry_whose_end_is_missing_counts_as_none(url: str) -> None:
    async def check(store: Store) -> None:
        cache = RedisCache(store, MOST * 3, wait=PATIENT)
        await cache.put(KEY, entry(), 60.0, NOW)
        ((name, value),) = (await _stored(store)).items()
        await store.run(("SET", name, value[:-3]), within=PATIENT)
        assert await cache.get(KEY, NOW) is None, "half an answer is none"

    shared(url, check)


def test_a_store_that_is_down_is_unavailable() -> None:
    async def check() -> None:
        async with Store("redis://127.0.0.1:1") as store:
            cache = RedisCache(store, MOST)
            for call in (
                cache.get(KEY, NOW),
                cache.claim(KEY, "a", NOW),
                cache.put(KEY, replace(entry(), dropped=()), 60.0, NOW),
                cache.renew(KEY, "a"),
                cache.release(KEY, "a"),
                cache.figures(NOW),
                cache.purge(EVERYTHING),
            ):
                with pytest.raises(CacheUnavailable):
                    await call

    asyncio.run(check())


@pytest.mark.parametrize("text", [SECRET.hex(), SECRET.hex().upper() + "\n", b64encode(SECRET).decode() + "\n"])
def test_a_secret_is_read(text: str) -> None:
    assert secret_in(text) == SECRET
    assert len({SECRET, Seal(SECRET).digest_secret, Seal(NEXT).digest_secret}) == 3


NO_SECRETS = ["", "hunter2hunter2", SECRET.hex()[:-2], "z" * 64, b64encode(bytes(16)).decode()]


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        secret_in(text)
    assert not text or text not in str(caught.value)
