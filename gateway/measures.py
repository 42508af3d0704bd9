"""What was measured of late, with older samples counting less: quantiles, a line, output lengths by caller.

Owns the arithmetic of forgetting. Times come in as arguments (seconds of a monotonic clock). Refuses to know what the
numbers are about.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from math import exp2, log2

HALF_LIFE = 60.0

_BUCKETS_PER_OCTAVE = 16  # a bucket is 4.4 % wide, so its middle is within 2.2 % of what was measured
_LOWEST = 0.1
_RESCALE_AFTER = 40.0  # half-lives: weights stay far from what a float cannot hold
_NEGLIGIBLE = 1e-6


class DecayingHistogram:
    """Positive numbers on a logarithmic scale, each halving in weight every half-life. Forward decay: a newer sample
    weighs more, so that adding is O(1) (Cormode et al., "Forward Decay", ICDE 2009)."""

    __slots__ = ("_half_life", "_origin", "_total", "_weights")

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._weights: dict[int, float] = {}
        self._total = 0.0
        self._origin: float | None = None

    def add(self, value: float, now: float, weight: float = 1.0) -> None:
        """Count one number, known at `now`."""
        if self._origin is None:
            self._origin = now
        half_lives = (now - self._origin) / self._half_life
        if half_lives > _RESCALE_AFTER:
            faded = exp2(-half_lives)
            self._weights = {b: w * faded for b, w in self._weights.items() if w * faded > _NEGLIGIBLE}
            self._total = sum(self._weights.values())
            self._origin, half_lives = now, 0.0
        weight *= exp2(half_lives)
        bucket = int(log2(value / _LOWEST) * _BUCKETS_PER_OCTAVE) if value > _LOWEST else 0
        self._weights[bucket] = self._weights.get(bucket, 0.0) + weight
        self._total += weight

    def quantile(self, q: float) -> float | None:
        """The number that a share `q` of the weight does not exceed; None before the first sample."""
        if not self._weights:
            return None
        reached = 0.0
        bucket = 0
        for bucket in sorted(self._weights):
            reached += self._weights[bucket]
            if reached >= q * self._total:
                break
        return _middle(bucket)

    def weight(self, now: float) -> float:
        """How many samples of this moment what is remembered is worth."""
        return 0.0 if self._origin is None else self._total * exp2((self._origin - now) / self._half_life)

    def heaviest(self, amount: float, now: float) -> float | None:
        """The number above which at most `amount` of the weight as of now lies; None where all of it is less."""
        if self._origin is None:
            return None
        left = amount * exp2((now - self._origin) / self._half_life)
        for bucket in sorted(self._weights, reverse=True):
            left -= self._weights[bucket]
            if left < 0:
                return _middle(bucket)
        return None

    def clear(self) -> None:
        """Forget everything: after an outage the past says nothing."""
        self._weights.clear()
        self._total = 0.0
        self._origin = None


def _middle(bucket: int) -> float:
    return _LOWEST * exp2((bucket + 0.5) / _BUCKETS_PER_OCTAVE)


class DecayingLine:
    """The least-squares line through points (x, y), each halving in weight every half-life."""

    __slots__ = ("_at", "_half_life", "_n", "_x", "_xx", "_xy", "_y")

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._at: float | None = None
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float, now: float) -> None:
        """One more point, known at `now`."""
        faded = 1.0 if self._at is None else exp2((self._at - now) / self._half_life)
        self._at = now
        self._n = self._n * faded + 1.0
        self._x = self._x * faded + x
        self._y = self._y * faded + y
        self._xx = self._xx * faded + x * x
        self._xy = self._xy * faded + x * y

    def fit(self) -> tuple[float, float] | None:
        """Intercept and slope, neither below 0; None while the points are few or lie too close in x to tell."""
        if self._n < _ENOUGH_POINTS:
            return None
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        if spread <= (_LEAST_SPREAD * mean_x) ** 2:
            return None
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread)
        intercept = mean_y - slope * mean_x
        return (intercept, slope) if intercept >= 0 else (0.0, self._xy / self._xx)

    def clear(self) -> None:
        """Forget everything."""
        self._at = None
        self._n = self._x = self._y = self._xx = self._xy = 0.0


_ENOUGH_POINTS = 5.0
_LEAST_SPREAD = 0.1  # standard deviation of x as a share of its mean


class OutputLengths:
    """How long answers are, by who asks for what: the length that a share `q` of those of late did not exceed, and the
    one that a share `high` did not.

    Invariant: at most `most` histories; the least recently used go.
    """

    def __init__(self, q: float, most: int = 4096, half_life: float = 600.0, high: float = 0.95) -> None:
        self._q = q
        self._high = high
        self._most = most
        self._half_life = half_life
        self._known: OrderedDict[Hashable, _Length] = OrderedDict()

    def add(self, key: Hashable, tokens: float, now: float) -> None:
        """One answer of so many tokens."""
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Length(DecayingHistogram(self._half_life))
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        known.lengths.add(max(tokens, 1.0), now)
        known.since += 1
        if known.since > _FRESH * known.samples:
            known.samples = min(known.samples + known.since, _MOST_SAMPLES)
            known.since = 0
            known.likely = known.lengths.quantile(self._q)
            if known.samples >= _ENOUGH_SAMPLES:
                known.high = known.lengths.quantile(self._high)

    def likely(self, key: Hashable) -> float | None:
        """The length in tokens; None without a history."""
        known = self._known.get(key)
        return None if known is None else known.likely

    def high(self, key: Hashable) -> float | None:
        """The length that few exceed, in tokens; None while the history is short."""
        known = self._known.get(key)
        return None if known is None else known.high

    def __len__(self) -> int:
        return len(self._known)


_FRESH = 0.02  # a quantile is looked up again when so large a share of the samples is new
_MOST_SAMPLES = 1000
_ENOUGH_SAMPLES = 20  # of which the longest is about the length that 19 of 20 do not exceed


@dataclass(slots=True)
class _Length:
    lengths: DecayingHistogram
    likely: float | None = None
    high: float | None = None
    samples: int = 0
    since: int = 0
