"""Usage records in a Redis stream, which all replicas append to.

Owns the key, adding and reading back. An entry that nobody knows the fate of is added again, so a reader takes entries
of one id as one. Refuses to trim beyond `most`: Redis is where records wait to be collected, not where they stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.store import Store, reply_of
from gateway.usage.entry import Entry, entry_from_json

MOST_TOGETHER = 100  # entries of one exchange
FIELD = "r"
PAGE = 500


class UsageStream:
    """The stream `<prefix>:usage`, of about `most` entries at most (0: without an end)."""

    def __init__(self, store: Store, most: int) -> None:
        self._store = store
        self._key = f"{store.prefix}:usage"
        self._bound = ("MAXLEN", "~", most) if most else ()

    async def add(self, lines: Sequence[bytes]) -> None:
        """Append entries. Raises StoreUnavailable, after which each may be there or not."""
        for start in range(0, len(lines), MOST_TOGETHER):
            part = lines[start : start + MOST_TOGETHER]
            for reply in await self._store.run(*(("XADD", self._key, *self._bound, "*", FIELD, line) for line in part)):
                reply_of(reply)

    async def entries(self) -> list[Entry]:
        """All of them, oldest first; a line that is none is left out. Raises StoreUnavailable."""
        found: list[Entry] = []
        start = "-"
        while True:
            (reply,) = await self._store.run(("XRANGE", self._key, start, "+", "COUNT", PAGE))
            page = reply_of(reply) or []
            for _, fields in page:
                try:
                    found.append(entry_from_json(fields.get(FIELD.encode(), b"")))
                except ValueError:
                    continue
            if len(page) < PAGE:
                return found
            start = "(" + page[-1][0].decode()
