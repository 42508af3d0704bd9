"""What kinds of private data and secrets a text holds, and where.

Owns the two passes over a text: one linear-time automaton over all patterns of all wanted kinds, then the checks of
those that fired, of which there are a limited number. The detectors are rows of `detectors.py` and an operator's own
patterns; both read text as `fold.py` leaves it. Refuses to repeat what was found.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import re2

from gateway.detectors import DETECTORS, Detector
from gateway.fold import CHANGES, Aligned, encode, folded
from gateway.types import UNSCANNABLE

KINDS: frozenset[str] = frozenset(detector.kind for detector in DETECTORS)

# Bytes for the automaton's states: it forgets and rebuilds them when full, which is slow, never wrong.
_MEMORY = 64 << 20
_MEMORY_OF_ONE = 1 << 20  # of one pattern of an operator's own; RE2 refuses one that needs more

# Candidates that are checked in one scan, at 10 to 40 µs each. What was not looked at may not pass, so a text with
# more of them is `unscannable`.
MOST_CANDIDATES = 20_000

_HALF = "\u00bd"
_MOST_ROUNDS = 8
# What tells that a pattern matches between characters: at either end of a word, and of a line.
_PROBES = ("", "a", "a a", "1.\na", "é ")


def placeholder(kind: str, number: int) -> str:
    """What takes the place of the `number`th thing of a kind in a masked text: `[EMAIL_1]`. No detector finds it."""
    return f"[{kind.upper()}_{number}]"


@dataclass(frozen=True, slots=True)
class Span:
    """Where something of a kind stands: characters `start` to `end` (not included) of the text as it was given."""

    kind: str
    start: int
    end: int


def pattern_problem(pattern: str) -> str | None:
    """Why an operator's pattern cannot be used, as the rest of a sentence that begins with its name; None where it
    can."""
    if pattern != encode(folded(pattern)).decode():
        return (
            "holds characters that texts are rid of before they are searched: write dashes as -, digits as 0 to 9, "
            "and letters without typographic forms or invisible characters"
        )
    options = _options()
    options.max_mem = _MEMORY_OF_ONE
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0] if error.args else ""
        return f"is refused by RE2: {said.decode(errors='replace') if isinstance(said, bytes) else said}"
    for probe in _PROBES:
        if any(found.start() == found.end() for found in compiled.finditer(probe)):
            return "matches the empty string, so it would be found in every text"
    return None


class Scanner:
    """Finds the kinds that a policy asks for: those of `KINDS`, and what matches an operator's own patterns, which are
    kinds by their names.

    Invariant: immutable once built, so that threads may share it; `scan` and `spans` are pure functions of their texts,
    take time linear in their length and raise for no string.
    """

    def __init__(self, kinds: Iterable[str], patterns: Mapping[str, str] = MappingProxyType({})) -> None:
        """`patterns` are RE2, by name. Raises `ValueError` where a kind is neither one of `KINDS` nor a pattern, where
        a pattern has the name of one of `KINDS`, and where `pattern_problem` finds something.
        """
        wanted, known = frozenset(kinds), KINDS | patterns.keys()
        if unknown := wanted - known:
            raise ValueError(f"no detector for {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        if taken := {UNSCANNABLE, *KINDS} & patterns.keys():
            raise ValueError(f"a pattern may not be called {', '.join(sorted(taken))}, as a detector is")
        for name, pattern in patterns.items():
            if problem := pattern_problem(pattern):
                raise ValueError(f'pattern "{name}" {problem}')
        self.kinds = wanted
        own = (Detector(name, pattern) for name, pattern in patterns.items())
        self._detectors = tuple(detector for detector in (*DETECTORS, *own) if detector.kind in wanted)
        options = _options()
        self._patterns = [re2.compile(detector.pattern, options) for detector in self._detectors]
        self._any = re2.Set.SearchSet(options)
        for detector in self._detectors:
            self._any.Add(detector.hint or detector.pattern)
        self._changes = self._any.Add(CHANGES)
        try:
            self._any.Compile()
            fires = self._any.Match(encode(_HALF)) is not None  # CHANGES does, unless the automaton has no room to run
        except re2.error:
            fires = False
        if not fires:
            raise ValueError("the patterns together need more memory than a scan has: make them shorter, or fewer")

    def scan(self, texts: Sequence[str]) -> frozenset[str]:
        """The kinds that occur in the texts, which are read as one, a line each: what is split over two is found.

        Where the texts could not be looked at to the end, `unscannable` is among them, and all kinds that may occur.
        """
        if not self._detectors:
            return frozenset()
        joined = "\n".join(texts)
        text = encode(joined)
        fired = self._any.Match(text)
        if not fired:  # None where nothing fires
            return frozenset()
        if self._changes in fired:
            text = encode(folded(joined))
            fired = self._any.Match(text) or ()
        found: set[str] = set()
        rows = [index for index in fired if index != self._changes]
        budget = _Budget()
        try:
            for index in rows:
                kind = self._detectors[index].kind
                if kind not in found and next(self._hits(index, text, budget), None) is not None:
                    found.add(kind)
        except Exception:  # noqa: BLE001 - whatever a check failed of, what was not looked at may be anything
            return frozenset({UNSCANNABLE, *(self._detectors[index].kind for index in rows)})
        return frozenset(found)

    def spans(self, text: str) -> tuple[Span, ...] | None:
        """Every occurrence of every kind, in order and without overlap; None where that cannot be said. Where kinds
        overlap, one span covers all of it and has one of their names.

        With a `placeholder` in the place of each, a scan finds nothing more.
        """
        spans: list[Span] = []
        try:
            for _ in range(_MOST_ROUNDS):
                masked, origin = _masked(text, spans)
                found = self._occurrences(masked)
                if not found:
                    return tuple(spans)
                spans = _united([*spans, *(Span(span.kind, *origin(span)) for span in found)])
        except Exception:  # noqa: BLE001 - what was not looked at to its end cannot be masked
            return None
        return None

    def _occurrences(self, text: str) -> list[Span]:
        """What is found at first sight, in any order."""
        aligned = Aligned.of(text)
        budget = _Budget()
        return [
            Span(self._detectors[index].kind, aligned.starts[start], aligned.ends[end - 1])
            for index in self._any.Match(aligned.text) or ()
            if index != self._changes
            for start, end in self._hits(index, aligned.text, budget)
        ]

    def _hits(self, index: int, text: bytes, budget: _Budget) -> Iterator[tuple[int, int]]:
        """Where those candidates of a detector stand that its check accepts. Raises `_OutOfBudget`."""
        detector, search = self._detectors[index], self._patterns[index].search
        position = 0
        while (match := search(text, position)) is not None:
            budget.spend()
            start, end = match.span()
            if detector.check(text, start, end):
                yield start, end
                position = end
            else:
                # A rejected match of limited length may hide one that begins within it.
                position = start + 1 if detector.overlaps else max(end, start + 1)


class _OutOfBudgetError(Exception):
    """More candidates than are checked."""


class _Budget:
    """The candidates that may still be checked."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MOST_CANDIDATES

    def spend(self) -> None:
        """Raises `_OutOfBudgetError` where none is left."""
        self._left -= 1
        if self._left < 0:
            raise _OutOfBudgetError


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False  # it would write the pattern's failure to stderr
    options.never_capture = True
    return options


def _united(spans: Iterable[Span]) -> list[Span]:
    """In order; those that overlap become one, of the kind that begins first, the longest of these."""
    united: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if united and span.start < united[-1].end:
            united[-1] = Span(united[-1].kind, united[-1].start, max(united[-1].end, span.end))
        else:
            united.append(span)
    return united


def _masked(text: str, spans: Sequence[Span]) -> tuple[str, Callable[[Span], tuple[int, int]]]:
    """The text with placeholders for the spans; and where in the original something of it stands: what touches a
    placeholder takes all that it stands for."""
    parts: list[str] = []
    places: list[int] = []  # where each part begins in the masked text: kept text and placeholders in turn
    length = position = 0
    for number, span in enumerate(spans, 1):
        for part in (text[position : span.start], placeholder(span.kind, number)):
            parts.append(part)
            places.append(length)
            length += len(part)
        position = span.end
    parts.append(text[position:])
    places.append(length)

    def kept_from(part: int) -> int:
        return spans[part // 2 - 1].end if part else 0

    def origin(found: Span) -> tuple[int, int]:
        first, last = bisect_right(places, found.start) - 1, bisect_left(places, found.end) - 1
        start = spans[first // 2].start if first % 2 else found.start - places[first] + kept_from(first)
        end = spans[last // 2].end if last % 2 else found.end - places[last] + kept_from(last)
        return start, end

    return "".join(parts), origin
