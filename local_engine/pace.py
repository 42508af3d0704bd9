"""Owns how fast this engine has been lately: step times and rates; refuses clocks (seconds are passed in)."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from statistics import StatisticsError, linear_regression

REMEMBERED_STEPS = 64
REMEMBERED_ENDS = 64

STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Seconds; upper bounds of the buckets that steps are counted in. A small model on a GPU takes 5 to 30 ms a step."""


class StepTimes:
    """How many steps took how long since the start: `counts` by bucket, the last without a bound, and `total`
    seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(STEP_BUCKETS) + 1)
        self.total = 0.0

    def record(self, seconds: float) -> None:
        """One finished step."""
        self.counts[bisect_left(STEP_BUCKETS, seconds)] += 1
        self.total += seconds

    def copy(self) -> StepTimes:
        """As it is now."""
        copied = StepTimes()
        copied.counts, copied.total = list(self.counts), self.total
        return copied


@dataclass(frozen=True, slots=True)
class _Step:
    seconds: float
    prefill_tokens: int
    decode_tokens: int


class Pace:
    """The last steps, those that prefill and those that only decode apart, so that neither pushes the other out.

    Invariant: every rate is positive, or None where nothing was measured.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._prefill: deque[_Step] = deque(maxlen=REMEMBERED_STEPS)
        self._decode: deque[_Step] = deque(maxlen=REMEMBERED_STEPS)
        self._held: deque[int] = deque(maxlen=REMEMBERED_ENDS)

    def record(self, *, seconds: float, prefill_tokens: int, decode_tokens: int) -> None:
        """One finished step."""
        self.steps += 1
        steps = self._prefill if prefill_tokens else self._decode
        steps.append(_Step(seconds, prefill_tokens, decode_tokens))

    def ended(self, started: int) -> None:
        """A sequence that started when `steps` was so much has given its place back."""
        self._held.append(self.steps - started)

    @property
    def held_steps(self) -> float | None:
        """How long the last sequences that ended had their place, in steps: their mean."""
        return sum(self._held) / len(self._held) if self._held else None

    @property
    def step_seconds(self) -> float | None:
        """Mean time of a remembered step that only decoded, else of any."""
        steps = self._decode or self._prefill
        return sum(step.seconds for step in steps) / len(steps) if steps else None

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens a second over all sequences, in the remembered steps that only decoded."""
        return sum(step.decode_tokens for step in self._decode) / _seconds(self._decode) if self._decode else None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second.

        A step costs a fixed part and a part for each token. The ratio of tokens to seconds would make an engine that
        has only seen short prompts look far too slow for long ones, so this is the inverse slope of the least-squares
        line through (prefill tokens, seconds) of all remembered steps; the ratio where they determine no such line.
        """
        if not self._prefill:
            return None
        ratio = sum(step.prefill_tokens for step in self._prefill) / _seconds(self._prefill)
        steps = [*self._prefill, *self._decode]
        try:
            slope = linear_regression([s.prefill_tokens for s in steps], [s.seconds for s in steps]).slope
        except StatisticsError:
            return ratio
        # Noise can tilt the line to nothing or below; the ratio is a bound, since it charges the fixed part too.
        return max(ratio, 1 / slope) if slope > 0 else ratio


def _seconds(steps: deque[_Step]) -> float:
    return max(1e-9, sum(step.seconds for step in steps))
