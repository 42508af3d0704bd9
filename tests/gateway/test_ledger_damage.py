"""Keys of the ledger that hold what no gateway wrote: nothing hangs, nothing is raised that nobody expects, and damage
is never taken for room."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from gateway.ledger import Hold, LedgerDamaged, Limit, Refused, Reservation, Spent
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import Damage, SharedLedger
from gateway.store import Store
from tests.redis_server import redis_server

NOW = 1_800_000_000
DAYS = (NOW - 90_000, NOW - 3_600, NOW + 82_800, NOW + 169_200)
RATE = Limit("rate", "rolling", "requests", 100, window=60)
MONEY = Limit("money", "period", "nusd", 100, starts=DAYS, on_down="closed")
SLOTS = Limit("slots", "slots", "slots", 3)
LIMITS = (RATE, MONEY, SLOTS)
PLACE = 2 * NOW  # in half seconds
KEPT = 122  # of them, before the latest
KEYS = {"rate": "rate/500ms"}
LONGEST = 0.05  # seconds for one script
PATIENT = 30.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


# What a key may hold.

odd = st.sampled_from(
    [
        "",
        "-1",
        "-0",
        "+5",
        "007",
        " 5",
        "5 ",
        "1.5",
        "1e3",
        "0x10",
        "inf",
        "nan",
        "9" * 18,
        "9" * 19,
        "9" * 400,
        "é\0",
        "-",
    ]
)
number = st.integers(0, 120).map(str)
moment = st.integers(-130, 70).map(lambda n: str(NOW + n))
half = st.integers(-260, 140).map(lambda n: str(PLACE + n))
far = st.sampled_from(["0", "1", str(NOW - 10**6), str(NOW + 10**6), str(PLACE + 10**6), "9007199254740993"])
value = st.one_of(number, odd, moment, half, far)
amounts = st.dictionaries(st.one_of(half, st.just(str(PLACE))), st.one_of(number, odd), max_size=4)
rolling = st.builds(
    lambda head, amounts: {"hash": {**head, **amounts}},
    st.fixed_dictionaries({}, optional={"o": st.one_of(half, value), "n": st.one_of(half, value), "s": value}),
    amounts,
)
period = st.fixed_dictionaries(
    {}, optional={"p": st.one_of(st.sampled_from([str(d) for d in DAYS]), value), "s": value, "x": value}
).map(lambda fields: {"hash": fields})
score = st.one_of(st.integers(-10, 200_000).map(lambda n: NOW * 1000 + n), st.just(float("inf")), st.just(1e300))
slots = st.dictionaries(st.sampled_from("abcdef"), score, max_size=5).map(lambda members: {"zset": members})
wrong = st.sampled_from(
    [{"string": "5"}, {"string": "x" * 1000}, {"list": ["1"]}, {"set": ["1"]}, {"zset": {"a": 1.0}}]
)
end = st.one_of(st.integers(-5, 60).map(lambda n: str((NOW + n) * 1000)), odd, far)
places = st.lists(st.one_of(half, moment, odd, st.sampled_from([str(DAYS[1]), "0"])), max_size=4)
record = st.one_of(
    st.just({}),
    st.just({"string": "cancelled"}),
    st.builds(lambda e, p: {"string": " ".join([e, *p])}, end, places),
    st.builds(lambda e: {"string": f"{e} {PLACE} {DAYS[1]} 0"}, end),
    wrong,
)
Stored = Mapping[str, Any]
keys = st.fixed_dictionaries(
    {
        "open:r": record,
        "rate": st.one_of(st.just({}), rolling, rolling, rolling, wrong),
        "money": st.one_of(st.just({}), period, period, wrong),
        "slots": st.one_of(st.just({}), slots, slots, wrong, rolling),
    }
)


def write(redis: Redis, stored: Mapping[str, Stored]) -> None:
    redis.flushall()
    for name, held in stored.items():
        key = f"hybridgate:{{ledger}}:{KEYS.get(name, name)}"
        for kind, content in held.items():
            if kind == "string":
                redis.set(key, content)
            elif kind == "list":
                redis.rpush(key, *content)
            elif kind == "set":
                redis.sadd(key, *content)
            elif content and kind == "hash":
                redis.hset(key, mapping=content)
            elif content:
                redis.zadd(key, content)


# What may be believed of it, told once more and without the scripts.


def count(text: object) -> int | None:
    """The whole number that a text is to C, however it is written."""
    try:
        number = float(int(str(text), 16)) if str(text).startswith("0x") else float(str(text))
    except ValueError:
        return None
    return int(number) if 0 <= number <= 2**53 and number == int(number) else None


def readable(record: Stored) -> bool:
    """Whether a reservation's record says what became of it."""
    text = str(record.get("string", ""))
    lease = re.match(r"[0-9]*", text)
    return not record or text == "cancelled" or count(lease[0] if lease else "") is not None


def used(limit: Limit, held: Stored) -> int | None:
    """How much is taken; None where nobody can tell."""
    if limit.kind == "slots":
        if held and "zset" not in held:
            return None
        ends: list[float] = list(held.get("zset", {}).values())
        return sum(until > NOW * 1000 for until in ends)
    if held and "hash" not in held:
        return None
    fields = held.get("hash", {})
    if not fields:
        return 0
    if limit.kind == "period":
        begun, total = count(fields.get("p")), count(fields.get("s"))
        if begun is None or total is None or begun > DAYS[-1]:
            return None
        return total if begun >= DAYS[1] else 0
    oldest, newest, total = (count(fields.get(name)) for name in "ons")
    if oldest is None or newest is None or total is None or not 0 <= newest - oldest <= KEPT:
        return None
    if newest > PLACE + 2 * 86_400:
        return None
    first = max(newest, PLACE) - KEPT
    gone = [count(fields.get(str(s), "0")) for s in range(oldest, min(first, newest + 1))]
    if None in gone:
        return None
    left = total - sum(one or 0 for one in gone)
    return left if left == 0 or (left > 0 and newest >= first) else None


def look(redis: Redis) -> dict[str, Stored]:
    """All that is stored now."""
    found: dict[str, Stored] = {}
    for name in ("rate", "money", "slots"):
        key = f"hybridgate:{{ledger}}:{KEYS.get(name, name)}"
        told: Any = redis.type(key)
        kind = told.decode()
        if kind == "hash":
            fields: Any = redis.hgetall(key)
            found[name] = {"hash": {k.decode(): v.decode(errors="replace") for k, v in fields.items()}}
        elif kind == "zset":
            read: Any = redis.zrange(key, 0, -1, withscores=True)
            found[name] = {"zset": dict(read)}
        else:
            found[name] = {} if kind == "none" else {kind: None}
    return found


class Fuzzed:
    """One event loop and one connection for all examples."""

    def __init__(self, url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.store = Store(url, timeout=PATIENT)
        self.ledger = RedisLedger(self.store, time="given")
        self.redis = Redis.from_url(url)

    def run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        return self.loop.run_until_complete(awaited())

    def slowest(self) -> float:
        """Seconds of the longest script since the last time."""
        entries = self.redis.slowlog_get(128)
        self.redis.slowlog_reset()
        return max((one["duration"] / 1e6 for one in entries if one["command"].startswith(b"EVAL")), default=0.0)


@pytest.fixture(scope="module")
def fuzzed(url: str) -> Iterator[Fuzzed]:
    made = Fuzzed(url)
    made.redis.config_set("slowlog-log-slower-than", int(LONGEST * 1e6))
    yield made
    made.run(made.store.close())
    made.loop.close()
    made.redis.close()


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(stored=keys, amount=st.integers(0, 100))
def test_whatever_the_keys_hold_nothing_is_let_in_beyond_what_can_be_read(
    fuzzed: Fuzzed, stored: Mapping[str, Stored], amount: int
) -> None:
    write(fuzzed.redis, stored)
    before = {limit: used(limit, held) for limit, held in zip(LIMITS, look(fuzzed.redis).values(), strict=True)}
    holds = [Hold(RATE, amount), Hold(MONEY, amount), Hold(SLOTS, 1)]
    try:
        made = fuzzed.run(fuzzed.ledger.reserve("r", holds, 30.0, NOW))
    except LedgerDamaged as damaged:
        made = None
        if damaged.limit is None:
            assert not readable(stored["open:r"]), "no script fails"
        elif damaged.limit == MONEY:
            assert before[MONEY] is None
    except ValueError:
        made = None
        lease = str(stored["open:r"]["string"]).split(" ")[0]
        assert lease == "cancelled" or (count(lease) or 0) > NOW * 1000
    after = {limit: used(limit, held) for limit, held in zip(LIMITS, look(fuzzed.redis).values(), strict=True)}
    if isinstance(made, Reservation):
        for hold, taken in zip(holds, made.used, strict=True):
            known = before[hold.limit]
            assert known is not None and known + hold.amount <= hold.limit.most
            assert taken == known + hold.amount == after[hold.limit]
    else:
        assert after == before, "all or none"
    assert fuzzed.slowest() <= LONGEST or settled(fuzzed, stored, holds)


def settled(fuzzed: Fuzzed, stored: Mapping[str, Stored], holds: list[Hold]) -> bool:
    """Whether the script is fast where the machine is not busy."""
    for _ in range(5):
        write(fuzzed.redis, stored)
        with suppress(LedgerDamaged, ValueError):
            fuzzed.run(fuzzed.ledger.reserve("r", holds, 30.0, NOW))
        if fuzzed.slowest() <= LONGEST:
            return True
    return False


@FUZZ
@given(
    stored=keys,
    how=st.sampled_from(["settle", "release", "cancel", "renew"]),
    tokens=st.sampled_from([0, 3, 200, 2**53, 10**30]),
)
def test_whatever_the_keys_hold_an_end_gives_back_no_more_than_was_held(
    fuzzed: Fuzzed, stored: Mapping[str, Stored], how: str, tokens: int
) -> None:
    write(fuzzed.redis, stored)
    before = {limit: used(limit, held) for limit, held in zip(LIMITS, look(fuzzed.redis).values(), strict=True)}
    holds = (Hold(replace(RATE, unit="tokens"), 5), Hold(MONEY, 5), Hold(SLOTS, 1))
    made = Reservation("r", holds, (5, 5, 1), (PLACE, DAYS[1], 0), NOW * 1000 + 30_000)
    ledger = fuzzed.ledger
    ways = {
        "settle": lambda: ledger.settle(made, Spent(tokens, tokens), NOW),
        "release": lambda: ledger.release(made, NOW),
        "cancel": lambda: ledger.cancel("r", holds),
        "renew": lambda: ledger.renew(made, 30.0, NOW),
    }
    assert fuzzed.run(ways[how]()) in (True, False)
    assert fuzzed.slowest() <= LONGEST
    after = {limit: used(limit, held) for limit, held in zip(LIMITS, look(fuzzed.redis).values(), strict=True)}
    for limit in LIMITS:
        known, now = before[limit], after[limit]
        assert now is None if known is None else now is not None and now >= max(0, known - 5)


def test_a_counter_by_the_second_as_an_older_version_has_it_is_another_key(url: str) -> None:
    async def check() -> None:
        async with Store(url, timeout=PATIENT) as store:
            older = ("HSET", "hybridgate:{ledger}:rate", "o", NOW, "n", NOW, "s", 100, NOW, 100)
            await store.run(("FLUSHALL",), older)
            made = await RedisLedger(store, time="given").reserve("r", [Hold(RATE, 1)], 30.0, NOW)
            assert isinstance(made, Reservation) and made.used == (1,)
            (left,) = await store.run(("HGET", "hybridgate:{ledger}:rate", "s"))
            assert left == b"100"

    asyncio.run(check())


# What replicas do then.


@pytest.mark.parametrize(
    ("limit", "command"),
    [
        (RATE, ("SET", "5")),
        (RATE, ("HSET", "o", "1", "n", str(PLACE), "s", "0")),
        (RATE, ("HSET", "o", str(PLACE), "n", str(PLACE), "s", "many")),
        (SLOTS, ("LPUSH", "x")),
        (SLOTS, ("ZADD", "inf", "a", "inf", "b", "inf", "c")),
        (MONEY, ("SADD", "x")),
        (MONEY, ("HSET", "p", str(DAYS[1]), "s", "-5")),
    ],
)
@pytest.mark.parametrize("on_down", ["closed", "local_share", "open"])
def test_a_damaged_counter_is_as_a_store_that_does_not_answer_and_is_told_once(
    url: str, limit: Limit, command: tuple[str, ...], on_down: Any
) -> None:
    async def check() -> None:
        async with Store(url, timeout=PATIENT) as store:
            told: list[Damage] = []
            shared = RedisLedger(store, time="given")
            ledger = SharedLedger(store, shared, told.append)
            key = shared.key_of(limit)
            await store.run(("FLUSHALL",), (command[0], key, *command[1:]))
            hold = Hold(replace(limit, on_down=on_down), 1)
            answers = [await ledger.reserve(f"r{n}", [hold], 30.0, NOW, 5.0) for n in range(3)]
            if on_down == "closed":
                assert all(isinstance(a, Refused) and a.unchecked for a in answers)
            else:
                assert all(isinstance(a, Reservation) for a in answers), "one replica's share is all of it"
            assert store.state.up and store.state.failures == 0
            assert told == [Damage(limit.account, limit.kind, key)] and set(ledger.damaged) == {limit.account}
            await store.run(("DEL", key))
            mended = await ledger.reserve("after", [hold], 30.0, NOW, 5.0)
            assert isinstance(mended, Reservation) and mended.used == (1,) and not ledger.damaged
            assert [one.mended for one in told] == [False, True]

    asyncio.run(check())


def test_a_damaged_counter_costs_one_exchange_and_no_waiting(url: str) -> None:
    async def check() -> None:
        async with Store(url, timeout=PATIENT) as store:
            ledger = SharedLedger(store, RedisLedger(store))
            await store.run(("FLUSHALL",), ("SET", "hybridgate:{ledger}:money", "x"))
            await store.run(("CONFIG", "RESETSTAT"))
            began = time.process_time()
            for n in range(20):
                assert isinstance(await ledger.reserve(f"r{n}", [Hold(MONEY, 1)], 30.0, NOW, 0.1), Refused)
            (told,) = await store.run(("INFO", "commandstats"))
            calls = told["cmdstat_evalsha"]["calls"]
            assert calls <= 21 and time.process_time() - began < 1.0

    asyncio.run(check())
