"""The ledger that replicas share, in Redis or whatever speaks its protocol: two Lua scripts, each whole.

Owns the keys' names: all have one hash tag, so that the scripts are whole on a cluster as well. Refuses to wait: a call
takes at most its connection's timeouts, and nothing is tried again, because nobody knows whether it was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway.ledger.base import (
    NEVER_MS,
    Hold,
    LedgerUnavailable,
    Refused,
    Reservation,
    Spent,
    checked,
    final,
)

TIMEOUT = 0.05  # seconds, to connect and to be answered; redis-py's own defaults wait and try again for 12 s
_HERE = Path(__file__).parent


def connect(url: str, timeout: float = TIMEOUT) -> Redis:
    """A client that neither waits longer than `timeout` seconds for anything nor tries anything again."""
    return Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0), protocol=2
    )


class RedisLedger:
    """Implements `Ledger` for all who use the same store and prefix."""

    def __init__(self, client: Redis, prefix: str = "hybridgate", time: Literal["server", "given"] = "server") -> None:
        """`time`: whose clock counts. The server's, so that replicas agree; `given` is for tests."""
        self._client = client
        self._prefix = prefix
        self._given = time == "given"
        self._reserve = client.register_script((_HERE / "reserve.lua").read_text())
        self._finish = client.register_script((_HERE / "finish.lua").read_text())

    async def reserve(self, id: str, holds: Sequence[Hold], lease_s: float, now: float) -> Reservation | Refused:
        """See `Ledger`."""
        holds = checked(holds)
        arguments: list[str | int] = [self._now(now), id, int(lease_s * 1000)]
        for hold in holds:
            limit = hold.limit
            extra = ",".join(map(str, limit.starts)) if limit.kind == "period" else limit.window
            arguments += [limit.kind, hold.amount, limit.most, extra]
        try:
            outcome, *told = await self._reserve(self._keys(id, holds), arguments)
        except (RedisError, OSError) as error:
            raise LedgerUnavailable(type(error).__name__) from error
        if outcome < 0:
            raise ValueError("a reservation of that id is open")
        if not outcome:
            position, wait, *used = told
            return Refused(holds[position - 1], None if wait == NEVER_MS else wait, tuple(used))
        until_ms, *placed = told
        return Reservation(id, holds, tuple(placed[::2]), tuple(placed[1::2]), until_ms)

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        """See `Ledger`."""
        return await self._end(reservation, spent, now)

    async def release(self, reservation: Reservation, now: float) -> bool:
        """See `Ledger`."""
        return await self._end(reservation, None, now)

    async def _end(self, reservation: Reservation, spent: Spent | None, now: float) -> bool:
        arguments: list[str | int] = [self._now(now), reservation.id, reservation.until_ms]
        for hold, placed in zip(reservation.holds, reservation.placed, strict=True):
            arguments += [hold.limit.kind, placed, final(hold, spent) - hold.amount]
        try:
            return bool(await self._finish(self._keys(reservation.id, reservation.holds), arguments))
        except (RedisError, OSError) as error:
            raise LedgerUnavailable(type(error).__name__) from error

    def _keys(self, id: str, holds: Sequence[Hold]) -> list[str]:
        tag = f"{self._prefix}:{{ledger}}"
        return [f"{tag}:open:{id}", *(f"{tag}:{hold.limit.account}" for hold in holds)]

    def _now(self, now: float) -> int | str:
        return int(now * 1000) if self._given else ""
