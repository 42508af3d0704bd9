"""`python -m tests.bench.replicas`: what a request costs whose limits are counted and whose answer is stored where
replicas share both, in a Redis that is started for it, beside the same request in memory.

The key has four limits, the request 2 KB of prose, and the backend answers at once. CPU is the gateway's own, not the
server's. What a request waits for Redis is told as what it takes longer than in memory, until its call (a miss) or its
answer (a hit), over what one PING takes on the same connection. They take turns, so that what else the machine does is
in each, and each figure is a median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import orjson

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.backends.base import Call
from gateway.cache import MemoryCache, RedisCache
from gateway.caching import Answers
from gateway.chat import ChatPath
from gateway.decision import Caching
from gateway.fleet import Fleet
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import Scanner
from gateway.ledger import MemoryLedger
from gateway.ledger.shared import SharedLedger
from gateway.serving import Serving
from gateway.store import Store
from tests.bench.cache import TEXT, Instant
from tests.bench.ledger import HEADERS, HOME, LIMITED
from tests.fakes import FakeAnswer, Ids, Log, policy
from tests.patient import PATIENT, PatientLedger
from tests.redis_server import redis_server

REQUESTS = 1000  # of each kind


class Noting(Instant):
    """Notes when it was called last."""

    at = 0.0

    async def open(self, call: Call) -> FakeAnswer:
        self.at = time.perf_counter()
        return await super().open(call)


@dataclass(frozen=True, slots=True)
class Took:
    """Of one request: seconds until its call or its answer, and of CPU until all of it was told."""

    wait: float
    cpu: float


class Asked:
    """A request path for one key, over one store or in memory."""

    def __init__(self, store: Store | None) -> None:
        p, log, self._backend, self._ids = policy([HOME], cache=Caching(3600.0, "always")), Log(), Noting(), Ids()
        self._ledger = MemoryLedger() if store is None else PatientLedger(store)
        shared = None if store is None else RedisCache(store, 10**6, wait=PATIENT)
        fleet, ids = Fleet(p.deployments), Ids()
        books = Books(fleet, log, lambda _: log.lines.clear(), time.monotonic)
        self._answers = Answers(MemoryCache(10**5, 10**9, 10**6), time.time, ids, shared)
        serving = Serving(p, Scanner(p.kinds), {}, Backends({"home": self._backend}))
        limiter = Limiter(self._ledger, fleet, time.monotonic, time.time)
        ring = Keyring([Key(digest_of("hg-crm"), LIMITED)])
        self._path = ChatPath(
            serving, fleet, books, limiter, time.monotonic, time.time, ids, ring, answers=self._answers
        )

    async def asked(self, number: int, hit: bool) -> Took:
        """One request, to the end of all that comes after it."""
        text = f"{number} {TEXT}"
        body = orjson.dumps({"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 300})
        cpu, began = time.process_time(), time.perf_counter()
        reply = await self._path.complete(HEADERS, body)
        until = time.perf_counter() if hit else self._backend.at
        async for _ in reply.chunks:
            pass
        await reply.close()
        await self._answers.flights.settled()
        if isinstance(self._ledger, SharedLedger):
            await self._ledger.close(patience=PATIENT)
        counts = self._answers.counts
        assert (counts.hits if hit else counts.misses) > 0 and not counts.unavailable, "it is what it is taken for"
        return Took(until - began, time.process_time() - cpu)


@dataclass(frozen=True, slots=True)
class Row:
    """`cpu_us`: of the gateway, all that comes after the answer included. `added_us`: what Redis adds until the call or
    the answer, `pings`: over what a PING takes; None in memory."""

    name: str
    cpu_us: float
    added_us: float | None = None
    pings: float | None = None

    def line(self) -> str:
        added = "" if self.added_us is None else f"   waits {self.added_us:6.0f} µs for Redis: {self.pings:.2f} PINGs"
        return f"{self.name:<20} {self.cpu_us:7.0f} µs of CPU{added}"


async def pinged(store: Store) -> Took:
    """One exchange that asks for nothing."""
    cpu, began = time.process_time(), time.perf_counter()
    await store.run(("PING",), within=PATIENT)
    return Took(time.perf_counter() - began, time.process_time() - cpu)


async def rows(url: str, requests: int = REQUESTS) -> list[Row]:
    """All of them, from so many requests of each kind."""
    async with Store(url, timeout=PATIENT) as store:
        there, here = Asked(store), Asked(None)
        for path in (there, here):
            for number in (-2, -1):  # scripts are sent once
                await path.asked(number, hit=False)
        took: dict[str, list[Took]] = {}
        for number in range(requests):
            for kind, hit in (("miss", False), ("hit", True)):
                took.setdefault(f"{kind} there", []).append(await there.asked(number, hit))
                took.setdefault(f"{kind} here", []).append(await here.asked(number, hit))
            took.setdefault("ping", []).append(await pinged(store))
    wait = {name: median([one.wait for one in all_]) * 1e6 for name, all_ in took.items()}
    cpu = {name: median([one.cpu for one in all_]) * 1e6 for name, all_ in took.items()}
    told = []
    for kind in ("miss", "hit"):
        added = wait[f"{kind} there"] - wait[f"{kind} here"]
        told.append(Row(f"a {kind} in Redis", cpu[f"{kind} there"], added, added / wait["ping"]))
        told.append(Row(f"a {kind} in memory", cpu[f"{kind} here"]))
    return [*told, Row("a PING", cpu["ping"], wait["ping"], 1.0)]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url:
        told = asyncio.run(rows(url))
    sys.stdout.write("\n".join(row.line() for row in told) + "\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in told], indent=1))


if __name__ == "__main__":
    main()
