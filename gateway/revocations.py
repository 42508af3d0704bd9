"""Keys that were revoked at one place, for all gateways that share a Redis: known within a quarter of a second, where a
file may take a minute to reach every machine.

Owns where the digests of such keys are, and looking for them. Refuses the file, which has the last word on everything
else: a key that only Redis calls revoked is so until it is forgotten here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress

from gateway.store import Store, StoreUnavailable, reply_of

EVERY = 0.25  # seconds
PATIENCE = 2.0  # seconds that an operator waits
_DIGEST = re.compile(rb"(?:[0-9a-f]{2})+")
KEPT = 400 * 86_400  # seconds; by then the file says so everywhere, or the key has expired


class Revocations:
    """The set `<prefix>:revoked` of a store: digests by when they were revoked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = f"{store.prefix}:revoked"

    async def announce(self, digest: bytes, now: float) -> None:
        """Revoke the key with this digest everywhere; `now` in seconds since 1970. Raises StoreUnavailable."""
        forgotten = ("ZREMRANGEBYSCORE", self._key, "-inf", int(now) - KEPT)
        added = ("ZADD", self._key, int(now), digest.hex())
        for reply in await self._store.run(added, forgotten, within=PATIENCE):
            reply_of(reply)

    async def known(self) -> frozenset[bytes]:
        """All of them; what is no digest counts as nothing. Raises StoreUnavailable."""
        (reply,) = await self._store.run(("ZRANGE", self._key, 0, -1))
        return frozenset(bytes.fromhex(text.decode()) for text in reply_of(reply) if _DIGEST.fullmatch(text))

    async def watch(self, tell: Callable[[frozenset[bytes]], None]) -> None:
        """Tell what is known, again and again, until cancelled; while the store does not answer, what was known
        holds."""
        while True:
            with suppress(StoreUnavailable):
                tell(await self.known())
            await asyncio.sleep(EVERY)
