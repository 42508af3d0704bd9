"""How fast a simulated engine says it is: what local_engine/pace.py makes of its last steps, in constant time a step.

Owns the running sums. Refuses to know the true numbers: a policy sees what it would see of a real engine, late and
blurred as that is.
"""

from __future__ import annotations

from collections import deque

REMEMBERED_STEPS = 64
REMEMBERED_ENDS = 64


class _Steps:
    """Sums over the last steps of one kind."""

    __slots__ = ("_last", "decode", "n", "seconds", "x", "xx", "xy")

    def __init__(self) -> None:
        self._last: deque[tuple[float, int, int]] = deque()
        self.n = self.x = self.xx = self.decode = 0
        self.seconds = self.xy = 0.0

    def add(self, seconds: float, prompt_tokens: int, decoded: int) -> None:
        self._last.append((seconds, prompt_tokens, decoded))
        self._count(seconds, prompt_tokens, decoded, 1)
        if len(self._last) > REMEMBERED_STEPS:
            self._count(*self._last.popleft(), -1)

    def _count(self, seconds: float, prompt_tokens: int, decoded: int, sign: int) -> None:
        self.n += sign
        self.seconds += sign * seconds
        self.x += sign * prompt_tokens
        self.xx += sign * prompt_tokens * prompt_tokens
        self.xy += sign * prompt_tokens * seconds
        self.decode += sign * decoded


class Pace:
    """The last steps, those with prompt tokens and those without apart. Rates are None where nothing was measured."""

    def __init__(self) -> None:
        self.steps = 0
        self._prefill = _Steps()
        self._decode = _Steps()
        self._held: deque[int] = deque(maxlen=REMEMBERED_ENDS)

    def record(self, seconds: float, prompt_tokens: int, decoded: int) -> None:
        """One finished step."""
        self.steps += 1
        (self._prefill if prompt_tokens else self._decode).add(seconds, prompt_tokens, decoded)

    def ended(self, started: int) -> None:
        """A sequence that started when `steps` was so much has given its place back."""
        self._held.append(self.steps - started)

    @property
    def held_steps(self) -> float | None:
        """How long the last sequences that ended had their place, in steps: their mean."""
        return sum(self._held) / len(self._held) if self._held else None

    @property
    def step_s(self) -> float | None:
        """Mean time of a remembered step that only decoded, else of any."""
        steps = self._decode if self._decode.n else self._prefill
        return steps.seconds / steps.n if steps.n else None

    @property
    def decode_rate(self) -> float | None:
        """Output tokens a second of all sequences together, in steps that only decoded."""
        return self._decode.decode / max(1e-9, self._decode.seconds) if self._decode.n else None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second: the inverse slope of the line through (prompt tokens, seconds) of all remembered
        steps, at least their ratio."""
        prefill, decode = self._prefill, self._decode
        if not prefill.n:
            return None
        ratio = prefill.x / max(1e-9, prefill.seconds)
        n, seconds = prefill.n + decode.n, prefill.seconds + decode.seconds
        spread = n * prefill.xx - prefill.x * prefill.x
        if n < 2 or spread <= 0:
            return ratio
        slope = (n * prefill.xy - prefill.x * seconds) / spread
        return max(ratio, 1 / slope) if slope > 0 else ratio
