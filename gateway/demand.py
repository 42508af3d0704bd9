"""What a second of one engine is worth: learned from what requests would save there, and how much of it they ask for.

Owns the price of an engine-second, and who asks for it with how much time. Every request that could go
to the engine is an offer: so many engine-seconds of work, and so many nano-dollars saved in each of them, which is what
the next best place would cost less what this one costs. An offline schedule fills the engine with the offers that save
most in a second until it is full (a fractional knapsack); so the price of an engine-second is the saving at which those
above it fill the engine. Work that has no other place (it must stay home, or only here its latency class is met) saves
without end, and is counted first. Where all fits, the price is nothing. What the dearest offers save is told beside it:
for that a request of a class that would miss because of others has to be kept (`estimate.congestion_nusd` says how much
of both counts).

Times come in as arguments. Refuses to decide anything: the price is one more cost of a candidate.
"""

from __future__ import annotations

from math import exp2, inf, log
from typing import NamedTuple

from gateway.measures import DecayingHistogram

HALF_LIFE = 60.0
FILLED = 0.65  # the share of an engine's seconds that may be given away; the rest is for what comes in bursts
PRICED_EVERY = 0.25
LEAST_SEEN_S = 10.0  # the first offers are taken to be those of so many seconds
REMEMBERED_S = 5 * HALF_LIFE  # a priority that asked for nothing since has no room to keep
LONGEST_S = 10.0  # how long those may wait who do not say, and the most that counts of what others say

_DEAREST = 0.95  # the quantile of the savings that stands for the dearest: the highest of all may be of one odd request


class Demand:
    """Of one engine. Invariant: the prices and `rooms` are as of the last offer, at most `PRICED_EVERY` seconds of
    offers behind. `rooms` are the priorities of the offers of late, the lowest first, each with the seconds that it has
    until its first token, and whether any of it had no other place."""

    def __init__(self) -> None:
        self._offers = DecayingHistogram(HALF_LIFE)  # of those that have another place
        self._bound_s = 0.0  # engine-seconds of those that have not, as of `_bound_at`
        self._bound_at = 0.0
        self._began = inf  # the first offer
        self._priced_at = -inf
        self._rooms: dict[int, _Room] = {}
        self.price_nusd = 0.0
        self.dearest_nusd = 0.0
        self.rooms: tuple[tuple[int, float, bool], ...] = ()

    def offered(
        self, engine_s: float, saved_per_s: float, by_ms: float | None, priority: int, now: float, *, late: bool = False
    ) -> None:
        """A request that could go there: its work in engine-seconds, what it would save in each, in nano-dollars
        (infinite where it has no other place), when it wants its first token, and its priority. `late` where that will
        not be, so that it says nothing of how long the others of that priority can wait."""
        if self._began == inf:
            self._began = now
        if not (saved_per_s > 0 and 0 < engine_s < inf):
            return
        if saved_per_s < inf:
            self._offers.add(saved_per_s, now, engine_s)
        else:
            self._bound_s = self._bound(now) + engine_s
            self._bound_at = now
        if not late:
            limit_s = min(by_ms / 1000 if by_ms is not None else inf, LONGEST_S)
            known = self._rooms.get(priority)
            bound_at = now if saved_per_s == inf else known.bound_at if known is not None else -inf
            self._rooms[priority] = _Room(limit_s, now, bound_at)
        if now - self._priced_at > PRICED_EVERY:
            self._priced_at = now
            self._reckon(now)

    def _bound(self, now: float) -> float:
        return self._bound_s * exp2((self._bound_at - now) / HALF_LIFE)

    def _reckon(self, now: float) -> None:
        """The price is the saving above which the offers of late fill what is left of the engine. What was offered over
        a time decays as its seconds do, so an engine's seconds of late are worth as much as an integral of the
        decay."""
        seconds = (1 - exp2((self._began - now) / HALF_LIFE)) * HALF_LIFE / log(2)
        left = FILLED * max(seconds, LEAST_SEEN_S) - self._bound(now)
        self.price_nusd = self._offers.heaviest(left, now) or 0.0
        self.dearest_nusd = self._offers.quantile(_DEAREST) or 0.0
        self.rooms = tuple(
            [
                (priority, room.limit_s, now - room.bound_at <= REMEMBERED_S)
                for priority, room in sorted(self._rooms.items())
                if now - room.told_at <= REMEMBERED_S
            ]
        )


class _Room(NamedTuple):
    """Seconds that a priority has until its first token, when it was told, and when it last had no other place."""

    limit_s: float
    told_at: float
    bound_at: float
