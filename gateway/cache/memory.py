"""The cache of one process. No awaiting inside, so that each call is whole."""

from __future__ import annotations

from collections import OrderedDict

from gateway.cache.base import Chosen, Claim, Figures
from gateway.cache.entry import Entry


class MemoryCache:
    """Implements `Cache`. Invariant: at most `most_entries` entries of together at most `most_bytes` bytes; what was
    used least recently goes first."""

    def __init__(self, most_entries: int, most_bytes: int, most_entry_bytes: int) -> None:
        self._most_entries = most_entries
        self._most_bytes = most_bytes
        self._most_entry_bytes = min(most_entry_bytes, most_bytes)
        self._kept: OrderedDict[bytes, tuple[Entry, float]] = OrderedDict()
        self._bytes = 0

    @property
    def entries(self) -> int:
        """Those whose time is over among them, until they are looked for or make room."""
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes that they take."""
        return self._bytes

    async def get(self, key: bytes, now: float) -> Entry | None:
        """See `Cache`."""
        return self.at_once(key, now)

    def at_once(self, key: bytes, now: float) -> Entry | None:
        """The entry, without a coroutine."""
        found = self._kept.get(key)
        if found is None:
            return None
        entry, until = found
        if now >= until:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return entry

    async def claim(self, key: bytes, token: str, now: float) -> Entry | Claim:
        """See `Cache`. Within a process a flight is the claim, so that each one is won."""
        return self.at_once(key, now) or "won"

    async def renew(self, key: bytes, token: str) -> None:
        """See `Cache`."""

    async def release(self, key: bytes, token: str) -> None:
        """See `Cache`."""

    async def put(self, key: bytes, entry: Entry, ttl: float, now: float, token: str = "") -> bool:
        """See `Cache`."""
        if entry.size > self._most_entry_bytes or self._most_entries < 1:
            return False
        if key in self._kept:
            self._drop(key)
        self._kept[key] = (entry, now + ttl)
        self._bytes += entry.size
        while len(self._kept) > self._most_entries or self._bytes > self._most_bytes:
            _, (oldest, _) = self._kept.popitem(last=False)
            self._bytes -= oldest.size
        return True

    async def purge(self, chosen: Chosen) -> int:
        """See `Cache`."""
        found = [key for key, (entry, _) in self._kept.items() if chosen.has(entry)]
        for key in found:
            self._drop(key)
        return len(found)

    async def figures(self, now: float) -> Figures:
        """See `Cache`."""
        by: dict[tuple[str, str, str], tuple[int, int]] = {}
        for entry, until in self._kept.values():
            if now < until:
                place = entry.tenant, entry.model, entry.deployment
                entries, size = by.get(place, (0, 0))
                by[place] = entries + 1, size + entry.size
        return Figures(sum(n for n, _ in by.values()), sum(size for _, size in by.values()), by)

    def _drop(self, key: bytes) -> None:
        entry, _ = self._kept.pop(key)
        self._bytes -= entry.size
