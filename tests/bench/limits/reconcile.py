"""What the ledger holds against what the usage records sum to, after failures, cut streams, clients that leave, a Redis
that goes and comes back, and gateways that are killed.

Without kills both are equal, to the token and the nano-dollar. A killed gateway leaves no record of what it had open;
the ledger books that as it was reserved. So with kills the difference is what those reservations hold, each of which is
found by its id: no more and no less.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.usage import Entry
from gateway.usage.files import files_of, read
from tests.bench.limits.clients import Crowd
from tests.bench.limits.scenarios import KEY, killing
from tests.bench.limits.stage import Stage, stage
from tests.bench.program import BenchError

LIMITS = "tokens_per_day: 1000M, usd_per_day: 1000000, concurrent_requests: 1000, budget: strict, on_redis_down: closed"
FAULTS = ("",) * 12 + ("fail", "full", "drop", "cut")
MOST_CLIENTS = 40
MOST_SECONDS = 50.0  # the ledger forgets a reservation that nobody ended a minute after its lease
SETTLED = 35.0  # seconds within which the ledger has been told all that it will be told
UNCHANGED = 6.0  # seconds without a change after which nobody is about to end anything


@dataclass(frozen=True, slots=True)
class Sums:
    """Tokens and nano-dollars."""

    tokens: int
    nusd: int

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.tokens - other.tokens, self.nusd - other.nusd)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """`left` is what the reservations hold that nobody ended, less what records say of the same requests; `unended`
    how many those are."""

    title: str
    requests: int
    failed: int
    kills: int
    ledger: Sums
    records: Sums
    unended: int
    left: Sums

    @property
    def holds(self) -> bool:
        """Whether every token and nano-dollar is accounted for; without kills all reservations have ended."""
        return self.ledger - self.records == self.left and (self.kills > 0 or not self.unended)


async def reconciled(
    kill_every: float, seconds: float, clients: int, gateways: int, seed: int, folder: Path, say: Callable[[str], None]
) -> Reconciled:
    """All of it, from an empty Redis."""
    draw = random.Random(seed)
    async with stage(folder, {KEY: LIMITS}, gateways, 0.15) as there:
        crowd = Crowd(there, draw)
        each = await _reserved_by_one(there, crowd)
        beside = [asyncio.create_task(_interrupted(there, draw))]
        if kill_every:
            beside.append(asyncio.create_task(killing(there, draw, kill_every)))
        await asyncio.gather(*(_asking(crowd, draw, time.monotonic() + seconds) for _ in range(clients)))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        there.redis.send(signal.SIGCONT)
        await _quiet(there)
        await there.stop_gateways()
        unended = await there.unended()
        holds = await _held(there)
        entries = _entries(there.usage)
        recorded = Sums(sum(e.tokens for e in entries.values()), sum(e.cost_nusd for e in entries.values()))
        left = [each - _of(entries, id) for id in unended]
        told = Reconciled(
            "with kills" if there.killed_at else "without kills",
            len(entries),
            sum(e.outcome != "ok" for e in entries.values()),
            len(there.killed_at),
            holds,
            recorded,
            len(unended),
            Sums(sum(one.tokens for one in left), sum(one.nusd for one in left)),
        )
        say(f"reconcile {told.title}: {crowd.statuses()}, ledger {holds}, records {recorded}, unended {len(unended)}")
        return told


async def _asking(crowd: Crowd, draw: random.Random, end: float) -> None:
    """One client: plain, streamed, at faulty deployments, and now and then it leaves."""
    while time.monotonic() < end:
        leaves = draw.uniform(0.0, 0.3) if draw.random() < 0.2 else None
        said = await crowd.ask(KEY, draw.choice(FAULTS), stream=draw.random() < 0.5, leaves_after=leaves)
        if said.status != 200:
            await asyncio.sleep(0.1)


async def _interrupted(there: Stage, draw: random.Random) -> None:
    """A Redis that says nothing for a while, now and then; for ever."""
    while True:
        await asyncio.sleep(draw.uniform(4.0, 8.0))
        there.redis.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(draw.uniform(0.5, 2.5))
        finally:
            there.redis.send(signal.SIGCONT)


async def _held(there: Stage) -> Sums:
    """What the ledger holds of the key."""
    return Sums(await there.booked(KEY, "tokens/day"), await there.booked(KEY, "usd/day"))


async def _reserved_by_one(there: Stage, crowd: Crowd) -> Sums:
    """What one request holds while it is open: as all ask for as much, what each holds."""
    for _ in range(20):
        asked = asyncio.create_task(crowd.ask(KEY))
        while not asked.done():
            held = await _held(there)
            if held.tokens and await there.unended():
                await asked
                return held
        if (await asked).status == 200:
            raise BenchError("the first request was too fast to be seen")
        await asyncio.sleep(0.5)
    raise BenchError("no request was let in")


async def _quiet(there: Stage) -> None:
    """Wait until all has ended that anybody is about to end."""
    began = changed = time.monotonic()
    before = await there.unended()
    while before and time.monotonic() < began + SETTLED and time.monotonic() < changed + UNCHANGED:
        await asyncio.sleep(0.2)
        now = await there.unended()
        if sorted(now) != sorted(before):
            before, changed = now, time.monotonic()


def _entries(path: Path) -> Mapping[str, Entry]:
    """By the decision's id."""
    bad: list[str] = []
    entries = {entry.id: entry for entry in read(files_of(path), bad.append)}
    if bad:
        raise BenchError(bad[0])
    return entries


def _of(entries: Mapping[str, Entry], attempt: str) -> Sums:
    """What the record says of an attempt; nothing where the gateway was killed before it wrote one."""
    id, _, tried = attempt.partition(".")
    number = tried.partition("+")[0]  # what comes after is how often it was asked for
    entry = entries.get(id)
    if entry is None or len(entry.attempts) < int(number):
        return Sums(0, 0)
    booked = entry.attempts[int(number) - 1]
    return Sums(booked.tokens, booked.cost_nusd)
