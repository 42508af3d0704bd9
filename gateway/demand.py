"""What a second of one engine is worth: learned from what requests would save there, and how much of it they ask for.

Owns the price of an engine-second, and who asks for it with how much time. Every request that could go
to the engine is an offer: so many engine-seconds of work, and so many nano-dollars saved in each of them, which is what
the next best place would cost less what this one costs. An offline schedule fills the engine with the offers that save
most in a second until it is full (a fractional knapsack); so the price of an engine-second is the saving at which those
above it fill the engine. Work that has no other place (it must stay home, or only here its latency class is met) saves
without end, and is counted first. Where all fits, the price is that of the least saving (`estimate.congestion_nusd`
says how much of it counts).

Times come in as arguments. Refuses to decide anything: the price is one more cost of a candidate.
"""

from __future__ import annotations

from math import exp2, inf, log

from gateway.measures import DecayingHistogram

HALF_LIFE = 60.0
FILLED = 0.85  # the share of an engine's seconds that may be given away; the rest is for what comes in bursts
PRICED_EVERY = 0.25
LEAST_SEEN_S = 10.0  # the first offers are taken to be those of so many seconds
REMEMBERED_S = 5 * HALF_LIFE  # a priority that asked for nothing since has no room to keep
LONGEST_S = 10.0  # how long those may wait who do not say

_WITHOUT_END = 1e18


class Demand:
    """Of one engine. Invariant: `price_nusd` and `rooms` are as of the last offer, at most `PRICED_EVERY` seconds of
    offers behind. `rooms` are the priorities of the offers of late, the lowest first, each with the seconds that it has
    until its first token."""

    def __init__(self) -> None:
        self._offers = DecayingHistogram(HALF_LIFE)
        self._highest = 0.0
        self._began: float | None = None
        self._priced_at = -inf
        self._limits: dict[int, tuple[float, float]] = {}  # by priority: seconds, and when it was last told
        self.price_nusd = 0.0
        self.rooms: tuple[tuple[int, float], ...] = ()

    def offered(self, engine_s: float, saved_per_s: float, by_ms: float | None, priority: int, now: float) -> None:
        """A request that could go there: its work in engine-seconds, what it would save in each, in nano-dollars
        (infinite where it has no other place), when it wants its first token, and its priority."""
        if self._began is None:
            self._began = now
        if not (saved_per_s > 0 and 0 < engine_s < inf):
            return
        if saved_per_s < inf:
            self._highest = max(self._highest, saved_per_s)
        self._limits[priority] = (min(by_ms / 1000 if by_ms is not None else inf, LONGEST_S), now)
        self._offers.add(min(saved_per_s, _WITHOUT_END), now, engine_s)
        if now - self._priced_at > PRICED_EVERY:
            self._priced_at = now
            self.price_nusd = self._price(now, now - self._began)
            self.rooms = tuple(
                [
                    (known, limit)
                    for known, (limit, told_at) in sorted(self._limits.items())
                    if now - told_at <= REMEMBERED_S
                ]
            )

    def _price(self, now: float, seen_s: float) -> float:
        """The saving above which the offers of late fill the engine. What was offered over a time decays as its seconds
        do, so an engine's seconds of late are worth as much as an integral of the decay."""
        rate = log(2) / HALF_LIFE
        seconds = (1 - exp2(-seen_s / HALF_LIFE)) / rate
        full = self._offers.heaviest(FILLED * max(seconds, LEAST_SEEN_S), now) or 0.0
        return min(full, self._highest)
