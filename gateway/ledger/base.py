"""What a ledger is: limits, holds on them, and the contract of `reserve`, `settle` and `release`.

Owns the meaning of the three kinds of limits, and where days and months begin. Refuses storage.

`rolling`: at most so much within any `window` seconds, as those count who receive the calls. Amounts are kept by the
half second in which they were reserved, for the window and `SLACK` more, and the oldest half second that reaches into
that counts whole: so no window of arrivals, wherever it begins, holds more, however long each call takes up to `SLACK`.
`period`: at most so much within a calendar day or month of the operator's time zone.
`slots`: at most so many at once; a slot is given back at the reservation's end, or at its lease's.

Time counts forwards only: where a clock is set back, a ledger goes on at the latest half second that it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Literal, NamedTuple, Protocol

from gateway.limits import OnDown

Kind = Literal["rolling", "period", "slots"]
Unit = Literal["requests", "attempts", "tokens", "nusd", "slots"]

PLACE_MS = 500  # of a rolling limit; shorter ones keep a burst out for less long, and a refusal looks at more of them
# Seconds that a call may take from its reservation until it arrives where it is counted too, of which no ledger knows:
# else one that arrives late shares a window with one that is reserved a window later and arrives at once. What waits
# for long before it is sent, admission.py reserves anew; what is under way for longer may fall in a later window there
# than here.
SLACK = 1.0
_PLACES_A_SECOND = 1000 // PLACE_MS
_SLACK_PLACES = int(SLACK * _PLACES_A_SECOND)
MOST = 2**53 - 1  # what a Lua number holds exactly; 9 million USD in nano-dollars
SLOT_WAIT_MS = 1_000  # nobody knows when a slot comes free
NEVER_MS = -1
UNKNOWN_PERIOD_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `most` of a unit, on one account (`key:crm tokens/min`): whose it is and what it counts.

    `window` is seconds, of `rolling`. `starts` are when periods begin, of `period`: seconds since 1970, ascending, from
    the one before now to at least the one after it (see `days`, `months`), so that the ledger's own clock may differ
    from ours. `on_down` says what counts while the store that replicas share does not answer: each replica's share of
    it, nothing at all (`closed`), or anything (`open`). `requests` are a caller's, `attempts` a deployment's.
    """

    account: str
    kind: Kind
    unit: Unit
    most: int
    window: int = 60
    starts: tuple[int, ...] = ()
    on_down: OnDown = "local_share"


class Hold(NamedTuple):
    """So much of a limit, to be reserved; of slots always 1. A tuple, because each request makes several and a frozen
    dataclass takes twice as long to make."""

    limit: Limit
    amount: int


class Spent(NamedTuple):
    """What a reservation really took: tokens of prompt and answer, nano-dollars; whether it counts as a request of its
    caller (an attempt after which another deployment is tried does not), and as an attempt on its deployment. A tuple,
    as `Hold` is."""

    tokens: int
    nusd: int
    request: bool = True
    attempt: bool = True


class Reservation(NamedTuple):
    """Holds that are all placed. `used`: how much of each limit is taken, these holds included. `placed`: the half
    second (see `place_of`) or the period's start that each is booked under. It ends once: settled, released, or at its
    lease's end (`until_ms`, milliseconds since 1970), when slots come free and all else stays booked as reserved. A
    tuple, as `Hold` is."""

    id: str
    holds: tuple[Hold, ...]
    used: tuple[int, ...]
    placed: tuple[int, ...]
    until_ms: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was reserved. `hold` is the one that waits longest, `wait_ms` how long until it fits as things are (None:
    it never can, being more than the limit), `used` how much of each limit is taken (None: nobody knows). `unchecked`:
    nobody knows that of any, because the store does not answer, and the limit says that then nothing counts."""

    hold: Hold
    wait_ms: int | None
    used: tuple[int | None, ...]
    unchecked: bool = False


class LedgerUnavailable(Exception):
    """The store did not answer in time, or refused. Nothing is known of whether it did what was asked."""


class LedgerBusy(LedgerUnavailable):
    """The store answers others, and the asker's time was over first: too many ask at once."""


class LedgerDamaged(LedgerUnavailable):
    """The store answers, but what it holds of an account is nothing that a ledger wrote, so nobody knows what is taken;
    nothing was reserved. `limit` is whose account it is; None where it is the reservation's own record."""

    def __init__(self, limit: Limit | None) -> None:
        super().__init__("what the store holds of it cannot be read")
        self.limit = limit


class Ledger(Protocol):
    """Reserves all holds of a request or none. `now`: seconds since 1970."""

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        """Place all holds for at most `lease_s` seconds. `id` is never used for another reservation. The answer comes
        `within` so many seconds, or what the store allows for. Raises ValueError where two holds are on one account, an
        amount is no amount, or a reservation of that id is open; `LedgerUnavailable`."""

    async def renew(self, reservation: Reservation, lease_s: float, now: float) -> bool:
        """Let it last at least `lease_s` seconds from now. False where it had ended before. Raises
        `LedgerUnavailable`."""

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        """End it with what was really taken, more or less than was held. False where it had ended before. Raises
        `LedgerUnavailable`."""

    async def release(self, reservation: Reservation, now: float) -> bool:
        """End it as if it had never been. False where it had ended before. Raises `LedgerUnavailable`."""


class Counting(Ledger, Protocol):
    """A ledger that a request path counts by."""

    def end(self, reservation: Reservation, spent: Spent | None, now: float) -> object:
        """Settle, or release without `spent`, and wait for nothing."""

    async def close(self) -> None:
        """Tell whoever shares it what is still to be told."""


def checked(holds: Sequence[Hold]) -> tuple[Hold, ...]:
    """The holds. Raises ValueError where they cannot be reserved together."""
    accounts: set[str] = set()
    for hold in holds:
        limit = hold.limit
        accounts.add(limit.account)
        if not 0 <= hold.amount <= MOST or not 0 < limit.most <= MOST:
            raise ValueError(f"{limit.account}: amounts are from 0 to {MOST}, limits from 1")
        if limit.kind == "slots" and hold.amount != 1:
            raise ValueError(f"{limit.account}: a request takes one slot")
    if len(accounts) != len(holds):
        raise ValueError("two holds are on one account")
    return tuple(holds)


def final(hold: Hold, spent: Spent | None) -> int:
    """What stays booked of a hold at the end; `spent` is None where the request took nothing at all."""
    unit = hold.limit.unit
    if spent is None or unit == "slots":
        return 0
    if unit == "tokens":
        return spent.tokens
    if unit == "nusd":
        return spent.nusd
    return hold.amount if (spent.request if unit == "requests" else spent.attempt) else 0


def place_of(now_ms: int) -> int:
    """The half second, counted since 1970, that a rolling limit books under."""
    return now_ms // PLACE_MS


def places_kept(window: int) -> int:
    """How many half seconds before the latest one count as well."""
    return window * _PLACES_A_SECOND + _SLACK_PLACES


def leaves_ms(place: int, window: int) -> int:
    """When a half second no longer counts, in milliseconds since 1970."""
    return (place + places_kept(window) + 1) * PLACE_MS


def days(zone: tzinfo, now: float) -> tuple[int, ...]:
    """When days begin in a time zone: yesterday, today, tomorrow and the day after. Seconds since 1970."""
    today = datetime.fromtimestamp(now, zone).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    return tuple(int((today + timedelta(days=n)).timestamp()) for n in (-1, 0, 1, 2))


def months(zone: tzinfo, now: float) -> tuple[int, ...]:
    """When months begin in a time zone: the one before, this one, and two more. Seconds since 1970."""
    first = datetime.fromtimestamp(now, zone).replace(day=1, hour=0, minute=0, second=0, microsecond=0, fold=0)
    counted = (first.year * 12 + first.month - 1 + n for n in (-1, 0, 1, 2))
    return tuple(int(first.replace(year=m // 12, month=m % 12 + 1).timestamp()) for m in counted)
