"""What a second of one engine is worth: learned from what requests would save there, and how much of it they ask for.

Owns the price of an engine-second, and how long those may wait who have no other place. Every request that could go
to the engine is an offer: so many engine-seconds of work, and so many nano-dollars saved in each of them, which is what
the next best place would cost less what this one costs. An offline schedule fills the engine with the offers that save
most in a second until it is full (a fractional knapsack); so the price of an engine-second is the saving at which those
above it fill the engine. Work that has no other place (it must stay home, or only here its latency class is met) saves
without end, and is counted first. Where all fits, a second is worth what a typical offer saves; the queue
(`estimate.congestion_nusd`) says how much of that counts.

Times come in as arguments. Refuses to decide anything: the price is one more cost of a candidate.
"""

from __future__ import annotations

from math import exp2, inf, log

from gateway.measures import DecayingHistogram

HALF_LIFE = 60.0
FILLED = 0.85  # the share of an engine's seconds that may be given away; the rest is for what comes in bursts
TYPICAL = 0.5  # the share of the offered work that saves more than a second is worth while all of it fits
PRICED_EVERY = 0.25
LEAST_SEEN_S = 10.0  # the first offers are taken to be those of so many seconds
ROOM = 0.65  # the share of the time within which a first token is wanted that may be spent waiting
STRICT = 0.05  # the share of those without another place that want theirs sooner than the room allows for
LONGEST_S = 10.0  # how long those may wait who do not say

_WITHOUT_END = 1e18


class Demand:
    """Of one engine. Invariant: `price_nusd` and `room_s` are as of the last offer, at most `PRICED_EVERY` seconds of
    offers behind."""

    def __init__(self) -> None:
        self._offers = DecayingHistogram(HALF_LIFE)
        self._bound = DecayingHistogram(HALF_LIFE)
        self._highest = 0.0
        self._began: float | None = None
        self._priced_at = -inf
        self.price_nusd = 0.0
        self.room_s = ROOM * LONGEST_S

    def offered(self, engine_s: float, saved_per_s: float, by_ms: float | None, now: float) -> None:
        """A request that could go there: its work in engine-seconds, what it would save in each, in nano-dollars
        (infinite where it has no other place), and when it wants its first token."""
        if self._began is None:
            self._began = now
        if saved_per_s <= 0 or engine_s <= 0:
            return
        if saved_per_s < inf:
            self._highest = max(self._highest, saved_per_s)
        else:
            self._bound.add(min(by_ms if by_ms is not None else inf, LONGEST_S * 1000), now)
        self._offers.add(min(saved_per_s, _WITHOUT_END), now, engine_s)
        if now - self._priced_at > PRICED_EVERY:
            self._priced_at = now
            self.price_nusd = self._price(now, now - self._began)
            strict = self._bound.quantile(STRICT)
            self.room_s = ROOM * (LONGEST_S if strict is None else strict / 1000)

    def _price(self, now: float, seen_s: float) -> float:
        """The saving above which the offers of late fill the engine, or above which a typical one is, whichever is
        more. What was offered over a time decays as its seconds do, so an engine's seconds of late are worth as much as
        an integral of the decay."""
        rate = log(2) / HALF_LIFE
        seconds = (1 - exp2(-seen_s / HALF_LIFE)) / rate
        full = self._offers.heaviest(FILLED * max(seconds, LEAST_SEEN_S), now) or 0.0
        typical = self._offers.heaviest(TYPICAL * self._offers.weight(now), now) or 0.0
        return min(max(full, typical), self._highest)
