"""The connection to Redis: one exchange for all who ask at once, and nobody waits for a server that is slow, silent,
full, read-only or gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway.ledger import Hold, LedgerUnavailable, Limit, Refused, Reservation
from gateway.ledger.redis_ledger import RedisLedger
from gateway.store import MOST_WAIT, TIMEOUT, Script, Store, StoreState, StoreUnavailable, checked_url, reply_of
from gateway.store.patience import MOST_TURNS
from tests.redis_proxy import Proxy, proxied
from tests.redis_server import Watched, redis_sentinel, redis_server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


BUSY = 0.5  # seconds that the machine of a test may be busy with others
SUM = Script("return tonumber(ARGV[1]) + tonumber(ARGV[2])")


async def until(condition: object, patience: float = 10.0) -> None:
    assert callable(condition)
    async with asyncio.timeout(patience):
        while not condition():  # noqa: ASYNC110 - without an event
            await asyncio.sleep(0.01)


def test_what_is_asked_at_once_goes_in_one_exchange_and_each_gets_its_own(url: str) -> None:
    async def check() -> None:
        async with proxied(url) as proxy, Store(proxy.url, timeout=10.0) as store:
            await store.run(("SET", "k", "v"))
            before = proxy.passed
            asked = [store.run(("ECHO", str(n)), SUM.call([], [n, 1])) for n in range(20)]
            assert await asyncio.gather(*asked) == [[b"%d" % n, n + 1] for n in range(20)]
            assert proxy.passed - before <= 2, "the second is for the script that the server had to be sent"

    asyncio.run(check())


def test_a_command_that_is_refused_harms_no_other(url: str) -> None:
    async def check() -> None:
        async with Store(url, timeout=10.0) as store:
            await store.run(("DEL", "text"), ("SET", "text", "v"))
            for _ in range(5):
                wrong, right = await store.run(("INCR", "text"), ("GET", "text"))
                assert right == b"v" and store.state.up
                with pytest.raises(StoreUnavailable) as caught:
                    reply_of(wrong)
                assert "text" not in str(caught.value)

    asyncio.run(check())


async def asked(store: Store) -> tuple[bool, float]:
    """Whether it answered, and how long that took."""
    began = time.monotonic()
    try:
        await store.run(("PING",))
    except StoreUnavailable:
        return False, time.monotonic() - began
    return True, time.monotonic() - began


@pytest.mark.parametrize("how", ["slow", "silent", "gone"])
def test_nobody_waits_for_a_store_that_does_not_answer_and_it_is_found_again(url: str, how: str) -> None:
    async def check() -> None:
        states: list[StoreState] = []
        async with proxied(url) as proxy, Store(proxy.url, changed=states.append) as store:
            store.start()
            await until(lambda: store.state.up and proxy.passed)
            break_(proxy, how)
            waited = 0.0
            for _ in range(200):
                answered, seconds = await asked(store)
                assert not answered
                waited += seconds
            assert waited < 4 * TIMEOUT + BUSY, "three find out, the others do not wait"
            assert [state.up for state in states] == [False] and states[0].reason
            proxy.delay, proxy.silent, proxy.refuses = 0.0, False, False
            await until(lambda: store.state.up)
            assert (await asked(store))[0] and [state.up for state in states] == [False, True]

    asyncio.run(check())


def break_(proxy: Proxy, how: str) -> None:
    if how == "slow":
        proxy.delay = 0.2
    elif how == "silent":
        proxy.silent = True
    else:
        proxy.hang_up()


def test_a_busy_process_is_not_a_slow_store(url: str) -> None:
    async def check() -> None:
        async with Store(url) as store:
            assert (await asked(store))[0]
            for _ in range(5):
                answer = asyncio.create_task(asked(store))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                time.sleep(TIMEOUT + 0.03)  # noqa: ASYNC251 - what holds up the event loop
                assert (await answer)[0]
            assert store.state.failures == 0

    asyncio.run(check())


async def busy(turn: float) -> None:
    """A process whose event loop has so many seconds to work in each turn; for ever."""
    while True:
        time.sleep(turn)  # noqa: ASYNC251 - what holds up the event loop
        await asyncio.sleep(0)


@pytest.mark.parametrize("turn", [0.004, 0.015])
@pytest.mark.parametrize("how", ["silent", "well"])
def test_however_busy_the_process_is_a_wait_ends_and_what_has_come_is_read(url: str, how: str, turn: float) -> None:
    async def check() -> None:
        async with proxied(url) as proxy, Store(proxy.url) as store, Store(url, timeout=5.0) as direct:
            assert (await asked(store))[0] and (await asked(direct))[0]
            proxy.silent = True
            working = asyncio.create_task(busy(turn))
            try:
                for _ in range(4):
                    answered, seconds = await asked(store if how == "silent" else direct)
                    assert answered is (how == "well")
                    assert seconds < MOST_WAIT + (MOST_TURNS + 2) * turn + BUSY / 2
            finally:
                working.cancel()
            assert store.state.up is (how == "well") and direct.state.failures == 0

    asyncio.run(check())


def test_an_answer_that_comes_after_its_asker_has_gone_is_handed_on(url: str) -> None:
    async def check() -> None:
        late: list[list[object]] = []
        async with proxied(url) as proxy, Store(proxy.url, timeout=5.0) as store:
            assert (await asked(store))[0]
            proxy.delay = 0.05
            for turn in (1, 2):
                gone = asyncio.create_task(store.run(("ECHO", "a"), abandoned=late.append))
                await asyncio.sleep(0.01)
                gone.cancel()
                with pytest.raises(StoreUnavailable):
                    await store.run(("ECHO", "b"), within=0.01, abandoned=late.append)
                await until(lambda wanted=2 * turn: len(late) == wanted)
            assert late == [[b"a"], [b"b"]] * 2

    asyncio.run(check())


@pytest.mark.parametrize("how", ["OOM", "READONLY"])
def test_a_server_that_takes_no_writes_is_down_until_it_does(url: str, how: str) -> None:
    async def check() -> None:
        states: list[StoreState] = []
        async with Redis.from_url(url) as admin, Store(url, timeout=5.0, changed=states.append) as store:
            store.start()
            try:
                if how == "OOM":
                    await admin.config_set("maxmemory", 1)
                else:
                    await admin.replicaof("127.0.0.1", 1)
                await until(lambda: not store.state.up)
                assert states[-1].reason == how
            finally:
                await admin.config_set("maxmemory", 0)
                await admin.replicaof("NO", "ONE")
            await until(lambda: store.state.up)

    asyncio.run(check())


def test_replicas_know_how_many_they_are(url: str) -> None:
    async def check() -> None:
        async with Store(url, timeout=5.0, prefix="r") as first, Store(url, timeout=5.0, prefix="r") as second:
            first.start()
            await until(lambda: first.state.replicas == 1)
            second.start()
            await until(lambda: first.state.replicas == second.state.replicas == 2)
            await second.close()
            await until(lambda: first.state.replicas == 1)

    asyncio.run(check())


def test_after_a_failover_the_new_master_is_found_and_what_it_had_got_counts(tmp_path: Path) -> None:
    """What the old master had not passed on is lost: here nothing, because the replica has caught up."""

    async def check(watched: Watched) -> None:
        async with Store(watched.url, timeout=0.5) as store, port(watched.master_port) as master:
            store.start()
            ledger, limit = RedisLedger(store), Limit("x", "rolling", "requests", 3)
            for number in range(2):
                assert isinstance(await ledger.reserve(str(number), [Hold(limit, 1)], 60.0, 0.0), Reservation)
            assert await master.wait(1, 5000) == 1
            with suppress(RedisError):
                await master.shutdown(nosave=True)
            failed = 0
            async with asyncio.timeout(30):
                while True:
                    try:
                        third = await ledger.reserve(f"3.{failed}", [Hold(limit, 1)], 60.0, 0.0)
                        break
                    except LedgerUnavailable:
                        failed += 1
                        await asyncio.sleep(0.1)
            assert failed and isinstance(third, Reservation) and third.used == (3,)
            assert isinstance(await ledger.reserve("4", [Hold(limit, 1)], 60.0, 0.0), Refused)

    with redis_sentinel(tmp_path) as watched:
        asyncio.run(check(watched))


def port(number: int) -> Redis:
    """A client that tries nothing again."""
    return Redis(port=number, retry=Retry(NoBackoff(), 0))


@pytest.mark.parametrize(
    "good",
    [
        "redis://host",
        "rediss://u:p@host:6380/2",
        "unix:///run/redis.sock",
        "redis+sentinel://u:p%40@a:26379,b/main/1",
        "rediss+sentinel://a/main",
        "redis+cluster://:p@a:7000,b:7001",
    ],
)
def test_addresses(good: str) -> None:
    assert checked_url(good) == good


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "secret",
        "http://secret",
        "redis://secret:port",
        "redis+sentinel://secret",
        "redis+sentinel://secret/main/db",
        "redis+cluster://secret/0",
        "redis+cluster://,secret",
        "redis+cluster://secret?x=1",
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(wrong: str) -> None:
    with pytest.raises(ValueError, match="must be an address") as caught:
        checked_url(wrong)
    assert "secret" not in str(caught.value)


def test_a_request_waits_no_longer_than_it_may(url: str) -> None:
    async def check() -> None:
        async with proxied(url) as proxy, Store(proxy.url) as store:
            assert (await asked(store))[0]
            proxy.silent = True
            waits = await asyncio.gather(*(asked(store) for _ in range(400)))
            assert not any(answered for answered, _ in waits) and max(w for _, w in waits) < MOST_WAIT + BUSY

    asyncio.run(check())
