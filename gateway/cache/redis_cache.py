"""The cache that replicas share, in Redis or whatever speaks its protocol.

Owns the names of its keys (each entry has a hash tag of its own, so that a cluster spreads them), the form of what is
stored, and the claim: who makes an answer that is not there. Refuses to wait: the store says how long, and what cannot
be asked counts as a miss.

What is stored: a head in clear (tenant, model, deployment and zone by name, when) for whoever counts and purges, and
the rest, which is sealed where there is a seal.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

from gateway.cache.base import LEASE_SECONDS, CacheUnavailable, Chosen, Claim, Figures
from gateway.cache.entry import Entry, entry_of, framed, unframed
from gateway.cache.sealing import Seal
from gateway.store import TIMEOUT, Command, Script, ScriptCall, Store, StoreUnavailable, reply_of

_LEASE_MS = int(LEASE_SECONDS * 1000)
_TOGETHER = 200  # entries of one exchange, where all are looked through
_MOST_HEAD_BYTES = 4096  # of what stands in clear: names of the policy
_OPERATORS_WAIT = 5.0  # seconds for one of these

# The entry, or 1 where the claim is won, 0 where it is another's.
_CLAIM = Script(
    """
    local entry = redis.call('GET', KEYS[1])
    if entry then return entry end
    if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
    return redis.call('GET', KEYS[2]) == ARGV[1] and 1 or 0
    """
)
_RENEW = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end")
_RELEASE = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end")


class RedisCache:
    """Implements `Cache` for all who use the same store and prefix. Invariant: nothing is stored in clear where there
    is a seal, and what is not sealed is then not believed."""

    def __init__(self, store: Store, most_entry_bytes: int, seal: Seal | None = None, *, wait: float = TIMEOUT) -> None:
        """`wait`: seconds that a request gives the store each time."""
        self._wait = wait
        self._store = store
        self._most_entry_bytes = most_entry_bytes
        self._seal = seal
        self._prefix = f"{store.prefix}:cache:"

    async def get(self, key: bytes, now: float) -> Entry | None:
        """See `Cache`."""
        (reply,) = await self._asked(("GET", self._name(key)))
        return self._read(key, reply)

    async def claim(self, key: bytes, token: str, now: float) -> Entry | Claim:
        """See `Cache`."""
        call = _CLAIM.call([self._name(key), self._flight(key)], [token, _LEASE_MS])
        (reply,) = await self._asked(call)
        if isinstance(reply, bytes):
            return self._read(key, reply) or "won"  # what cannot be read is made anew
        return "won" if reply else "taken"

    async def renew(self, key: bytes, token: str) -> None:
        """See `Cache`."""
        await self._asked(_RENEW.call([self._flight(key)], [token, _LEASE_MS]))

    async def release(self, key: bytes, token: str) -> None:
        """See `Cache`."""
        await self._asked(_RELEASE.call([self._flight(key)], [token]))

    async def put(self, key: bytes, entry: Entry, ttl: float, now: float, token: str = "") -> bool:
        """See `Cache`."""
        value = self._written(key, entry)
        if len(value) > self._most_entry_bytes:
            return False
        keep: Command = ("SET", self._name(key), value, "PX", max(1, int(ttl * 1000)))
        await self._asked(keep, *([_RELEASE.call([self._flight(key)], [token])] if token else ()))
        return True

    async def purge(self, chosen: Chosen) -> int:
        """See `Cache`."""
        forgotten = 0
        async for batch in self._all():
            names = [name for name, entry, _ in batch if chosen.has(entry)]
            if names:
                forgotten += sum(await self._all_asked([("UNLINK", name) for name in names]))
        return forgotten

    async def figures(self, now: float) -> Figures:
        """See `Cache`."""
        by: dict[tuple[str, str, str], tuple[int, int]] = {}
        async for batch in self._all():
            for _, entry, length in batch:
                place = entry.tenant, entry.model, entry.deployment
                entries, size = by.get(place, (0, 0))
                by[place] = entries + 1, size + length
        return Figures(sum(n for n, _ in by.values()), sum(size for _, size in by.values()), by)

    async def _all(self) -> AsyncIterator[list[tuple[bytes, Entry, int]]]:
        """All entries by name, without their bodies and with their length, some at a time."""
        try:
            batch: list[bytes] = []
            async for name in self._store.keys(f"{self._prefix}*}}"):
                batch.append(name)
                if len(batch) == _TOGETHER:
                    yield await self._heads(batch)
                    batch = []
            yield await self._heads(batch)
        except StoreUnavailable as error:
            raise CacheUnavailable(str(error)) from None

    async def _heads(self, names: Sequence[bytes]) -> list[tuple[bytes, Entry, int]]:
        commands: list[Command] = []
        for name in names:
            commands += [("GETRANGE", name, 0, _MOST_HEAD_BYTES), ("STRLEN", name)]
        replies = await self._all_asked(commands)
        found = []
        for name, start, length in zip(names, replies[::2], replies[1::2], strict=True):
            try:
                head, _ = unframed(start)
                found.append((name, entry_of(head, _NOTHING, b""), length))
            except ValueError:
                continue  # gone meanwhile, or another version's
        return found

    async def _all_asked(self, commands: Sequence[Command]) -> list[Any]:
        try:
            return [reply_of(reply) for reply in await self._store.run(*commands, within=_OPERATORS_WAIT)]
        except StoreUnavailable as error:
            raise CacheUnavailable(str(error)) from None

    async def _asked(self, *commands: Command | ScriptCall) -> list[Any]:
        try:
            return [reply_of(reply) for reply in await self._store.run(*commands, within=self._wait)]
        except StoreUnavailable as error:
            raise CacheUnavailable(str(error)) from None

    def _written(self, key: bytes, entry: Entry) -> bytes:
        seal = self._seal
        head = entry.head(seal.name if seal is not None else None)
        rest = framed(entry.rest(), entry.body)
        return framed(head, rest if seal is None else seal.sealed(rest, key + head))

    def _read(self, key: bytes, value: bytes | None) -> Entry | None:
        """The entry; None where it is another version's, sealed where there is no seal, or does not open: put there
        by somebody else."""
        if value is None:
            return None
        try:
            head, rest = unframed(value)
            if self._seal is not None:
                rest = self._seal.opened(rest, key + head)
            elif orjson.loads(head)["sealed"] is not None:
                return None
            return entry_of(head, *unframed(rest))
        except (ValueError, KeyError, TypeError):
            return None

    def _name(self, key: bytes) -> str:
        return f"{self._prefix}{{{key.hex()}}}"

    def _flight(self, key: bytes) -> str:
        return f"{self._prefix}{{{key.hex()}}}:flight"


_NOTHING = b'{"usage":[0,0,0],"dropped":[],"crc":0}'
