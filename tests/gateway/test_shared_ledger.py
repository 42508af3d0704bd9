"""The ledger of one of several replicas while Redis does not answer: each limit says what counts then, nothing waits,
and what ended meanwhile is told afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from gateway.admission import PATIENCE
from gateway.ledger import Hold, Limit, Refused, Reservation, Spent
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import JUST, SharedLedger
from gateway.limits import OnDown
from gateway.store import Store
from tests.gateway.test_store import BUSY, break_, until
from tests.redis_proxy import Proxy, proxied
from tests.redis_server import redis_server

REQUESTS = Limit("key:a requests/min", "rolling", "requests", 10)
SLOTS = Limit("key:a concurrent", "slots", "slots", 1)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


class Replica:
    """One gateway's ledger behind a proxy of its own."""

    def __init__(self, proxy: Proxy, store: Store) -> None:
        self.proxy, self.store = proxy, store
        self.ledger = SharedLedger(store, RedisLedger(store))
        self._ids = count()

    async def reserve(self, *holds: Hold) -> Reservation | Refused:
        id = f"{self.store.prefix}-{id_of(self)}-{next(self._ids)}"
        return await self.ledger.reserve(id, holds, 30.0, time.time(), PATIENCE)

    async def admitted(self, limit: Limit, tries: int) -> int:
        return sum([isinstance(await self.reserve(Hold(limit, 1)), Reservation) for _ in range(tries)])


def id_of(replica: Replica) -> int:
    return id(replica)


PREFIXES = count()


def replicas(url: str, check: Callable[[Replica, Replica], Awaitable[None]]) -> None:
    """Two replicas that know of each other, on a prefix of their own."""

    async def run() -> None:
        prefix = f"t{next(PREFIXES)}"
        async with (
            proxied(url) as one,
            proxied(url) as two,
            Store(one.url, prefix=prefix, timeout=0.5) as first,
            Store(two.url, prefix=prefix, timeout=0.5) as second,
        ):
            first.start()
            second.start()
            await until(lambda: first.state.replicas == second.state.replicas == 2)
            await check(Replica(one, first), Replica(two, second))

    asyncio.run(run())


async def down(*those: Replica) -> None:
    for replica in those:
        break_(replica.proxy, "gone")
    for replica in those:
        await until(lambda replica=replica: not replica.store.state.up)


@pytest.mark.parametrize(
    ("on_down", "admitted", "unchecked"), [("local_share", 5, False), ("closed", 0, True), ("open", 20, None)]
)
def test_while_redis_is_gone_each_limit_says_what_counts(
    url: str, on_down: OnDown, admitted: int, unchecked: bool | None
) -> None:
    async def check(first: Replica, second: Replica) -> None:
        await down(first, second)
        limit = replace(REQUESTS, on_down=on_down)
        assert [await r.admitted(limit, 20) for r in (first, second)] == [admitted, admitted]
        told = await first.reserve(Hold(limit, 1))
        if unchecked is not None:
            assert isinstance(told, Refused) and told.unchecked is unchecked and told.hold.limit == limit

    replicas(url, check)


def test_a_share_below_one_admits_nobody_and_what_fits_the_whole_limit_is_not_refused_for_good(url: str) -> None:
    async def check(first: Replica, second: Replica) -> None:
        await down(first, second)
        alone = await first.reserve(Hold(SLOTS, 1))
        assert isinstance(alone, Refused) and alone.unchecked and alone.wait_ms is not None
        large = await first.reserve(Hold(REQUESTS, 8))
        assert isinstance(large, Refused) and large.wait_ms is not None
        never = await first.reserve(Hold(REQUESTS, 11))
        assert isinstance(never, Refused) and never.wait_ms is None

    replicas(url, check)


def test_what_ends_while_redis_is_gone_is_told_when_it_is_back(url: str) -> None:
    async def check(first: Replica, second: Replica) -> None:
        held = await first.reserve(Hold(SLOTS, 1), Hold(REQUESTS, 1))
        assert isinstance(held, Reservation)
        assert isinstance(await second.reserve(Hold(SLOTS, 1)), Refused)
        await down(first)
        first.ledger.end(held, Spent(1, 1), time.time())
        assert await first.ledger.release(held, time.time()) is False
        first.proxy.refuses = False
        async with asyncio.timeout(10):
            while isinstance(await second.reserve(Hold(SLOTS, 1)), Refused):  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.05)

    replicas(url, check)


def test_a_reservation_whose_reply_never_came_is_undone(url: str) -> None:
    async def check(first: Replica, second: Replica) -> None:
        first.proxy.silent = True
        assert isinstance(await first.reserve(Hold(SLOTS, 1), Hold(REQUESTS, 1)), Refused), "a share of one is none"
        first.proxy.hang_up()
        first.proxy.silent = first.proxy.refuses = False
        async with asyncio.timeout(10):
            while isinstance(await second.reserve(Hold(SLOTS, 1)), Refused):  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.05)
        assert await second.admitted(REQUESTS, 20) == 10, "nothing is booked of what was never let in"

    replicas(url, check)


def test_what_was_cancelled_is_undone_once_and_cannot_be_made_any_more(url: str) -> None:
    async def run() -> None:
        async with Store(url, prefix="cancelled", timeout=5.0) as store:
            ledger, now = RedisLedger(store), time.time()
            money = Limit("key:a usd/day", "period", "nusd", 100, starts=(0, int(now) + 9_000))
            holds = [Hold(SLOTS, 1), Hold(REQUESTS, 4), Hold(money, 50)]
            kept = await ledger.reserve("kept", [Hold(REQUESTS, 2)], 30.0, now)
            made = await ledger.reserve("made", holds, 30.0, now)
            assert isinstance(kept, Reservation) and isinstance(made, Reservation)
            assert await ledger.renew(made, 60.0, now), "which keeps what was noted of it"
            assert [await ledger.cancel("made", holds) for _ in range(2)] == [True, False]
            assert not await ledger.settle(made, Spent(1, 1), now) and not await ledger.renew(made, 60.0, now)
            assert not await ledger.cancel("late", holds)
            for id in ("made", "late"):
                with pytest.raises(ValueError, match="is open"):
                    await ledger.reserve(id, holds, 30.0, now)
            again = await ledger.reserve("again", holds, 30.0, now)
            assert isinstance(again, Reservation) and again.used == (1, 6, 50)

    asyncio.run(run())


def test_a_reservation_ends_where_it_was_made(url: str) -> None:
    async def check(first: Replica, second: Replica) -> None:
        two = replace(SLOTS, most=2)
        await down(first)
        alone = await first.reserve(Hold(two, 1))
        assert isinstance(alone, Reservation) and alone.used == (1,)
        first.proxy.refuses = False
        await until(lambda: first.store.state.up)
        assert await first.ledger.renew(alone, 30.0, time.time())
        first.ledger.end(alone, None, time.time())
        await down(first)
        assert isinstance(await first.reserve(Hold(two, 1)), Reservation), "its share is free again"

    replicas(url, check)


@pytest.mark.parametrize("how", ["slow", "silent", "gone"])
def test_no_request_waits_longer_than_it_may_in_all(url: str, how: str) -> None:
    async def run() -> None:
        async with proxied(url) as proxy, Store(proxy.url, prefix=how) as store:
            replica = Replica(proxy, store)
            await replica.reserve(Hold(REQUESTS, 1))
            break_(proxy, how)

            async def request() -> float:
                began, left = time.monotonic(), PATIENCE
                for _ in range(4):  # as many attempts
                    at = time.monotonic()
                    id = f"{how}-{next(PREFIXES)}"
                    await replica.ledger.reserve(id, [Hold(REQUESTS, 1)], 30.0, time.time(), left)
                    left -= time.monotonic() - at
                return time.monotonic() - began

            waits = await asyncio.gather(*(request() for _ in range(50)))
            assert max(waits) < PATIENCE + BUSY

    asyncio.run(run())


def test_a_redis_that_was_restarted_empty_counts_from_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        with redis_server(tmp_path) as url:
            async with Store(url, timeout=5.0) as store:
                ledger = SharedLedger(store, RedisLedger(store))
                held = await ledger.reserve("1", [Hold(SLOTS, 1)], 30.0, time.time())
                assert isinstance(held, Reservation)
                await store.run(("FLUSHALL",), ("SCRIPT", "FLUSH"))
                assert await ledger.settle(held, Spent(1, 1), time.time()) is False
                assert isinstance(await ledger.reserve("2", [Hold(SLOTS, 1)], 30.0, time.time()), Reservation)

    asyncio.run(run())


def test_a_refusal_that_comes_too_late_leaves_the_others_of_its_exchange_their_answers(url: str) -> None:
    async def check(store: Store) -> None:
        ledger = RedisLedger(store)
        await store.run(("SET", "hybridgate:{ledger}:key:odd concurrent", "of another kind"))
        odd = asyncio.create_task(
            ledger.reserve("r1", [Hold(Limit("key:odd concurrent", "slots", "slots", 1), 1)], 30.0, 0.0, 5.0)
        )
        other = asyncio.create_task(ledger.reserve("r2", [Hold(SLOTS, 1)], 30.0, 0.0, 5.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # both are on their way, together
        odd.cancel()
        assert isinstance(await other, Reservation)

    async def run() -> None:
        async with asyncio.timeout(30), Store(url, timeout=30.0) as store:
            await store.run(("FLUSHALL",))
            await check(store)

    asyncio.run(run())


def test_while_redis_counts_for_others_nobody_takes_a_share_of_his_own(url: str) -> None:
    """A request whose time is over is refused; what was reserved for it late is given back."""

    async def check(first: Replica, second: Replica) -> None:
        one = Limit("key:b concurrent", "slots", "slots", 1)
        assert isinstance(await first.reserve(Hold(replace(one, account="warm"), 1)), Reservation)
        first.proxy.delay = 0.15
        late = await first.ledger.reserve("late", [Hold(one, 1)], 30.0, time.time(), 0.05)
        assert isinstance(late, Refused) and late.unchecked and first.store.state.up
        async with asyncio.timeout(10):
            while isinstance(await second.reserve(Hold(one, 1)), Refused):  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.02)

    replicas(url, check)


@pytest.mark.parametrize("on_down", ["closed", "local_share", "open"])
def test_who_waits_too_long_is_told_what_the_limit_has_just_told_another(url: str, on_down: OnDown) -> None:
    """And so with a time at which to ask again; where another asked for more, or long ago, nobody knows."""

    async def check(first: Replica, second: Replica) -> None:
        tokens = Limit(f"key:{on_down} tokens/min", "rolling", "tokens", 100, on_down=on_down)
        other = replace(tokens, account=f"key:{on_down} requests/min", unit="requests", most=50)
        assert isinstance(await second.reserve(Hold(other, 1), Hold(tokens, 90)), Reservation)
        said = await first.reserve(Hold(other, 1), Hold(tokens, 20))
        assert isinstance(said, Refused) and said.used == (1, 90) and said.wait_ms is not None
        never = await first.reserve(Hold(tokens, 101))
        assert isinstance(never, Refused) and never.wait_ms is None, "which says nothing of what is left"
        first.proxy.delay = 0.15

        async def late(amount: int) -> Reservation | Refused:
            return await first.ledger.reserve(f"late {amount}", [Hold(tokens, amount)], 30.0, time.time(), 0.03)

        told = [await late(amount) for amount in (20, 30, 19, 101)]
        if on_down == "open":
            assert all(isinstance(one, Reservation) for one in told)
            return
        for one in told[:2]:
            assert isinstance(one, Refused) and not one.unchecked and one.used == (90,)
            assert one.wait_ms is not None and said.wait_ms - 1_000 <= one.wait_ms < said.wait_ms
        mine = replace(other, account="key:mine requests/min")
        both = await first.ledger.reserve("mine", [Hold(mine, 1), Hold(tokens, 20)], 30.0, time.time(), 0.03)
        assert isinstance(both, Refused) and both.used == (None, 90), "of what the other has not, nobody knows"
        await asyncio.sleep(JUST)
        assert all(isinstance(one, Refused) and one.unchecked for one in (*told[2:], await late(20)))

    replicas(url, check)


def test_a_refusal_whose_wait_is_over_is_told_to_nobody_else(url: str) -> None:
    """There may be room by now, so nobody knows."""

    async def check(first: Replica, second: Replica) -> None:
        brief = Limit("key:brief tokens/min", "rolling", "tokens", 100, window=0)
        assert isinstance(await second.reserve(Hold(brief, 100)), Reservation)
        async with asyncio.timeout(10):
            while True:
                said = await first.reserve(Hold(brief, 1))
                assert isinstance(said, Refused) and said.wait_ms is not None
                if said.wait_ms < JUST * 500:
                    break
                await asyncio.sleep(0.02)
        await asyncio.sleep(said.wait_ms / 1000)
        first.proxy.delay = 0.15
        late = await first.ledger.reserve("late", [Hold(brief, 1)], 30.0, time.time(), 0.03)
        assert isinstance(late, Refused) and late.unchecked

    replicas(url, check)
