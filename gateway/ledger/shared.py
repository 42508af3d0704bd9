"""The ledger of one of several replicas: the shared one while the store answers, and what its limits say while it does
not.

Owns what happens in between: that an end which could not be told is told later, for as long as its lease lasts; that a
reservation of which nobody knows whether it was made is undone, so that nothing is booked of a request that was never
let in; and that each replica alone counts against its share (`local_share`), refuses (`closed`) or counts nothing
(`open`). Whoever waits too long while the store answers others is refused as they were, if a limit has just refused one
of them as much. The same as without the store holds for a request one of whose accounts cannot be read, because
something else wrote to it: what is damaged is never taken for room. Refuses to merge: what was counted alone is not
added to the shared sums afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from gateway.ledger.base import (
    Hold,
    LedgerBusy,
    LedgerDamaged,
    LedgerUnavailable,
    Limit,
    Refused,
    Reservation,
    Spent,
)
from gateway.ledger.memory import MemoryLedger
from gateway.ledger.redis_ledger import RECORD, RedisLedger
from gateway.store import Store

RETRY_EVERY = 1.0  # seconds
RETRY_FOR = 30.0  # by then the lease is over, and all stays booked as reserved
DOWN_WAIT_MS = 1_000  # when to ask again for what cannot be counted now
LEAST_TRY = 0.01  # seconds: an exchange takes as long on a busy network, so with less left none is begun
MOST_DAMAGED = 100  # accounts that are told of
JUST = 1.0  # seconds for which it is known what a limit has refused
MOST_JUST = 10_000  # accounts of which that is known


@dataclass(frozen=True, slots=True)
class Damage:
    """What the store holds of an account is nothing that a ledger wrote; or, `mended`, can be read again. `key` is
    where the store has it, `kind` the limit's; both are fit for an operator's eyes."""

    account: str
    kind: str
    key: str
    mended: bool = False


class _Said(NamedTuple):
    """What the shared ledger refused, to whom, and when (seconds of the event loop)."""

    told: Refused
    holds: Sequence[Hold]
    at: float


class SharedLedger:
    """Implements `Ledger`, and never raises `LedgerUnavailable` for a reservation. Invariant: a reservation ends where
    it was made."""

    def __init__(self, store: Store, shared: RedisLedger, damaged: Callable[[Damage], None] = lambda _: None) -> None:
        """`damaged` is told once when an account is found damaged, and once when it can be read again."""
        self._store = store
        self._shared = shared
        self._tell_damage = damaged
        self._damaged: dict[str, Damage] = {}
        self._own = MemoryLedger()
        self._shares: dict[tuple[Limit, int], Limit] = {}
        self._said: dict[str, _Said] = {}
        self._telling: set[asyncio.Task[bool]] = set()

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        """See `Ledger`."""
        clock = asyncio.get_running_loop().time
        until = None if within is None else clock() + within
        for again in count():
            if not self._store.state.up:
                break
            left = None if until is None else until - clock()
            # While it counts for the others, a share of our own would come on top of what they take.
            if left is not None and left < LEAST_TRY:
                known = self._just_refused(holds, clock()) or self._unchecked(holds)
                return known or await self._alone(id, holds, lease_s, now)
            asked = f"{id}+{again}" if again else id
            try:
                made = await self._shared.reserve(asked, holds, lease_s, now, left)
                if self._damaged:
                    self._mended(holds)
                if isinstance(made, Refused):
                    self._refused(made, holds, clock())
                return made
            except LedgerDamaged as damaged:
                self._found(damaged.limit)
                break
            except LedgerBusy:
                until = clock()
                self._undo(asked, holds)
            except LedgerUnavailable:
                self._undo(asked, holds)
            except asyncio.CancelledError:
                self._undo(asked, holds)
                raise
        return await self._alone(id, holds, lease_s, now)

    def _refused(self, told: Refused, holds: Sequence[Hold], at: float) -> None:
        if told.wait_ms is None:  # it asked for more than the limit, and nobody else is told of that
            return
        if len(self._said) >= MOST_JUST:
            self._said.clear()
        self._said[told.hold.limit.account] = _Said(told, holds, at)

    def _just_refused(self, holds: Sequence[Hold], at: float) -> Refused | None:
        """What was just said to another who asked for as much of the same limit, or less; None where nothing was, or
        where the wait that it told is over. Of limits of which the other asked nothing, nobody knows what is taken."""
        for hold in holds:
            said = None if hold.limit.on_down == "open" else self._said.get(hold.limit.account)
            if said is None or at - said.at > JUST or said.told.hold.limit != hold.limit:
                continue
            wait = (said.told.wait_ms or 0) - int((at - said.at) * 1000)
            if wait > 0 and said.told.hold.amount <= hold.amount <= hold.limit.most:
                known = {h.limit.account: used for h, used in zip(said.holds, said.told.used, strict=True)}
                used = tuple(known.get(h.limit.account) for h in holds)
                return Refused(hold, wait, used)
        return None

    def _unchecked(self, holds: Sequence[Hold]) -> Refused | None:
        """Where nobody knows whether there is room; None where all limits are open then."""
        strict = next((hold for hold in holds if hold.limit.on_down != "open"), None)
        return None if strict is None else Refused(strict, DOWN_WAIT_MS, (None,) * len(holds), unchecked=True)

    @property
    def damaged(self) -> Mapping[str, Damage]:
        """The accounts that could not be read when they were last asked for."""
        return self._damaged

    def _found(self, limit: Limit | None) -> None:
        """Every replica finds the same, so each counts as its limits say while the store does not answer."""
        account, kind = (RECORD, "record") if limit is None else (limit.account, limit.kind)
        if account in self._damaged or len(self._damaged) >= MOST_DAMAGED:
            return
        damage = self._damaged[account] = Damage(account, kind, self._shared.key_of(limit))
        self._tell_damage(damage)

    def _mended(self, holds: Sequence[Hold]) -> None:
        for account in (RECORD, *(hold.limit.account for hold in holds)):
            if damage := self._damaged.pop(account, None):
                self._tell_damage(replace(damage, mended=True))

    def _undo(self, id: str, holds: Sequence[Hold]) -> None:
        """Nobody knows whether that was reserved."""
        self._spawn(self._told(lambda _: self._shared.cancel(id, holds)))

    async def _alone(self, id: str, holds: Sequence[Hold], lease_s: float, now: float) -> Reservation | Refused:
        counted: list[Hold] = []
        positions: list[int] = []
        for position, hold in enumerate(holds):
            limit = hold.limit
            if limit.on_down == "closed":
                return Refused(hold, DOWN_WAIT_MS, (None,) * len(holds), unchecked=True)
            if limit.on_down == "open":
                continue
            share = self._share(limit)
            if share is None:
                return Refused(hold, DOWN_WAIT_MS, (None,) * len(holds), unchecked=True)
            counted.append(Hold(share, hold.amount))
            positions.append(position)
        made = await self._own.reserve(id, counted, lease_s, now)
        if isinstance(made, Reservation):
            return made
        used: list[int | None] = [None] * len(holds)
        for position, taken in zip(positions, made.used, strict=True):
            used[position] = taken
        hold = holds[positions[counted.index(made.hold)]]
        wait = made.wait_ms
        if wait is None and hold.amount <= hold.limit.most:
            wait = DOWN_WAIT_MS  # it fits once all count together again
        return Refused(hold, wait, tuple(used))

    def _share(self, limit: Limit) -> Limit | None:
        """This replica's part of a limit; None where that is less than one."""
        key = limit, self._store.state.replicas
        share = self._shares.get(key)
        if share is None:
            if len(self._shares) > 10_000:
                self._shares.clear()
            most = limit.most // key[1]
            if not most:
                return None
            share = self._shares[key] = replace(limit, most=most)
        return share

    async def renew(self, reservation: Reservation, lease_s: float, now: float) -> bool:
        """See `Ledger`."""
        if self._own.holds(reservation):
            return await self._own.renew(reservation, lease_s, now)
        return await self._shared.renew(reservation, lease_s, now)

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        """See `Ledger`. Where the store does not answer, it is told later, and False is returned."""
        return await self._end(reservation, spent, now)

    async def release(self, reservation: Reservation, now: float) -> bool:
        """See `Ledger`. Where the store does not answer, it is told later, and False is returned."""
        return await self._end(reservation, None, now)

    def end(self, reservation: Reservation, spent: Spent | None, now: float) -> None:
        """Settle, or release without `spent`, beside whatever comes next."""
        if self._own.holds(reservation):
            self._own.end(reservation, spent, now)
        else:
            self._spawn(self._told(lambda passed: self._shared.end(reservation, spent, now + passed)))

    async def _end(self, reservation: Reservation, spent: Spent | None, now: float) -> bool:
        if self._own.holds(reservation):
            return self._own.end(reservation, spent, now)
        try:
            return await self._shared.end(reservation, spent, now)
        except LedgerUnavailable:
            self._spawn(self._told(lambda passed: self._shared.end(reservation, spent, now + passed), RETRY_EVERY))
            return False

    async def _told(self, tell: Callable[[float], Awaitable[bool]], after: float = 0.0) -> bool:
        """An end may be told twice: the second time it has ended before. So may that there is to be none."""
        passed = after
        if after:
            await asyncio.sleep(after)
        while True:
            try:
                return await tell(passed)
            except LedgerUnavailable:
                passed += RETRY_EVERY
                if passed > RETRY_FOR:
                    return False
                await asyncio.sleep(RETRY_EVERY)

    def _spawn(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        task = asyncio.create_task(work)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def close(self, patience: float = 0.2) -> None:
        """Tell the ends that are to be told, for at most so many seconds."""
        if self._telling:
            _, late = await asyncio.wait(self._telling, timeout=patience)
            for task in late:
                task.cancel()
