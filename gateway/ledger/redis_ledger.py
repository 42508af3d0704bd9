"""The ledger that replicas share, in Redis or whatever speaks its protocol: Lua scripts, each whole.

Owns the keys' names: all have one hash tag, so that the scripts are whole on a cluster as well. They consist of ids of
reservations and names of accounts: nothing of a request and nothing of a key. That of a rolling limit names the length
of its places as well, so that none is read by a version to which they are of another length. Refuses to wait: the store
says how long, and nothing is tried again, because nobody knows whether it was done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from gateway.ledger.base import (
    NEVER_MS,
    PLACE_MS,
    Hold,
    LedgerBusy,
    LedgerDamaged,
    LedgerUnavailable,
    Limit,
    Refused,
    Reservation,
    Spent,
    checked,
    final,
    places_kept,
)
from gateway.store import Script, ScriptCall, Store, StoreBusy, StoreRefused, StoreUnavailable, reply_of

KEPT_FROM = 90.0  # seconds; a server that was stopped meanwhile does what it was asked before
DAMAGED = -2
RECORD = "open:"  # what is before a reservation's id in its key
_LENGTH = f"/{PLACE_MS}ms"
_HERE = Path(__file__).parent


class RedisLedger:
    """Implements `Ledger` for all who use the same store and prefix."""

    def __init__(self, store: Store, time: Literal["server", "given"] = "server") -> None:
        """`time`: whose clock counts. The server's, so that replicas agree; `given` is for tests."""
        self._store = store
        self._tag = f"{store.prefix}:{{ledger}}"
        self._given = time == "given"
        numbers = f"local PLACE_MS = {PLACE_MS}\n" + (_HERE / "numbers.lua").read_text()
        self._reserve, self._finish, self._cancel, self._renew = (
            Script(numbers + (_HERE / f"{name}.lua").read_text()) for name in ("reserve", "finish", "cancel", "renew")
        )
        self._ending: set[asyncio.Task[bool]] = set()

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        """See `Ledger`. What is reserved after the asker has gone is released."""
        call = self.reserving(id, holds, lease_s, now)

        def abandoned(replies: list[Any]) -> None:
            made = None
            with suppress(ValueError, LedgerUnavailable, StoreUnavailable):  # it was cancelled, or never made
                made = self.reserved(id, holds, replies[0])
            if isinstance(made, Reservation):
                task = asyncio.create_task(self._given_back(made, now))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

        try:
            (reply,) = await self._store.run(call, within=within, abandoned=abandoned)
            return self.reserved(id, holds, reply)
        except StoreBusy as error:
            raise LedgerBusy(str(error)) from None
        except StoreRefused:
            raise LedgerDamaged(None) from None
        except StoreUnavailable as error:
            raise LedgerUnavailable(str(error)) from None

    def reserving(self, id: str, holds: Sequence[Hold], lease_s: float, now: float) -> ScriptCall:
        """The command that reserves, for an exchange with others."""
        arguments: list[str | int] = [self._now(now), id, int(lease_s * 1000)]
        for hold in checked(holds):
            limit = hold.limit
            extra = ",".join(map(str, limit.starts)) if limit.kind == "period" else places_kept(limit.window)
            arguments += [limit.kind, hold.amount, limit.most, extra]
        return self._reserve.call(self._keys(id, holds), arguments)

    def reserved(self, id: str, holds: Sequence[Hold], reply: Any) -> Reservation | Refused:
        """What the reply to that command means. Raises as `reserve` does, and `StoreUnavailable`."""
        outcome, *told = reply_of(reply)
        if outcome == DAMAGED:
            raise LedgerDamaged(holds[told[0] - 2].limit if told[0] > 1 else None)
        if outcome < 0:
            raise ValueError("a reservation of that id is open")
        if not outcome:
            position, wait, *used = told
            return Refused(holds[position - 1], None if wait == NEVER_MS else wait, tuple(used))
        until_ms, *placed = told
        return Reservation(id, tuple(holds), tuple(placed[::2]), tuple(placed[1::2]), until_ms)

    async def cancel(self, id: str, holds: Sequence[Hold]) -> bool:
        """Undo a reservation of which nobody knows whether it was made, and keep it from being made later, for
        `KEPT_FROM` seconds. False where it had not been made. Raises `LedgerUnavailable`."""
        arguments: list[str | int] = [id, int(KEPT_FROM * 1000)]
        for hold in holds:
            arguments += [hold.limit.kind, hold.amount]
        return await self._ended(self._cancel.call(self._keys(id, holds), arguments))

    async def renew(self, reservation: Reservation, lease_s: float, now: float) -> bool:
        """See `Ledger`."""
        slots = [hold for hold in reservation.holds if hold.limit.kind == "slots"]
        arguments = [self._now(now), reservation.id, int(lease_s * 1000)]
        return await self._ended(self._renew.call(self._keys(reservation.id, slots), arguments))

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        """See `Ledger`."""
        return await self.end(reservation, spent, now)

    async def release(self, reservation: Reservation, now: float) -> bool:
        """See `Ledger`."""
        return await self.end(reservation, None, now)

    async def end(self, reservation: Reservation, spent: Spent | None, now: float) -> bool:
        """Settle, or release without `spent`. To be told again where nobody knows whether it was done."""
        arguments: list[str | int] = [self._now(now), reservation.id]
        for hold, placed in zip(reservation.holds, reservation.placed, strict=True):
            arguments += [hold.limit.kind, placed, final(hold, spent) - hold.amount]
        return await self._ended(self._finish.call(self._keys(reservation.id, reservation.holds), arguments))

    async def _ended(self, call: ScriptCall) -> bool:
        try:
            (reply,) = await self._store.run(call)
            return bool(reply_of(reply))
        except StoreUnavailable as error:
            raise LedgerUnavailable(str(error)) from None

    async def _given_back(self, reservation: Reservation, now: float) -> bool:
        try:
            return await self.release(reservation, now)
        except LedgerUnavailable:
            return False  # its lease ends it

    def key_of(self, limit: Limit | None, id: str = "") -> str:
        """Where the store has its account; without a limit, the record of the reservation of that id."""
        if limit is None:
            return f"{self._tag}:{RECORD}{id}"
        return f"{self._tag}:{limit.account}{_LENGTH if limit.kind == 'rolling' else ''}"

    def _keys(self, id: str, holds: Sequence[Hold]) -> list[str]:
        return [self.key_of(None, id), *(self.key_of(hold.limit) for hold in holds)]

    def _now(self, now: float) -> int | str:
        return int(now * 1000) if self._given else ""
