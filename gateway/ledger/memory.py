"""The ledger of one process. No awaiting inside, so that each call is whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gateway.ledger.base import (
    MOST,
    NEVER_MS,
    SLOT_WAIT_MS,
    UNKNOWN_PERIOD_MS,
    Hold,
    Kind,
    Limit,
    Refused,
    Reservation,
    Spent,
    checked,
    final,
    leaves_ms,
    place_of,
    places_kept,
)

_SWEEP_ABOVE = 1_024  # open reservations


class _Account(Protocol):
    """What one account holds. `at` changes nothing that `add` depends on."""

    def at(self, limit: Limit, now_ms: int) -> tuple[int, int]:
        """How much is taken, and where more would be booked: a half second, a period's start."""

    def wait_ms(self, limit: Limit, amount: int, place: int, now_ms: int) -> int:
        """How long until so much fits, if nothing else comes."""

    def add(self, id: str, place: int, amount: int, until_ms: int) -> None:
        """Book it."""

    def change(self, id: str, place: int, difference: int) -> None:
        """Change what was booked, if that still counts."""


class _Rolling:
    """Amounts by the half second, oldest first. Invariant: `total` is their sum. `seen`: the latest half second, once
    anything has been booked."""

    __slots__ = ("by_place", "seen", "total")

    def __init__(self) -> None:
        self.by_place: deque[list[int]] = deque()
        self.seen: int | None = None
        self.total = 0

    def at(self, limit: Limit, now_ms: int) -> tuple[int, int]:
        place = place_of(now_ms)
        if self.seen is not None:
            if place > self.seen:
                self.seen = place
            place = self.seen
            kept, first = self.by_place, place - places_kept(limit.window)
            while kept and kept[0][0] < first:
                self.total -= kept.popleft()[1]
        return self.total, place

    def wait_ms(self, limit: Limit, amount: int, place: int, now_ms: int) -> int:
        excess = self.total + amount - limit.most
        for booked, taken in self.by_place:
            excess -= taken
            if excess <= 0:
                return leaves_ms(booked, limit.window) - now_ms
        return 0  # not reached: with all gone, what is no more than the limit fits

    def add(self, id: str, place: int, amount: int, until_ms: int) -> None:
        self.seen = place
        if self.by_place and self.by_place[-1][0] == place:
            self.by_place[-1][1] += amount
        else:
            self.by_place.append([place, amount])
        self.total += amount

    def change(self, id: str, place: int, difference: int) -> None:
        for entry in reversed(self.by_place):
            if entry[0] <= place:
                if entry[0] == place:
                    entry[1] += difference
                    self.total += difference
                return


class _Period:
    """The sum of one calendar period, the latest."""

    __slots__ = ("start", "total")

    def __init__(self) -> None:
        self.start: int | None = None
        self.total = 0

    def at(self, limit: Limit, now_ms: int) -> tuple[int, int]:
        start, second = limit.starts[0], now_ms // 1000
        for begins in limit.starts:
            if begins <= second:
                start = begins
        return (0, start) if self.start is None or self.start < start else (self.total, self.start)

    def wait_ms(self, limit: Limit, amount: int, place: int, now_ms: int) -> int:
        return next((begins * 1000 - now_ms for begins in limit.starts if begins > place), UNKNOWN_PERIOD_MS)

    def add(self, id: str, place: int, amount: int, until_ms: int) -> None:
        if place != self.start:
            self.start, self.total = place, 0
        self.total += amount

    def change(self, id: str, place: int, difference: int) -> None:
        if place == self.start:
            self.total += difference


class _Slots:
    """Who is in, and until when at most. Invariant: no lease ends before `soonest_ms`."""

    __slots__ = ("soonest_ms", "until_ms")

    def __init__(self) -> None:
        self.until_ms: dict[str, int] = {}
        self.soonest_ms = 0

    def at(self, limit: Limit, now_ms: int) -> tuple[int, int]:
        if self.soonest_ms <= now_ms and self.until_ms:
            self.until_ms = {id: until for id, until in self.until_ms.items() if until > now_ms}
            self.soonest_ms = min(self.until_ms.values(), default=0)
        return len(self.until_ms), 0

    def wait_ms(self, limit: Limit, amount: int, place: int, now_ms: int) -> int:
        return SLOT_WAIT_MS

    def add(self, id: str, place: int, amount: int, until_ms: int) -> None:
        self.soonest_ms = min(self.soonest_ms, until_ms) if self.until_ms else until_ms
        self.until_ms[id] = until_ms

    def change(self, id: str, place: int, difference: int) -> None:
        self.until_ms.pop(id, None)

    def renew(self, id: str, until_ms: int) -> None:
        """Let it stay in for longer."""
        if id in self.until_ms:
            self.until_ms[id] = until_ms


_KINDS: Mapping[Kind, Callable[[], _Account]] = {"rolling": _Rolling, "period": _Period, "slots": _Slots}


class MemoryLedger:
    """Implements `Ledger` for one process."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._open: dict[str, int] = {}  # the lease's end by id
        self._sweep_at = _SWEEP_ABOVE

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        """See `Ledger`."""
        now_ms = int(now * 1000)
        if self._open.get(id, now_ms) > now_ms:
            raise ValueError("a reservation of that id is open")
        accounts, places, after = [], [], []
        worst: tuple[Hold, int] | None = None
        known = self._accounts
        for hold in holds:
            limit, amount = hold
            if not 0 <= amount <= MOST or (amount != 1 and limit.kind == "slots"):
                checked(holds)
            account = known.get(limit.account) or self._new(limit)
            taken, place = account.at(limit, now_ms)
            taken += amount
            accounts.append(account)
            places.append(place)
            after.append(taken)
            if taken > limit.most and (worst is None or worst[1] != NEVER_MS):
                never = amount > limit.most
                wait = NEVER_MS if never else account.wait_ms(limit, amount, place, now_ms)
                if worst is None or never or wait > worst[1]:
                    worst = (hold, wait)
        if len({*accounts}) != len(holds):
            checked(holds)
        if worst is not None:
            used = tuple(taken - hold.amount for taken, hold in zip(after, holds, strict=True))
            return Refused(worst[0], None if worst[1] == NEVER_MS else worst[1], used)
        until_ms = now_ms + int(lease_s * 1000)
        for account, place, hold in zip(accounts, places, holds, strict=True):
            account.add(id, place, hold[1], until_ms)
        if len(self._open) >= self._sweep_at:
            self._sweep(now_ms)
        self._open[id] = until_ms
        return Reservation(id, tuple(holds), tuple(after), tuple(places), until_ms)

    async def renew(self, reservation: Reservation, lease_s: float, now: float) -> bool:
        """See `Ledger`."""
        now_ms = int(now * 1000)
        until_ms = self._open.get(reservation.id, now_ms)
        if until_ms <= now_ms:
            return False
        self._open[reservation.id] = ends = max(until_ms, now_ms + int(lease_s * 1000))
        for hold in reservation.holds:
            account = self._accounts[hold.limit.account]
            if isinstance(account, _Slots):
                account.renew(reservation.id, ends)
        return True

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        """See `Ledger`."""
        return self.end(reservation, spent, now)

    async def release(self, reservation: Reservation, now: float) -> bool:
        """See `Ledger`."""
        return self.end(reservation, None, now)

    def holds(self, reservation: Reservation) -> bool:
        """Whether it was made here and has not ended."""
        return reservation.id in self._open

    def end(self, reservation: Reservation, spent: Spent | None, now: float) -> bool:
        """Settle, or release without `spent`; nothing is waited for."""
        until_ms = self._open.pop(reservation.id, None)
        if until_ms is None or until_ms <= int(now * 1000):
            return False
        for hold, placed in zip(reservation.holds, reservation.placed, strict=True):
            difference = final(hold, spent) - hold.amount
            if difference:
                self._accounts[hold.limit.account].change(reservation.id, placed, difference)
        return True

    async def close(self) -> None:
        """There is nobody to be told."""

    def _new(self, limit: Limit) -> _Account:
        account = self._accounts[limit.account] = _KINDS[limit.kind]()
        return account

    def _sweep(self, now_ms: int) -> None:
        """Forget those of which nobody told the end."""
        self._open = {known: until for known, until in self._open.items() if until > now_ms}
        self._sweep_at = max(_SWEEP_ABOVE, 2 * len(self._open))
