"""How fast one deployment has answered of late: the time to the first token by the prompt's size, and the time of each
token after it.

Owns what streams and whole answers say about both. Times come in as arguments. Refuses to forecast: what waits now is
the backlog's.
"""

from __future__ import annotations

from gateway.estimate import size_of_prompt
from gateway.measures import DecayingHistogram, DecayingLine
from gateway.snapshot import PROMPT_SIZES

LOOKED_UP_EVERY = 0.25  # seconds between two looks at the quantiles
FORGOTTEN_BELOW = 0.1  # samples of now that what is remembered must be worth; with less nothing is known


class Latencies:
    """Of one deployment. Invariant: `first_token_p95_ms`, `by_size` and `per_token_p95_ms` are what the samples say, at
    most `LOOKED_UP_EVERY` seconds of samples behind."""

    __slots__ = (
        "_all",
        "_looked_up_at",
        "_per_token",
        "_sizes",
        "_whole",
        "by_size",
        "first_token_p95_ms",
        "per_token_p95_ms",
    )

    def __init__(self) -> None:
        self._all = DecayingHistogram()
        self._sizes = [DecayingHistogram() for _ in range(len(PROMPT_SIZES) + 1)]
        self._per_token = DecayingHistogram()
        self._whole = DecayingLine()
        self._looked_up_at = float("-inf")
        self.first_token_p95_ms: float | None = None
        self.by_size: tuple[float, ...] = ()
        self.per_token_p95_ms: float | None = None

    def first_token(self, milliseconds: float, prompt_tokens: int, now: float) -> None:
        """The first token of a prompt came so long after it was sent."""
        self._all.add(milliseconds, now)
        self._sizes[size_of_prompt(prompt_tokens)].add(milliseconds, now)
        self.look_up(now)

    def rest(self, milliseconds: float, tokens: int, now: float) -> None:
        """So many tokens after the first one took so long."""
        if tokens > 0:
            self._per_token.add(milliseconds / tokens, now)
            self.look_up(now)

    def whole(self, milliseconds: float, prompt_tokens: int, output_tokens: int, now: float) -> None:
        """An answer that came in one piece.

        Nobody saw its first token. The least-squares line through all such answers, time over output tokens, tells what
        a token takes and what is left for the first one; each of both then gets this answer's whole deviation from the
        line, so that both quantiles err to the slow side. Until the line is known, an answer of one or two tokens is
        its first token, and a longer one says nothing.
        """
        self._whole.add(output_tokens, milliseconds, now)
        line = self._whole.fit()
        if line is None:
            if output_tokens <= 2:
                self.first_token(milliseconds, prompt_tokens, now)
            return
        intercept, slope = line
        first = milliseconds - slope * (output_tokens - 1)
        if first > 0:
            self.first_token(first, prompt_tokens, now)
        self.rest(max(milliseconds - intercept - slope, 0.0), output_tokens - 1, now)

    def look_up(self, now: float) -> None:
        """Bring the quantiles up to date, unless that was done a moment ago."""
        if now - self._looked_up_at <= LOOKED_UP_EVERY:
            return
        self._looked_up_at = now
        self.first_token_p95_ms = _p95(self._all, now)
        self.per_token_p95_ms = _p95(self._per_token, now)
        self.by_size = _filled([_p95(size, now) for size in self._sizes])


def _p95(samples: DecayingHistogram, now: float) -> float | None:
    return samples.quantile(0.95) if samples.weight(now) > FORGOTTEN_BELOW else None


def _filled(sizes: list[float | None]) -> tuple[float, ...]:
    """A size without samples is as the next larger that has some, which errs to the slow side; the largest ones as the
    next smaller. Empty where none has any."""
    filled: list[float] = []
    for index in range(len(sizes)):
        nearest = [size for size in sizes[index:] if size is not None][:1]
        nearest += [size for size in reversed(sizes[:index]) if size is not None][:1]
        if not nearest:
            return ()
        filled.append(nearest[0])
    return tuple(filled)
