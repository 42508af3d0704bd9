"""`python -m tests.bench.cache`: what stored answers cost, in CPU time of one process.

Each figure is the median over several rounds, with the fastest beside it. The request has 2 KB of prose, the answer
1.5 KB. `beside` is the same request path over a backend that answers at once, without a cache. With Redis, which is
started for it, the gateway's own time counts and not the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.backends.base import Call, Chunk
from gateway.cache import MemoryCache, RedisCache, Seal, as_stream, key_of
from gateway.caching import Answers
from gateway.chat import ChatPath
from gateway.decision import Caching
from gateway.fleet import Fleet
from gateway.intake import facts_of
from gateway.labels import Scanner
from gateway.ledger import MemoryLedger
from gateway.policy import Policy
from gateway.routing import decide
from gateway.serving import Serving
from gateway.store import Store
from gateway.types import Usage
from gateway.wire.chat import parse
from tests.bench.policy import PROSE, Figure, measured
from tests.fakes import Clock, FakeAnswer, Ids, Log, completion, deployment, policy
from tests.redis_server import redis_server

DEPLOYMENTS = [deployment("home", zone="on_premises", window=None), deployment("cloud", window=None)]
ROUNDS, HITS = 9, 300
LOOKUP_US = 20.0
HIT_US = 300.0
TEXT = (PROSE * 10)[:2048]
BODY = orjson.dumps(
    {"model": "auto", "temperature": 0, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 300}
)
STREAMED = orjson.dumps({**orjson.loads(BODY), "stream": True, "stream_options": {"include_usage": True}})
ANSWER = completion((PROSE * 8)[:1500])


class Instant:
    """A backend that answers at once."""

    async def open(self, call: Call) -> FakeAnswer:
        return FakeAnswer([Chunk(ANSWER, usage=Usage(400, 300), last=True)])

    async def close(self) -> None: ...


def path_of(p: Policy) -> ChatPath:
    """A request path whose record is written to memory."""
    fleet, log, clock, ids = Fleet(p.deployments), Log(), Clock(), Ids()
    books = Books(fleet, log, lambda _: log.lines.clear(), clock)
    answers = Answers(MemoryCache(1000, 10**7, 10**6), clock, ids)
    serving = Serving(p, Scanner(p.kinds), {}, Backends({name: Instant() for name in p.deployments}))
    limiter = Limiter(MemoryLedger(), fleet, clock, clock)
    return ChatPath(serving, fleet, books, limiter, clock, clock, ids, answers=answers)


def run_now(work: Coroutine[Any, Any, object]) -> object:
    """A coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


async def asked(path: ChatPath, body: bytes) -> None:
    """One request, to the end."""
    reply = await path.complete({}, body)
    async for _ in reply.chunks:
        pass
    await reply.close()


async def figures() -> list[Figure]:
    """All of them."""
    p = policy(DEPLOYMENTS, order_by="listed", cache=Caching(3600.0))
    path, chat = path_of(p), parse(BODY)
    answers = path.answers
    assert answers is not None
    await asked(path, BODY)
    await answers.flights.settled()
    assert answers.counts.stores == 1, "the answer is stored"
    facts, _ = await facts_of(path.serving, path.fleet, chat, len(BODY), path.authenticate({}), {})
    permit, snapshot = p.permit(facts), path.fleet.snapshot(1000.0, 0.0, 1000.0)
    decision = decide(p, facts, snapshot)

    def lookup() -> object:
        use = answers.use(chat, facts, permit, decision, {})
        assert use is not None
        return run_now(use.cache.claim(use.key, "", 1000.0))

    def hit(body: bytes) -> Callable[[], object]:
        return lambda: run_now(asked(path, body))

    entry = lookup()
    off = path_of(policy(DEPLOYMENTS, order_by="listed"))
    body = entry.answer  # type: ignore[attr-defined]
    return [
        measured("key of a 2 KB request", lambda: key_of(chat, "acme", ())),
        measured("lookup of a 2 KB request: key and entry", lookup, LOOKUP_US),
        measured("inflating the answer", lambda: entry.answer),  # type: ignore[attr-defined]
        measured("the answer as a stream", lambda: as_stream(body, usage=True)),
        measured("a hit, from the body's bytes to the reply", hit(BODY), HIT_US),
        measured("a hit as a stream", hit(STREAMED), HIT_US),
        measured("beside: no cache, a backend that answers at once", lambda: run_now(asked(off, BODY))),
    ]


async def shared_figures(url: str) -> list[Figure]:
    """Those of what replicas share."""
    told = []
    for name, seal in (("in Redis", None), ("in Redis, sealed", Seal(bytes(32)))):
        async with Store(url, timeout=5.0) as store:
            path = path_of(policy(DEPLOYMENTS, order_by="listed", cache=Caching(3600.0)))
            answers = path.answers
            assert answers is not None
            answers.shared = RedisCache(store, 10**6, seal, wait=5.0)
            await asked(path, BODY)
            await answers.flights.settled()
            rounds, waits = [], []
            for _ in range(ROUNDS):
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(HITS):
                    await asked(path, BODY)
                rounds.append((time.process_time() - cpu) / HITS * 1e6)
                waits.append((time.perf_counter() - wall) / HITS * 1e6)
            assert answers.counts.misses == 1, "all others are hits"
            told.append(Figure(f"a hit {name}", median(rounds), min(rounds), None))
            told.append(Figure(f"a hit {name}, as the clock says", median(waits), min(waits), None))
            await store.run(("FLUSHALL",), within=5.0)
    return told


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--redis", action="store_true", help="and with a Redis, which is started for it")
    given = parser.parse_args()
    told = asyncio.run(figures())
    if given.redis:
        with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url:
            told += asyncio.run(shared_figures(url))
    sys.stdout.write("\n".join(figure.line() for figure in told) + "\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(figure) for figure in told], indent=1))


if __name__ == "__main__":
    main()
