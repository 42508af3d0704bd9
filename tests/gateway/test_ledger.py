"""The ledger's contract, in memory and in a real Redis: all holds or none, no window above its limit, each reservation
ends once. And both against a model that keeps every event."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis.asyncio import Redis

from gateway.ledger import (
    Hold,
    Ledger,
    LedgerUnavailable,
    Limit,
    MemoryLedger,
    Refused,
    Reservation,
    Spent,
    days,
    months,
)
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import SharedLedger
from gateway.store import Store
from tests.bench.limits.judge import Seen, most_within
from tests.redis_server import redis_server

NOW = 1_800_000_000.25
DAY = (1_799_900_000, 1_799_990_000, 1_800_000_100, 1_800_090_000)
REQUESTS = Limit("key:a requests/min", "rolling", "requests", 3)
TOKENS = Limit("key:a tokens/min", "rolling", "tokens", 100)
SLOTS = Limit("key:a concurrent", "slots", "slots", 2)
MONEY = Limit("tenant:t usd/day", "period", "nusd", 9_000_000_000_000_000, starts=DAY)

PATIENT = 30.0  # the machine that runs the tests may be busy


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


Check = Callable[[Ledger], Awaitable[None]]


@pytest.fixture(params=["memory", "redis", "shared", "cluster", "sentinel"])
def on(request: pytest.FixtureRequest) -> Callable[[Check], None]:
    """Runs a check on an empty ledger."""
    if request.param == "memory":
        return lambda check: asyncio.run(_awaited(check(MemoryLedger())))
    kind: str = request.param
    where = kind if kind in ("cluster", "sentinel") else "url"
    url: str = request.getfixturevalue(where)

    async def shared(check: Check) -> None:
        prefix = f"t{os.urandom(4).hex()}"
        async with Store(url, timeout=PATIENT, prefix=prefix) as store:
            in_store = RedisLedger(store, time="given")
            await check(SharedLedger(store, in_store) if kind == "shared" else in_store)

    return lambda check: asyncio.run(shared(check))


async def _awaited(check: Awaitable[None]) -> None:
    await check


def holds(requests: int = 1, tokens: int = 10, nusd: int = 5) -> list[Hold]:
    return [Hold(REQUESTS, requests), Hold(TOKENS, tokens), Hold(SLOTS, 1), Hold(MONEY, nusd)]


async def placed(ledger: Ledger, id: str, what: list[Hold], now: float = NOW, lease_s: float = 30.0) -> Reservation:
    made = await ledger.reserve(id, what, lease_s, now)
    assert isinstance(made, Reservation), made
    return made


async def refused(ledger: Ledger, what: list[Hold], now: float = NOW) -> Refused:
    told = await ledger.reserve("refused", what, 30.0, now)
    assert isinstance(told, Refused), told
    return told


def test_holds_are_placed_together_and_settled_with_what_was_spent(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        first = await placed(ledger, "1", holds(tokens=60, nusd=7))
        assert first.used == (1, 60, 1, 7) and first.until_ms == int(NOW * 1000) + 30_000
        assert await ledger.settle(first, Spent(tokens=20, nusd=3), NOW + 1)
        second = await placed(ledger, "2", holds(tokens=80), NOW + 1)
        assert second.used == (2, 100, 1, 8), "what was not spent is there again, and the slot"
        assert await ledger.settle(second, Spent(tokens=130, nusd=9), NOW + 2)
        assert (await refused(ledger, holds(tokens=1), NOW + 2)).used == (2, 150, 0, 12), "more than was held is booked"

    on(check)


def test_where_one_hold_does_not_fit_none_is_placed(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        await placed(ledger, "1", holds(tokens=60))
        told = await refused(ledger, holds(tokens=50))
        assert (told.hold.limit, told.used) == (TOKENS, (1, 60, 1, 5))
        assert (await placed(ledger, "2", holds(tokens=40))).used == (2, 100, 2, 10)

    on(check)


def test_a_refusal_says_how_long_the_longest_wait_is(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        for number, (tokens, later) in enumerate([(50, 0), (50, 10)]):
            made = await placed(ledger, str(number), [Hold(TOKENS, tokens), Hold(SLOTS, 1)], NOW + later)
        assert (await refused(ledger, [Hold(SLOTS, 1)], NOW + 10)).wait_ms == 1000
        told = await refused(ledger, [Hold(SLOTS, 1), Hold(TOKENS, 20)], NOW + 10)
        assert told.hold.limit == TOKENS and told.wait_ms == 51_250, "until the first half second has left"
        assert (await refused(ledger, [Hold(TOKENS, 51)], NOW + 10)).wait_ms == 61_250
        assert (await refused(ledger, [Hold(TOKENS, 20)], NOW + 61.24)).wait_ms == 10
        await placed(ledger, "fits", [Hold(TOKENS, 50)], NOW + 61.25)
        assert await ledger.release(made, NOW + 62) is False, "its lease is over"
        full = Limit("full", "period", "nusd", 5, starts=DAY)
        await placed(ledger, "money", [Hold(full, 5)], NOW)
        assert (await refused(ledger, [Hold(full, 1)], NOW)).wait_ms == 99_750
        await placed(ledger, "tomorrow", [Hold(full, 5)], NOW + 99.75)

    on(check)


def test_a_refusal_says_when_enough_of_the_oldest_has_left(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        limit = Limit("many", "rolling", "requests", 40)
        for n in range(40):
            await placed(ledger, f"{n}", [Hold(limit, 1)], NOW + n / 2)
        waits = [(await refused(ledger, [Hold(limit, n)], NOW + 20)).wait_ms for n in range(1, 41)]
        assert waits == [41_250 + 500 * n for n in range(40)]

    on(check)


def test_what_can_never_fit_waits_for_nothing(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        await placed(ledger, "1", holds(requests=3))
        told = await refused(ledger, holds(tokens=101))
        assert told.hold.limit == TOKENS and told.wait_ms is None

    on(check)


def test_a_reservation_ends_once(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        first, second = await placed(ledger, "1", holds()), await placed(ledger, "2", holds())
        with pytest.raises(ValueError, match="is open"):
            await ledger.reserve("1", [Hold(MONEY, 1)], 30.0, NOW)
        assert await ledger.release(first, NOW) and not await ledger.settle(first, Spent(99, 99), NOW)
        assert await ledger.settle(second, Spent(1, 1), NOW) and not await ledger.release(second, NOW)
        assert (await placed(ledger, "1", holds())).used == (2, 11, 1, 6), "what was released has never been"

    on(check)


def test_after_its_lease_a_slot_is_free_and_the_rest_stays_booked(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        lost = await placed(ledger, "lost", holds(tokens=40, nusd=7), lease_s=20.0)
        await placed(ledger, "other", [Hold(SLOTS, 1)], lease_s=40.0)
        assert (await refused(ledger, [Hold(SLOTS, 1)], NOW + 19.99)).used == (2,)
        assert (await placed(ledger, "next", holds(), NOW + 20)).used == (2, 50, 2, 12)
        assert await ledger.settle(lost, Spent(0, 0), NOW + 21) is False
        assert (await refused(ledger, holds(), NOW + 21)).used == (2, 50, 2, 12)

    on(check)


def test_an_amount_that_is_settled_after_its_window_or_day_changes_nothing(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        made = await placed(ledger, "1", [Hold(TOKENS, 40), Hold(MONEY, 40)], lease_s=300.0)
        await placed(ledger, "2", [Hold(TOKENS, 1), Hold(MONEY, 1)], NOW + 200)
        assert await ledger.settle(made, Spent(90, 90), NOW + 201)
        assert (await placed(ledger, "3", [Hold(TOKENS, 1), Hold(MONEY, 1)], NOW + 202)).used == (2, 2)

    on(check)


def test_a_clock_that_is_set_back_frees_nothing(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        await placed(ledger, "1", [Hold(REQUESTS, 3)])
        assert (await refused(ledger, [Hold(REQUESTS, 1)], NOW - 1000)).used == (3,)
        await placed(ledger, "2", [Hold(REQUESTS, 3)], NOW + 62)
        assert (await refused(ledger, [Hold(REQUESTS, 1)], NOW - 1000)).used == (3,)
        assert (await refused(ledger, [Hold(REQUESTS, 1)], NOW + 62)).used == (3,)

    on(check)


def test_large_amounts_stay_whole(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        first = await placed(ledger, "1", [Hold(MONEY, 8_999_999_999_999_990)])
        assert await ledger.settle(first, Spent(0, 8_999_999_999_999_991), NOW)
        assert (await placed(ledger, "2", [Hold(MONEY, 9)])).used == (9_000_000_000_000_000,)
        assert (await refused(ledger, [Hold(MONEY, 1)])).used == (9_000_000_000_000_000,)

    on(check)


def test_what_is_no_request_is_refused(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        for wrong in (
            [Hold(REQUESTS, 1), Hold(REQUESTS, 1)],
            [Hold(TOKENS, -1)],
            [Hold(MONEY, 2**53)],
            [Hold(SLOTS, 2)],
        ):
            with pytest.raises(ValueError, match=r"two holds|amounts are|one slot"):
                await ledger.reserve("1", wrong, 30.0, NOW)

    on(check)


def test_a_hundred_at_once_get_no_more_than_the_limit(on: Callable[[Check], None]) -> None:
    async def check(ledger: Ledger) -> None:
        limit = Limit("many", "rolling", "requests", 40)
        made = await asyncio.gather(*(ledger.reserve(f"{n}", [Hold(limit, 1)], 30.0, NOW) for n in range(100)))
        assert sum(isinstance(one, Reservation) for one in made) == 40

    on(check)


def test_scripts_that_the_server_has_forgotten_are_sent_again(url: str) -> None:
    async def check() -> None:
        async with Store(url, timeout=PATIENT) as store:
            await store.run(("FLUSHALL",))
            ledger = RedisLedger(store, time="given")
            first = await placed(ledger, "1", holds())
            await store.run(("SCRIPT", "FLUSH"))
            assert await ledger.settle(first, Spent(1, 1), NOW)
            await store.run(("SCRIPT", "FLUSH"))
            await placed(ledger, "1", holds())

    asyncio.run(check())


def test_the_servers_own_time_counts_and_nothing_is_kept_for_ever(url: str) -> None:
    async def check() -> None:
        async with Store(url, timeout=PATIENT, prefix="p") as store, Redis.from_url(url) as client:
            await client.flushall()
            seconds, micros = await client.time()
            at = seconds * 1000 + micros // 1000
            made = await placed(RedisLedger(store), "1", holds(), now=5.0)
            assert 0 <= made.placed[0] - at // 500 <= 2 * PATIENT and made.until_ms >= at + 30_000
            names = [name.decode() async for name in client.scan_iter("*")]
            assert len(names) == 5 and all(name.startswith("p:{ledger}:") for name in names)
            assert all([await client.ttl(name) > 0 for name in names])

    asyncio.run(check())


def test_a_store_that_cannot_be_reached_is_told_as_that() -> None:
    async def check() -> None:
        async with Store("redis://127.0.0.1:1") as store:
            with pytest.raises(LedgerUnavailable, match="reached"):
                await RedisLedger(store).reserve("1", holds(), 30.0, NOW)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("zone", "at", "hours"),
    [("Europe/Berlin", "2026-03-28T12:00", [24, 24, 23]), ("UTC", "2026-03-28T12:00", [24, 24, 24])],
)
def test_days_begin_at_midnight_of_the_operators_zone(zone: str, at: str, hours: list[int]) -> None:
    here = ZoneInfo(zone)
    starts = days(here, datetime.fromisoformat(at).replace(tzinfo=here).timestamp())
    assert [datetime.fromtimestamp(start, here).hour for start in starts] == [0, 0, 0, 0]
    assert [(b - a) // 3600 for a, b in pairwise(starts)] == hours


def test_months_begin_on_their_first_day_over_the_turn_of_a_year() -> None:
    here = ZoneInfo("America/New_York")
    starts = months(here, datetime(2026, 12, 31, 23, 59, tzinfo=here).timestamp())
    told = [datetime.fromtimestamp(start, here).isoformat()[:16] for start in starts]
    assert told == ["2026-11-01T00:00", "2026-12-01T00:00", "2027-01-01T00:00", "2027-02-01T00:00"]


# What the provider sees: arrivals, each some time after its reservation. In milliseconds.

LATE_MS = 1_000  # from a reservation to its arrival, at most
MINUTE_MS = 60_000


def arrived(at_ms: int, amount: int) -> Seen:
    return Seen("", at_ms, at_ms, amount, 0, "ok")


def most_in_a_minute(calls: list[Seen]) -> int:
    return most_within(calls, MINUTE_MS, lambda call: call.tokens)


def clock(now_ms: int) -> float:
    """Seconds that are no earlier millisecond when they are taken for milliseconds again."""
    return (now_ms + 0.5) / 1000


@pytest.mark.parametrize("after_ms", [0, 250, 499, 500, 999])
def test_a_call_that_arrives_late_shares_no_minute_with_the_first_after_it(
    on: Callable[[Check], None], after_ms: int
) -> None:
    async def check(ledger: Ledger) -> None:
        first = int(NOW) * 1000 + after_ms
        await placed(ledger, "late", [Hold(TOKENS, 100)], clock(first))
        wait_ms = (await refused(ledger, [Hold(TOKENS, 1)], clock(first))).wait_ms
        assert wait_ms is not None and wait_ms <= 61_500, "a burst comes back after no longer than that"
        await placed(ledger, "prompt", [Hold(TOKENS, 100)], clock(first + wait_ms))
        assert most_in_a_minute([arrived(first + LATE_MS, 100), arrived(first + wait_ms, 100)]) == 100

    on(check)


@given(
    calls=st.lists(
        st.tuples(st.integers(0, 30_000), st.integers(1, 100), st.integers(0, 100), st.integers(0, LATE_MS)),
        min_size=2,
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None)
def test_no_minute_of_arrivals_holds_more_than_the_limit(calls: list[tuple[int, int, int, int]]) -> None:
    """Each comes so many milliseconds after the one before, and again at the first moment at which it may fit; it takes
    a part of what it reserved, and arrives late."""

    async def check() -> None:
        ledger, now_ms, seen = MemoryLedger(), int(NOW) * 1000, list[Seen]()
        for number, (pause_ms, reserved, percent, late_ms) in enumerate(calls):
            now_ms += pause_ms
            what = [Hold(TOKENS, reserved)]
            while isinstance(told := await ledger.reserve(f"{number}", what, 30.0, clock(now_ms)), Refused):
                assert told.wait_ms
                now_ms += told.wait_ms
            taken = reserved * percent // 100
            assert ledger.end(told, Spent(taken, 0), clock(now_ms))
            seen.append(arrived(now_ms + late_ms, taken))
        assert most_in_a_minute(seen) <= TOKENS.most

    asyncio.run(check())


# A model that keeps every event.


@dataclass
class Event:
    """One hold that was placed; `amount` is what counts of it now."""

    limit: Limit
    place: int
    amount: int
    until_ms: int
    gone: bool = False


@dataclass
class Model:
    """The contract, by looking through all events each time."""

    events: list[Event] = field(default_factory=list)
    open: dict[str, list[Event]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def place(self, limit: Limit, now_ms: int) -> int:
        mine = [e.place for e in self.events if e.limit == limit]
        if limit.kind == "rolling":
            if limit.account in self.seen:
                self.seen[limit.account] = max(self.seen[limit.account], now_ms // 500)
                return self.seen[limit.account]
            return now_ms // 500
        if limit.kind == "period":
            begun = [s for s in limit.starts if s * 1000 <= now_ms] or [limit.starts[0]]
            return max([*mine, begun[-1]])
        return 0

    def used(self, limit: Limit, place: int, now_ms: int) -> int:
        mine = [e for e in self.events if e.limit == limit]
        if limit.kind == "slots":
            for event in mine:
                event.gone = event.gone or event.until_ms <= now_ms
            return sum(not event.gone for event in mine)
        if limit.kind == "period":
            return sum(e.amount for e in mine if e.place == place)
        return sum(e.amount for e in mine if (place - e.place) * 500 <= (limit.window + 1) * 1000)

    def reserve(self, id: str, what: list[Hold], lease_ms: int, now_ms: int) -> tuple[bool, tuple[int, ...]]:
        places = [self.place(hold.limit, now_ms) for hold in what]
        used = [self.used(hold.limit, place, now_ms) for hold, place in zip(what, places, strict=True)]
        if any(u + hold.amount > hold.limit.most for u, hold in zip(used, what, strict=True)):
            return False, tuple(used)
        made = [Event(h.limit, p, h.amount, now_ms + lease_ms) for h, p in zip(what, places, strict=True)]
        self.events += made
        self.open[id] = made
        self.seen |= {h.limit.account: p for h, p in zip(what, places, strict=True) if h.limit.kind == "rolling"}
        return True, tuple(u + hold.amount for u, hold in zip(used, what, strict=True))

    def renew(self, id: str, lease_ms: int, now_ms: int) -> bool:
        events = self.open.get(id)
        if events is None or events[0].until_ms <= now_ms:
            return False
        for event in events:
            event.until_ms = max(event.until_ms, now_ms + lease_ms)
        return True

    def end(self, id: str, spent: Spent | None, now_ms: int) -> bool:
        events = self.open.pop(id, None)
        if events is None or events[0].until_ms <= now_ms:
            return False
        for event in events:
            event.gone = True
            unit = event.limit.unit
            taken = {"tokens": spent.tokens, "nusd": spent.nusd} if spent is not None else {}
            event.amount = 0 if spent is None else taken.get(unit, event.amount)
        return True


LIMITS = [
    Limit("r", "rolling", "requests", 4, window=10),
    Limit("t", "rolling", "tokens", 50, window=10),
    Limit("s", "slots", "slots", 3),
    Limit("m", "period", "nusd", 70, starts=(0, 100, 130, 160, 190, 220)),
]


class Ledgers(RuleBasedStateMachine):
    """Memory, Redis and the model are told the same, and say the same."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = Store(self.url, timeout=PATIENT)
        self.run(self.store.run(("FLUSHALL",)))
        self.ledgers: list[Ledger] = [MemoryLedger(), RedisLedger(self.store, time="given")]
        self.model = Model()
        self.now_ms = 100_000
        self.count = 0
        self.made: dict[str, list[Reservation]] = {}

    def run(self, work: Awaitable[object]) -> object:
        async def awaited() -> object:
            return await work

        return self.loop.run_until_complete(awaited())

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()

    @rule(
        chosen=st.lists(st.sampled_from(LIMITS), min_size=1, unique_by=lambda limit: limit.account),
        amount=st.integers(0, 60),
        lease_ms=st.integers(1, 20_000),
    )
    def reserve(self, chosen: list[Limit], amount: int, lease_ms: int) -> None:
        self.count += 1
        id = str(self.count)
        small = {"slots": 1, "requests": amount % 3}
        what = [Hold(limit, small.get(limit.unit, amount)) for limit in chosen]
        told = [self.run(x.reserve(id, what, lease_ms / 1000, self.now_ms / 1000)) for x in self.ledgers]
        assert told[0] == told[1]
        fits, used = self.model.reserve(id, what, int(lease_ms / 1000 * 1000), int(self.now_ms / 1000 * 1000))
        assert isinstance(told[0], Reservation | Refused)
        assert (isinstance(told[0], Reservation), told[0].used) == (fits, used)
        if fits:
            self.made[id] = [one for one in told if isinstance(one, Reservation)]

    @precondition(lambda self: self.made)
    @rule(data=st.data(), tokens=st.integers(0, 80), nusd=st.integers(0, 80), release=st.booleans())
    def end(self, data: st.DataObject, tokens: int, nusd: int, release: bool) -> None:
        """Any reservation, also one that has ended or whose replica died long ago."""
        id = data.draw(st.sampled_from(sorted(self.made)))
        spent = None if release else Spent(tokens, nusd)
        now = self.now_ms / 1000
        told = []
        for ledger, made in zip(self.ledgers, self.made[id], strict=True):
            told.append(self.run(ledger.release(made, now) if spent is None else ledger.settle(made, spent, now)))
        assert told == [self.model.end(id, spent, int(now * 1000))] * 2

    @precondition(lambda self: self.made)
    @rule(data=st.data(), lease_ms=st.integers(1, 20_000))
    def renew(self, data: st.DataObject, lease_ms: int) -> None:
        """Any reservation, also one that has ended."""
        id = data.draw(st.sampled_from(sorted(self.made)))
        lease, now = lease_ms / 1000, self.now_ms / 1000
        told = [
            self.run(ledger.renew(made, lease, now)) for ledger, made in zip(self.ledgers, self.made[id], strict=True)
        ]
        assert told == [self.model.renew(id, int(lease * 1000), int(now * 1000))] * 2

    @rule(
        step_ms=st.one_of(
            st.integers(0, 3_000),
            st.integers(0, 40_000),
            st.integers(-15_000, 0),
            st.sampled_from([500, 10_000, 10_500, 11_000, 11_499, 11_500]),  # the turns of a window
        )
    )
    def pass_time(self, step_ms: int) -> None:
        self.now_ms = max(100_000, self.now_ms + step_ms)

    @invariant()
    def no_window_holds_more_than_was_ever_allowed(self) -> None:
        """Of what was reserved and not settled with more: no window of ten seconds above its limit."""
        for limit in LIMITS[:1]:
            mine = [e for e in self.model.events if e.limit == limit]
            for event in mine:
                within = sum(e.amount for e in mine if 0 <= (event.place - e.place) * 0.5 <= limit.window + 1)
                assert within <= limit.most


def test_memory_redis_and_a_plain_model_agree_whatever_happens(url: str) -> None:
    Ledgers.url = url
    check = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Ledgers, settings=check)
