"""What a Redis says of revoked keys, whatever else somebody has put there."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.revocations import Revocations
from gateway.store import Store
from tests.redis_server import redis_server

GONE = bytes(range(32))


def test_what_is_no_digest_hides_none(tmp_path: Path) -> None:
    async def check(url: str) -> None:
        async with asyncio.timeout(30), Store(url, timeout=30.0) as store:
            revocations = Revocations(store)
            await revocations.announce(GONE, 1.0)
            for odd in ("", "crm", "zz", "abc", b"\xff\xfe"):
                await store.run(("ZADD", "hybridgate:revoked", 2, odd))
            assert GONE in await revocations.known()
            seen: list[frozenset[bytes]] = []
            watching = asyncio.create_task(revocations.watch(seen.append))
            while not seen:  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.01)
            await store.run(("DEL", "hybridgate:revoked"))
            await store.run(("SET", "hybridgate:revoked", "of another kind"))
            await asyncio.sleep(0.4)
            assert not watching.done() and seen[-1] == {GONE}, "what was known holds"
            watching.cancel()

    with redis_server(tmp_path) as url:
        asyncio.run(check(url))
