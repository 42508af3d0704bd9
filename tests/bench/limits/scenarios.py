"""Many clients against one key's limits, over several gateways that share them; and the same while gateways are killed.

Owns the limits and what is asked of them. Refuses to believe a gateway: `judge.py` says what held.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.held import LEASE
from tests.bench.limits import judge
from tests.bench.limits.clients import Crowd
from tests.bench.limits.judge import Seen, Verdict
from tests.bench.limits.stage import Stage, stage
from tests.bench.program import BenchError

CLOSED = "on_redis_down: closed"  # so that a Redis that is late on a busy machine never counts as none
KEY = "crm"
LEAST_USED = 0.95


@dataclass(frozen=True, slots=True)
class Most:
    """The limits of one scenario; None where there is none. Money in US dollars."""

    rpm: int | None = None
    tpm: int | None = None
    slots: int | None = None
    usd: float | None = None

    def stated(self) -> str:
        """In the key file's language."""
        parts = [
            f"{name}: {value}"
            for name, value in (
                ("requests_per_minute", self.rpm),
                ("tokens_per_minute", self.tpm),
                ("concurrent_requests", self.slots),
                ("usd_per_day", self.usd),
            )
            if value is not None
        ]
        if self.tpm is not None or self.usd is not None:
            parts.append("budget: strict")
        return ", ".join([*parts, CLOSED])


@dataclass(frozen=True, slots=True)
class Pressure:
    """How many clients, for how many seconds, how long one waits that was refused, and every how many seconds a gateway
    is killed (0: never)."""

    clients: int = 2_000
    seconds: float = 75.0
    pause: tuple[float, float] = (5.0, 15.0)
    gateways: int = 4
    kill_every: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """`delay`: seconds that an answer takes. `at`: its own pressure, where what is limited would be used up before the
    first gateway is killed; played with kills only."""

    title: str
    most: Most
    delay: float = 0.2
    at: Pressure | None = None


LIMITS = Most(rpm=100, tpm=10_000, slots=5, usd=1.0)
SCENARIOS: Mapping[str, Scenario] = {
    "rpm": Scenario("100 requests a minute", Most(rpm=LIMITS.rpm)),
    "tpm": Scenario("10,000 tokens a minute", Most(tpm=LIMITS.tpm)),
    "slots": Scenario("5 at once", Most(slots=LIMITS.slots), delay=3.0),
    "usd": Scenario("1 USD a day, strict", Most(usd=LIMITS.usd)),
    "four": Scenario("all four", LIMITS),
    "spent": Scenario(
        "1 USD a day, strict, spent over the kills",
        Most(usd=LIMITS.usd),
        delay=2.0,
        at=Pressure(clients=8, pause=(0.5, 1.5), kill_every=6.0),
    ),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What one scenario showed."""

    title: str
    verdicts: Sequence[Verdict]
    statuses: Counter[int]
    most_open: int
    kills: int

    @property
    def used(self) -> float:
        """The largest share of what was permitted: of several limits one is the tightest."""
        return max(verdict.share for verdict in self.verdicts)

    @property
    def holds(self) -> bool:
        """Whether no limit was exceeded, and enough of the tightest was used."""
        return all(verdict.kept for verdict in self.verdicts) and self.used >= LEAST_USED


def verdicts(
    most: Most,
    calls: Sequence[Seen],
    began: float,
    seconds: float,
    killed: Sequence[float],
    leases: Sequence[float] = (),
    held_nusd: int = 0,
) -> list[Verdict]:
    """Of each limit of a scenario. `leases`: when those end that gateways left which were `killed` then; `held_nusd`:
    see `judge.money`."""
    found = []
    if most.rpm is not None:
        found.append(judge.a_minute("requests/min", calls, most.rpm, began + seconds))
    if most.tpm is not None:
        found.append(judge.a_minute("tokens/min", calls, most.tpm, began + seconds, lambda call: call.tokens))
    if most.slots is not None:
        first, end = min((call.at for call in calls), default=began), began + seconds
        found.append(judge.at_once(calls, most.slots, first, end, _held_slots(leases, killed, end)))
    if most.usd is not None:
        found.append(judge.money(calls, round(most.usd * 1e9), held_nusd))
    return found


def _held_slots(leases: Sequence[float], killed: Sequence[float], end: float) -> float:
    """Seconds of slots that killed gateways held, until `end`. A lease lasts `LEASE` and is renewed while a third of it
    is gone, so that its gateway was killed 20 to 30 s before it ends. (A call that was over at the provider, or had not
    come there, may have been one of them.)"""
    held = 0.0
    for until in leases:
        at = max((at for at in killed if LEASE * 2 / 3 - 1 <= until - at <= LEASE + 1), default=until)
        held += max(0.0, min(until, end) - at)
    return held


async def played(scenario: Scenario, pressure: Pressure, folder: Path, say: Callable[[str], None]) -> Result:
    """One scenario from an empty Redis to its verdicts."""
    if scenario.at is not None:
        at = scenario.at
        pressure = replace(pressure, clients=at.clients, pause=at.pause, kill_every=at.kill_every)
    draw = random.Random(pressure.seed)
    limits = {KEY: scenario.most.stated()}
    async with stage(folder, limits, pressure.gateways, scenario.delay) as there:
        crowd = Crowd(there, draw)
        began = time.time()
        each = await _reserved_by_one(there, crowd) if scenario.at is not None else 0
        kills = asyncio.create_task(killing(there, draw, pressure.kill_every)) if pressure.kill_every else None
        await crowd.press([KEY], pressure.clients, pressure.seconds, pressure.pause)
        if kills is not None:
            kills.cancel()
            with suppress(asyncio.CancelledError):
                await kills
        await asyncio.sleep(scenario.delay)
        calls = await there.seen()
        held = await _held_by_killed(there, calls, each) if scenario.at is not None else 0
        leases = [*(await there.leases()).values()]
        found = verdicts(scenario.most, calls, began, pressure.seconds, there.killed_at, leases, held)
        statuses = crowd.statuses()
        say(f"{scenario.title}: {len(calls)} calls; answers {dict(sorted(statuses.items()))}")
        return Result(scenario.title, found, statuses, crowd.most_open, len(there.killed_at))


async def _reserved_by_one(there: Stage, crowd: Crowd) -> int:
    """Nano-dollars that one request holds while it is open, as all do. Raises `BenchError`."""
    asked = asyncio.create_task(crowd.ask(KEY))
    while not asked.done():
        if held := await there.booked(KEY, "usd/day"):
            await asked
            return held
        await asyncio.sleep(0.05)
    raise BenchError("the first request was not let in, or too fast to be seen")


async def _held_by_killed(there: Stage, calls: Sequence[Seen], each: int) -> int:
    """Nano-dollars that are booked beyond what the provider bills: at most what the reservations hold that killed
    gateways left. What else were missing is not explained by them."""
    left = len(await there.unended()) * each
    return max(0, min(left, await there.booked(KEY, "usd/day") - sum(call.nusd for call in calls)))


async def killing(there: Stage, draw: random.Random, every: float) -> None:
    """Kill one at random, start it again, and wait until it answers; for ever. One at least answers all the time."""
    while True:
        await asyncio.sleep(draw.uniform(0.5, 1.5) * every)
        index = draw.randrange(len(there.ports))
        there.kill(index)
        there.start(index)
        await there.ready(index)
