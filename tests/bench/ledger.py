"""`python -m tests.bench.ledger`: what limits cost, in CPU time of one process.

Each figure is the median over several rounds, with the fastest beside it. The key has four limits (requests, tokens and
open requests a minute, dollars a day). The request path is that of a small request over a backend that answers at once.
With Redis, which is started for it, the gateway's own time counts and not the server's: 64 requests at once, each
reserving and settling.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import orjson

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.chat import ChatPath
from gateway.fleet import Fleet
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import Scanner
from gateway.ledger import Counting, MemoryLedger
from gateway.limits import Allowance, CallerLimits, Limits
from gateway.serving import Serving
from gateway.store import Store
from gateway.types import Caller, RequestFacts, TokenCount, Usage
from tests.bench.cache import Instant, run_now
from tests.bench.policy import Figure, measured
from tests.fakes import Ids, Log, deployment, policy
from tests.patient import PatientLedger
from tests.redis_server import redis_server

ACCOUNTED_US = 30.0
MANY = 10**9
FOUR = Limits(
    (
        Allowance("requests_per_minute", MANY),
        Allowance("tokens_per_minute", MANY),
        Allowance("concurrent_requests", MANY),
        Allowance("usd_per_day", 10**15),
    )
)
LIMITED = Caller("acme", "crm", limits=CallerLimits(key=FOUR))
HOME = deployment("home", window=None)
HEADERS = {"authorization": "Bearer hg-crm"}
BODY = orjson.dumps({"model": "auto", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 300})
FACTS = RequestFacts("auto", "acme", prompt=TokenCount(100, 25), max_tokens=300, key_id="crm")
ROUNDS, AT_ONCE = 30, 64


def path_of(caller: Caller) -> ChatPath:
    """A request path for one caller whose record is written to memory."""
    p, log, ids = policy([HOME], order_by="listed"), Log(), Ids()
    fleet = Fleet(p.deployments)
    books = Books(fleet, log, lambda _: log.lines.clear(), time.monotonic)
    serving = Serving(p, Scanner(p.kinds), {}, Backends({"home": Instant()}))
    limiter = Limiter(MemoryLedger(), fleet, time.monotonic, time.time)
    ring = Keyring([Key(digest_of("hg-crm"), caller)])
    return ChatPath(serving, fleet, books, limiter, time.monotonic, time.time, ids, ring)


async def accounted(limiter: Limiter, ring: Keyring, ids: Ids) -> None:
    """Who asks, what its limits say, and what it took in the end."""
    caller = ring.caller_of(HEADERS, limiter.wall())
    asking = limiter.asking(caller, {}, FACTS, ids())
    assert asking is not None
    held = await asking.hold(HOME)
    assert held is not None
    held.settle(Usage(25, 100), known=True)


def limiter_over(ledger: Counting) -> Limiter:
    return Limiter(ledger, Fleet(["home"]), time.monotonic, time.time)


async def figures() -> list[Figure]:
    """Those of one process."""
    limiter, ring, ids = limiter_over(MemoryLedger()), Keyring([Key(digest_of("hg-crm"), LIMITED)]), Ids()
    free, limited = path_of(Caller("acme", "crm")), path_of(LIMITED)

    async def on(path: ChatPath) -> None:
        reply = await path.complete(HEADERS, BODY)
        async for _ in reply.chunks:
            pass
        await reply.close()

    return [
        measured("key, reserve, settle: four limits", lambda: run_now(accounted(limiter, ring, ids)), ACCOUNTED_US),
        measured("a request of a key without limits", lambda: run_now(on(free))),
        measured("a request of a key with four", lambda: run_now(on(limited))),
    ]


async def shared_figure(url: str) -> Figure:
    """That of what replicas share."""
    async with Store(url, timeout=5.0) as store:
        ledger = PatientLedger(store)
        limiter, ring, ids = limiter_over(ledger), Keyring([Key(digest_of("hg-crm"), LIMITED)]), Ids()
        rounds = []
        for _ in range(ROUNDS):
            began = time.process_time()
            await asyncio.gather(*(accounted(limiter, ring, ids) for _ in range(AT_ONCE)))
            await ledger.close(patience=5.0)
            rounds.append((time.process_time() - began) / AT_ONCE * 1e6)
        return Figure("key, reserve, settle in Redis, 64 at once", median(rounds), min(rounds), None)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--redis", action="store_true", help="and with a Redis, which is started for it")
    given = parser.parse_args()
    told = asyncio.run(figures())
    if given.redis:
        with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url:
            told.append(asyncio.run(shared_figure(url)))
    sys.stdout.write("\n".join(figure.line() for figure in told) + "\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(figure) for figure in told], indent=1))


if __name__ == "__main__":
    main()
