"""What a second of one engine is worth: learned from what requests would save there, and how much of it they ask for.

Owns the congestion price. Every request that could go to the engine is an offer: so many engine-seconds of work, and so
many nano-dollars saved in each of them, which is what the next best place would cost less what this one costs. An
offline schedule fills the engine with the offers that save most in a second until it is full (a fractional knapsack);
so the price of an engine-second is the saving at which those above it fill the engine, and a request that saves less
goes elsewhere. Work that has no other place (it must stay home, or only here its latency class is met) saves without
end, and is counted first.

Times come in as arguments. Refuses to decide anything: the price is one more cost of a candidate.
"""

from __future__ import annotations

from math import exp2, inf, log

from gateway.measures import DecayingHistogram

HALF_LIFE = 60.0
FILLED = 0.85  # the share of an engine's seconds that may be given away; the rest is for what comes in bursts
PRICED_EVERY = 0.25
LEAST_SEEN_S = 10.0  # the first offers are taken to be those of so many seconds

_WITHOUT_END = 1e18


class Demand:
    """Of one engine. Invariant: `price_nusd` is the price of an engine-second as of the last offer, at most
    `PRICED_EVERY` seconds of offers behind; 0 while all of the work offered fits."""

    def __init__(self) -> None:
        self._offers = DecayingHistogram(HALF_LIFE)
        self._highest = 0.0
        self._began: float | None = None
        self._priced_at = -inf
        self.price_nusd = 0.0

    def offered(self, engine_s: float, saved_per_s: float, now: float) -> None:
        """A request that could go there: its work in engine-seconds, and what it would save in each, in nano-dollars;
        infinite where it has no other place."""
        if self._began is None:
            self._began = now
        if saved_per_s <= 0 or engine_s <= 0:
            return
        if saved_per_s < inf:
            self._highest = max(self._highest, saved_per_s)
        self._offers.add(min(saved_per_s, _WITHOUT_END), now, engine_s)
        if now - self._priced_at > PRICED_EVERY:
            self._priced_at = now
            self.price_nusd = self._price(now, now - self._began)

    def _price(self, now: float, seen_s: float) -> float:
        """The saving above which the offers of late fill the engine. What was offered over a time decays as its
        seconds do, so an engine's seconds of late are worth as much as an integral of the decay."""
        rate = log(2) / HALF_LIFE
        seconds = (1 - exp2(-seen_s / HALF_LIFE)) / rate
        price = self._offers.heaviest(FILLED * max(seconds, LEAST_SEEN_S), now)
        return 0.0 if price is None else min(price, self._highest)
