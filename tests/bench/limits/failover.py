"""A failover under load: what the new primary does not know of what the old one had acknowledged, how long limits were
not counted together, and what came through meanwhile.

Two ledgers, as two gateways have them, reserve at a steady rate from a primary that a Sentinel watches. It is killed,
stopped, or killed some time after its replica was cut off. Owns what is done to it and when, and what is asked. Refuses
to believe a reply: what the new primary holds is read from it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from redis.asyncio import Redis

from gateway.admission import PATIENCE
from gateway.held import LEASE
from gateway.ledger import Hold, Limit, Refused, Reservation
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import SharedLedger
from gateway.limits import OnDown
from gateway.store import Store
from tests.bench.limits.failures import MOST_WAIT_MS, lateness
from tests.bench.limits.judge import MINUTE, Seen, most_within
from tests.bench.program import BenchError, free_port
from tests.redis_server import Watched, redis_sentinel

POLICIES: Sequence[OnDown] = get_args(OnDown)
RATE = 100.0  # reservations a second of each key whose limits are far away
TIGHT_RATE = 20.0  # of each key whose limit is reached after the failover
TIGHT = 240  # requests a minute
BUDGET = 1_200_000_000  # nano-dollars a day, strict, reached after the failover as well
TOKENS = (50, 150)
NUSD_A_TOKEN = 20_000
BEFORE, AFTER, BACK_AFTER, MOST = 4.0, 10.0, 4.0, 30.0  # seconds
GATEWAYS = 2
DOWN_AFTER_MS = 500  # of the Sentinel; a production's is often 5,000 to 30,000

How = Literal["counted", "shared", "uncounted", "unchecked", "full"]
_ADMITTED = ("counted", "shared", "uncounted")


@dataclass(frozen=True, slots=True)
class Fall:
    """How a primary ends. `cut`: seconds before, at which its replica was cut off. `guarded`: `min-replicas-to-write 1`
    and `min-replicas-max-lag 1`. At most the last `most_lost` seconds may be lost."""

    title: str
    signal: signal.Signals
    cut: float = 0.0
    guarded: bool = False
    most_lost: float = 1.0


FALLS: Mapping[str, Fall] = {
    "killed": Fall("killed", signal.SIGKILL),
    "stopped": Fall("stopped, goes on when replaced", signal.SIGSTOP),
    "cut": Fall("killed 3 s after its replica was cut off", signal.SIGKILL, cut=3.0, most_lost=4.0),
    "guarded": Fall("the same, `min-replicas-to-write 1`, `-max-lag 1`", signal.SIGKILL, 3.0, True, most_lost=2.5),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One reservation: of which key, when it was answered (seconds since 1970), and what the answer was."""

    key: str
    id: str
    at: float
    waited: float
    tokens: int
    nusd: int
    how: How


@dataclass(frozen=True, slots=True)
class Lost:
    """What was acknowledged, and is not there. `seconds`: from the first of it to the last acknowledged."""

    count: int
    tokens: int
    nusd: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fell:
    """What one failover showed. `apart`: seconds for which each policy's key was not counted together. `over`: requests
    of a tight limit beyond it in any minute, and `lost_there` how many of those that were acknowledged were lost;
    money likewise. `unexplained`: tokens by which what is stored differs from what was acknowledged and not lost."""

    fall: Fall
    rate: float
    lost: Lost
    apart: Mapping[OnDown, float]
    over: Mapping[OnDown, int]
    lost_there: Mapping[OnDown, int]
    budget_over: int
    budget_lost: int
    unexplained: int
    longest_wait_ms: float
    late_ms: float

    @property
    def holds(self) -> bool:
        """Whether no more came through than what was lost, and each policy's part."""
        most = {"closed": 0, "local_share": TIGHT, "open": 10**9}
        return (
            all(self.over[p] <= most[p] + self.lost_there[p] for p in POLICIES)
            and self.budget_over <= self.budget_lost
            and self.lost.seconds <= self.fall.most_lost
            and self.unexplained == 0
            and self.longest_wait_ms <= MOST_WAIT_MS + self.late_ms
        )


def _day(now: float) -> tuple[int, ...]:
    start = int(now) - 40_000
    return tuple(start + 86_400 * n for n in (-1, 0, 1, 2))


@dataclass
class Load:
    """Who asks for what."""

    ledgers: Sequence[SharedLedger]
    draw: random.Random
    asked: list[Asked] = field(default_factory=list)
    _ids: count[int] = field(default_factory=count)
    _day: tuple[int, ...] = field(default_factory=lambda: _day(time.time()))

    def holds(self, key: str, tokens: int, nusd: int) -> list[Hold]:
        """Of a key, such as `far closed` or `tight open`; and the budget."""
        what, _, policy = key.partition(" ")
        on_down: Any = policy
        if what == "tight":
            return [Hold(Limit(key, "rolling", "requests", TIGHT, on_down=on_down), 1)]
        if what == "budget":
            return [Hold(Limit(key, "period", "nusd", BUDGET, starts=self._day, on_down="closed"), nusd)]
        return [
            Hold(Limit(f"{key} tokens", "period", "tokens", 10**12, starts=self._day, on_down=on_down), tokens),
            Hold(Limit(f"{key} usd", "period", "nusd", 10**15, starts=self._day, on_down=on_down), nusd),
        ]

    async def one(self, key: str) -> None:
        """One reservation, which nobody ends: it stays booked as reserved."""
        tokens = self.draw.randint(*TOKENS)
        holds = self.holds(key, tokens, tokens * NUSD_A_TOKEN)
        number = next(self._ids)
        began = time.monotonic()
        made = await self.ledgers[number % GATEWAYS].reserve(f"f{number}", holds, LEASE, time.time(), PATIENCE)
        waited = time.monotonic() - began
        id = made.id if isinstance(made, Reservation) else ""
        asked = Asked(key, id, time.time(), waited, tokens, tokens * NUSD_A_TOKEN, _how(made, holds))
        self.asked.append(asked)

    async def steadily(self, key: str, rate: float) -> None:
        """So many a second, until cancelled, and then until the last is answered."""
        under_way: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        try:
            for number in count():
                task = asyncio.create_task(self.one(key))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                await asyncio.sleep(max(0.0, began + (number + 1) / rate - time.monotonic()))
        finally:
            await asyncio.gather(*under_way)


def _how(made: Reservation | Refused, holds: Sequence[Hold]) -> How:
    if isinstance(made, Refused):
        return "unchecked" if made.unchecked else "full"
    if len(made.holds) < len(holds):
        return "uncounted"
    return "counted" if made.holds[0].limit == holds[0].limit else "shared"


@asynccontextmanager
async def _ledgers(url: str) -> AsyncIterator[list[SharedLedger]]:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(Store(url)) for _ in range(GATEWAYS)]
        for store in stores:
            store.start()
        await _until(lambda: all(store.state.up and store.state.replicas == GATEWAYS for store in stores))
        made = [SharedLedger(store, RedisLedger(store)) for store in stores]
        yield made
        for ledger in made:
            await ledger.close()


async def _until(condition: Callable[[], bool], patience: float = MOST) -> None:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"what a failover ends with did not come within {patience:g} s")
        await asyncio.sleep(0.02)


async def fell_over(names: Sequence[str], rate: float, folder: Path, say: Callable[[str], None]) -> list[Fell]:
    """Each of these falls, each with servers of its own."""
    told = []
    for name in names:
        say(f"failover: {FALLS[name].title}")
        own = folder / name
        own.mkdir(parents=True)
        with redis_sentinel(own, DOWN_AFTER_MS, 10_000) as watched:
            told.append(await _one(FALLS[name], rate, watched))
    return told


async def _one(fall: Fall, rate: float, watched: Watched) -> Fell:
    master = watched.master
    async with (
        Redis(port=master.port) as primary,
        Redis(port=watched.replica_port) as replica,
        AsyncExitStack() as stack,
    ):
        if fall.guarded:
            for server in (primary, replica):
                await server.config_set("min-replicas-to-write", 1)
                await server.config_set("min-replicas-max-lag", 1)
        ledgers = await stack.enter_async_context(_ledgers(watched.url))
        load = Load(ledgers, random.Random(0))
        keys = {f"{what} {p}": r for p in POLICIES for what, r in (("far", rate), ("tight", TIGHT_RATE))}
        asking = [asyncio.create_task(load.steadily(key, r)) for key, r in {**keys, "budget ": rate / 2}.items()]
        with lateness() as late:
            await asyncio.sleep(BEFORE)
            if fall.cut:
                await replica.replicaof("127.0.0.1", free_port())
                await asyncio.sleep(fall.cut)
            fell_at = time.time()
            master.send(fall.signal)
            await asyncio.sleep(BACK_AFTER)
            if fall.signal is signal.SIGSTOP:
                master.send(signal.SIGCONT)
            else:
                master.kill()
                await asyncio.to_thread(master.start)  # empty, as a supervisor would: the Sentinel makes it a replica
            await asyncio.sleep(AFTER)
            await _until(lambda: _last(load, "far closed") == "counted")
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await asyncio.sleep(1.5)  # what nobody knows of is undone by then
        names: list[Any] = await replica.keys("hybridgate:{ledger}:open:*")
        there = [name.decode().rpartition(":")[2] for name in names]
        stored = {p: int(await replica.hget(f"hybridgate:{{ledger}}:far {p} tokens", "s") or 0) for p in POLICIES}
        return _judged(fall, rate, load.asked, frozenset(there), stored, fell_at, 1000 * max(late, default=0.0))


def _last(load: Load, key: str) -> How:
    return next((one.how for one in reversed(load.asked) if one.key == key), "full")


def _judged(
    fall: Fall,
    rate: float,
    asked: Sequence[Asked],
    there: frozenset[str],
    stored: Mapping[OnDown, int],
    fell_at: float,
    late_ms: float,
) -> Fell:
    counted = [one for one in asked if one.how == "counted"]
    lost = [one for one in counted if one.id not in there]
    far = [one for one in lost if one.key.startswith("far")]
    before = [one.at for one in counted if one.at <= fell_at + 0.5]
    apart, over, lost_there, unexplained = {}, {}, {}, 0
    for policy in POLICIES:
        ways = [one.at for one in asked if one.key == f"far {policy}" and one.how not in ("counted", "full")]
        apart[policy] = max(ways, default=0.0) - min(ways, default=0.0)
        tight = [one for one in asked if one.key == f"tight {policy}" and one.how in _ADMITTED]
        calls = [Seen(one.id, one.at, one.at, one.tokens, one.nusd, one.how) for one in tight]
        over[policy] = max(0, most_within(calls, MINUTE) - TIGHT)
        lost_there[policy] = sum(one.key == f"tight {policy}" for one in lost)
        kept = sum(one.tokens for one in counted if one.key == f"far {policy}" and one.id in there)
        unexplained += abs(stored[policy] - kept)
    spent = sum(one.nusd for one in counted if one.key == "budget ")
    return Fell(
        fall,
        3 * rate + 3 * TIGHT_RATE + rate / 2,
        Lost(
            len(far),
            sum(one.tokens for one in far),
            sum(one.nusd for one in far),
            max(before, default=0.0) - min((one.at for one in lost), default=max(before, default=0.0)),
        ),
        apart,
        over,
        lost_there,
        max(0, spent - BUDGET),
        sum(one.nusd for one in lost if one.key == "budget "),
        unexplained,
        1000 * max((one.waited for one in asked), default=0.0),
        late_ms,
    )
