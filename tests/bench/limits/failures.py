"""Redis failing under load in every way that we know: what is answered, how long anybody waits, and what limits do.

Owns what is broken when. Of each `on_redis_down` there are two keys: one whose limit is far away, which says what is
answered and how fast, and one whose limit is used up before Redis fails, which says what is let in beyond it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import orjson
from redis.exceptions import RedisError

from gateway.limits import OnDown
from tests.bench.limits.clients import Crowd, Said
from tests.bench.limits.stage import Stage, stage
from tests.bench.measure import quantile
from tests.bench.program import BenchError, free_port

TIGHT = 40  # requests a minute
ROOMY = 1_000_000
TIGHT_RATE, ROOMY_RATE = 10.0, 10.0  # requests a second of each key
BEFORE, DURING, AFTER = 5.0, 5.0, 15.0  # seconds; the last at most
MOST_WAIT_MS = 100.0
ANSWERED = 0.99
POLICIES: Sequence[OnDown] = get_args(OnDown)
WELL = "well"  # a key that only asks whether limits are counted

Broken = Callable[[Stage], Awaitable[None]]


async def _refused(there: Stage) -> None:
    there.redis.kill()


async def _again(there: Stage) -> None:
    await asyncio.to_thread(there.redis.start)


async def _silent(there: Stage) -> None:
    there.redis.send(signal.SIGSTOP)


async def _goes_on(there: Stage) -> None:
    there.redis.send(signal.SIGCONT)


async def _slow(there: Stage) -> None:
    there.proxy.delay = 0.2


async def _fast(there: Stage) -> None:
    there.proxy.delay = 0.0


def _told(*command: str | int) -> Broken:
    async def tell(there: Stage) -> None:
        async with there.ask_redis() as redis:
            await redis.execute_command(*command)  # type: ignore[no-untyped-call]

    return tell


async def _emptied(there: Stage) -> None:
    there.redis.kill()
    await asyncio.to_thread(there.redis.start)


async def _nothing(there: Stage) -> None:
    """It is as it was."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`down`: nothing can be counted meanwhile."""

    title: str
    begin: Broken
    end: Broken
    down: bool = True


FAILURES: Mapping[str, Failure] = {
    "refused": Failure("connections refused", _refused, _again),
    "silent": Failure("silent (stopped)", _silent, _goes_on),
    "slow": Failure("slow (200 ms)", _slow, _fast),
    "full": Failure("full (OOM)", _told("CONFIG", "SET", "maxmemory", 1), _told("CONFIG", "SET", "maxmemory", 0)),
    "readonly": Failure("read-only", _told("REPLICAOF", "127.0.0.1", free_port()), _told("REPLICAOF", "NO", "ONE")),
    "flushed": Failure("scripts flushed", _told("SCRIPT", "FLUSH"), _nothing, down=False),
    "emptied": Failure("restarted empty", _emptied, _nothing, down=False),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Of one failure and one `on_redis_down`: the `answered` share of what the far limit let in, milliseconds that its
    answers took longer than before, the longest wait for Redis of any request, how long the
    machine let a process wait for its turn meanwhile (which is part of any wait), how many a limit of `TIGHT` let in
    before and during, and seconds until limits were counted again."""

    failure: Failure
    on_down: OnDown
    answered: float
    added_p50_ms: float
    added_p95_ms: float
    longest_wait_ms: float
    late_ms: float
    before: int
    during: int
    back_s: float

    @property
    def holds(self) -> bool:
        """Whether it did what `on_redis_down` says, and nobody waited too long."""
        closed = self.failure.down and self.on_down == "closed"
        right = self.answered <= 1 - ANSWERED if closed else self.answered >= ANSWERED
        most = {"open": ROOMY, "closed": 0 if closed else TIGHT, "local_share": TIGHT}[self.on_down]
        return right and self.longest_wait_ms <= MOST_WAIT_MS + self.late_ms and self.during <= most


async def failed(names: Sequence[str], gateways: int, folder: Path, say: Callable[[str], None]) -> list[Row]:
    """All of these failures, one after the other, on the same gateways."""
    limits = {WELL: f"requests_per_minute: {ROOMY}, on_redis_down: closed"}
    for name in names:
        for on_down in POLICIES:
            for what, most in (("roomy", ROOMY), ("tight", TIGHT)):
                limits[f"{name}-{on_down}-{what}"] = f"requests_per_minute: {most}, on_redis_down: {on_down}"
    rows: list[Row] = []
    async with stage(folder, limits, gateways, 0.01, through_proxy=True) as there:
        for name in names:
            say(f"Redis: {FAILURES[name].title}")
            rows += await _one(name, there, say)
    return rows


async def _one(name: str, there: Stage, say: Callable[[str], None]) -> list[Row]:
    failure = FAILURES[name]
    crowd = Crowd(there, random.Random(0))
    await _counted(crowd)
    asking = [
        asyncio.create_task(_paced(crowd, f"{name}-{on_down}-{what}", rate))
        for on_down in POLICIES
        for what, rate in (("roomy", ROOMY_RATE), ("tight", TIGHT_RATE))
    ]
    began = time.time()
    await asyncio.sleep(BEFORE)
    breaking = time.time()
    await failure.begin(there)
    broke = time.time()
    with lateness() as late:
        await asyncio.sleep(DURING)
    mended = time.time()
    await failure.end(there)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    back = await _counted(crowd)
    if failure.down:
        say(f"  counted again after {back:.1f} s")
    found = []
    for on_down in POLICIES:
        roomy, tight = ([s for s in crowd.said if s.key == f"{name}-{on_down}-{what}"] for what in ("roomy", "tight"))
        before, during = _between(roomy, began, breaking), _between(roomy, broke, mended)
        found.append(
            Row(
                failure,
                on_down,
                sum(s.status == 200 for s in during) / max(1, len(during)),
                _ms(during, 0.5) - _ms(before, 0.5),
                _ms(during, 0.95) - _ms(before, 0.95),
                _longest_wait_ms(there, f"{name}-{on_down}-", broke, mended),
                1000 * max(late, default=0.0),
                sum(s.status == 200 for s in _between(tight, began, breaking)),
                sum(s.status == 200 for s in _between(tight, broke, mended)),
                back,
            )
        )
    return found


@contextmanager
def lateness() -> Iterator[list[float]]:
    """Seconds by which a thread that sleeps for 5 ms wakes up too late, again and again, until the block ends."""
    late: list[float] = []
    over = threading.Event()

    def sleep() -> None:
        while not over.is_set():
            began = time.monotonic()
            time.sleep(0.005)
            late.append(time.monotonic() - began - 0.005)

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        yield late
    finally:
        over.set()
        thread.join()


async def _paced(crowd: Crowd, key: str, rate: float) -> None:
    """So many requests a second, whatever becomes of them; until cancelled, and then until the last is answered."""
    asked: set[asyncio.Task[Said]] = set()
    try:
        while True:
            task = asyncio.create_task(crowd.ask(key))
            asked.add(task)
            await asyncio.sleep(1 / rate)
    finally:
        await asyncio.gather(*asked)


async def _counted(crowd: Crowd) -> float:
    """Seconds until every gateway counts limits together with the others. Raises `BenchError`."""
    began = time.monotonic()
    while time.monotonic() < began + 60:
        said = await asyncio.gather(*(crowd.ask(WELL) for _ in crowd.stage.ports))
        with suppress(RedisError, OSError):
            async with crowd.stage.ask_redis() as redis:
                alive = int(await redis.zcard("hybridgate:{ledger}:replicas"))
                if all(one.status == 200 for one in said) and alive == len(crowd.stage.ports):
                    return time.monotonic() - began
        await asyncio.sleep(0.1)
    raise BenchError("limits are not counted again a minute after Redis is back")


def _between(said: Sequence[Said], since: float, until: float) -> list[Said]:
    """Those that were asked then."""
    return [one for one in said if since <= one.at - one.seconds < until]


def _ms(said: Sequence[Said], part: float) -> float:
    """A quantile of how long answers took."""
    return 1000 * (quantile([one.seconds for one in said], part) or 0.0)


def _longest_wait_ms(there: Stage, keys: str, since: float, until: float) -> float:
    """As the decision records tell it."""
    longest = 0.0
    for index in range(len(there.ports)):
        for line in there.log_of(index).read_bytes().splitlines():
            told = orjson.loads(line)
            if str(told.get("key", "")).startswith(keys) and since <= told.get("wall", 0.0) < until:
                longest = max(longest, told.get("limits_ms", 0.0))
    return longest
