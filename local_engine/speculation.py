"""Owns whether, for whom and how far the next tokens are guessed; refuses to guess them, tensors and clocks.

A guess is computed along with the token before it, and accepted if it is what the request's own choice at its place
would have been: the answer is the same as without guesses, sampled or greedy. So all that guessing can change is speed,
and that is measured here: tokens a second with guesses and without, for few and for many sequences apart, and how many
of each sequence's guesses are right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from local_engine.sequence import Sequence

FIRST_SIZE = 4
"""Guesses for a sequence of which nothing is known."""

MISSES = 3
"""Steps in a row without one right guess, after which a sequence is not guessed for."""

SHORTEST_PAUSE, LONGEST_PAUSE = 8, 128
"""Steps until it is tried again; twice as many each time that it fails."""

REMEMBERED = 32
"""Steps of each kind that a comparison looks at."""

PROBE_STEPS = 6
SHORTEST_INTERVAL, LONGEST_INTERVAL = 24, 1536
"""The kind of step that seems worse is tried for some steps again after so many of the other; rarer while it stays so.
At the longest interval a kind that is three times slower costs 0.8 %."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Up to `size` guesses are wanted of what follows these tokens of a sequence."""

    id: str
    tokens: SequenceOf[int]
    size: int


class Drafter(Protocol):
    """Guesses tokens."""

    def guess(self, asks: SequenceOf[Ask]) -> list[tuple[int, ...]]:
        """What may follow, for each of them; nothing where nothing is known. Called on the engine's thread."""


@dataclass(slots=True)
class _Trust:
    """How far one sequence is guessed for."""

    size: int
    misses: int = 0
    pause: int = 0
    next_pause: int = SHORTEST_PAUSE

    def learn(self, guessed: int, accepted: int, most: int) -> None:
        if accepted == guessed:
            self.size = min(most, 2 * self.size)
        elif 2 * accepted < guessed:
            self.size = max(1, self.size // 2)
        self.misses = 0 if accepted else self.misses + 1
        if accepted:
            self.next_pause = SHORTEST_PAUSE
        elif self.misses >= MISSES:
            self.misses, self.pause = 0, self.next_pause
            self.next_pause = min(LONGEST_PAUSE, 2 * self.next_pause)


@dataclass(slots=True)
class _Steps:
    """The last steps of one kind."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    tokens: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def rate(self) -> float | None:
        """Tokens a second, as the mean of tokens over that of seconds without the longest of them, so that no single
        delay decides."""
        if not self.seconds:
            return None
        usual = sorted(self.seconds)[: max(1, len(self.seconds) - 1 - len(self.seconds) // 10)]
        return sum(self.tokens) / len(self.tokens) / max(1e-9, sum(usual) / len(usual))


class _Comparison:
    """Steps with guesses and without them, at similar numbers of sequences: which are faster, and which come next."""

    def __init__(self, first: bool) -> None:
        self._steps = {True: _Steps(), False: _Steps()}
        self._faster = first
        self._interval = SHORTEST_INTERVAL
        self._until_probe = PROBE_STEPS
        self._probing = 0

    @property
    def guesses(self) -> bool:
        """Whether the next step has guesses."""
        return self._faster if not self._probing else not self._faster

    def record(self, guessed: bool, seconds: float, tokens: int) -> None:
        if guessed != self.guesses:
            return
        # The first guesses after a while cost more: what has come since is new to the drafter.
        if not self._probing or self._probing < PROBE_STEPS:
            self._steps[guessed].seconds.append(seconds)
            self._steps[guessed].tokens.append(tokens)
        if self._probing:
            self._probing -= 1
            if not self._probing:
                self._judge()
        elif self._until_probe:
            self._until_probe -= 1
        else:
            self._probing = PROBE_STEPS
            self._steps[not guessed] = _Steps()  # what was long ago may not hold any more

    def _judge(self) -> None:
        with_guesses, without = self._steps[True].rate, self._steps[False].rate
        if with_guesses is not None and without is not None and (with_guesses > without) != self._faster:
            self._faster, self._interval = not self._faster, SHORTEST_INTERVAL
        else:
            self._interval = min(LONGEST_INTERVAL, 2 * self._interval)
        self._until_probe = self._interval


class Speculation:
    """Plans guesses and learns from how they did. Invariant: no guess for more sequences than `max_sequences`."""

    def __init__(self, drafter: Drafter, *, most: int, max_sequences: int) -> None:
        """`most`: guesses for a sequence in a step."""
        self._drafter = drafter
        self._most = most
        self._max_sequences = max_sequences
        self._trust: dict[str, _Trust] = {}
        self._comparisons: dict[int, _Comparison] = {}
        self._asked = False
        self._failed = False
        self._recent = deque[tuple[int, int]](maxlen=256)

    @property
    def acceptance(self) -> float | None:
        """The share of the last guesses that was right; None before any was computed."""
        guessed = sum(each for each, _ in self._recent)
        return sum(accepted for _, accepted in self._recent) / guessed if guessed else None

    def guesses(self, decoding: SequenceOf[Sequence]) -> dict[str, tuple[int, ...]]:
        """By id, what may come next in these sequences, which are all that decode. Raises what the drafter raises."""
        self._asked = not self._failed and 0 < len(decoding) <= self._max_sequences and self._pays(len(decoding))
        if not self._asked:
            return {}
        self._trust = {each.id: self._trust.get(each.id) or _Trust(min(FIRST_SIZE, self._most)) for each in decoding}
        asks = []
        for sequence in decoding:
            trust, left = self._trust[sequence.id], sequence.max_tokens - sequence.generated - 1
            if trust.pause:
                trust.pause -= 1
            elif left > 0:
                asks.append(Ask(sequence.id, sequence.tokens, min(trust.size, left)))
        made = self._drafter.guess(asks) if asks else []
        return {ask.id: guesses for ask, guesses in zip(asks, made, strict=True) if guesses}

    def fail(self) -> None:
        """The drafter has failed: no more guesses."""
        self._failed = True

    def learn(self, id: str, guessed: int, accepted: int) -> None:
        """So many of a sequence's guesses were right."""
        self._recent.append((guessed, accepted))
        if trust := self._trust.get(id):
            trust.learn(guessed, accepted, self._most)

    def record(self, sequences: int, seconds: float, tokens: int) -> None:
        """A step that only decoded: how long it took, guessing included, and how many tokens it gave."""
        if 0 < sequences <= self._max_sequences and not self._failed:
            self._comparison(sequences).record(self._asked, seconds, tokens)

    def _pays(self, sequences: int) -> bool:
        return self._comparison(sequences).guesses

    def _comparison(self, sequences: int) -> _Comparison:
        size = sequences.bit_length()
        if size not in self._comparisons:
            # Few sequences leave a device idle, many do not: begin with what is likely.
            self._comparisons[size] = _Comparison(first=sequences < FEW)
        return self._comparisons[size]


FEW = 8
"""Sequences below which guesses are tried first."""
