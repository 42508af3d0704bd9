"""What kinds of private data and secrets a text holds, and where.

Owns the two passes over a text: automata over the hints of all wanted kinds, in linear time, then the detectors whose
hints fired, as far as the work that a scan may take goes. The detectors are those of `detectors`, and an operator's own
patterns; all read text as `fold.py` leaves it. Refuses to repeat what was found.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gateway.automaton import Automaton, Search, pattern_problem, searcher
from gateway.detectors import DIGIT_KINDS, FIRST_FREE_CLUE, KINDS, ROWS, RUN, Numbers, Row
from gateway.detectors.base import Seen
from gateway.fold import CHANGES, Aligned, encode, folded
from gateway.types import UNSCANNABLE

__all__ = ["KINDS", "Scanner", "Span", "pattern_problem", "placeholder"]

# The work of one scan, in units of a few microseconds. What was not looked at may not pass, so a text that needs more
# is `unscannable`.
MOST_WORK = 200_000
WORK_OF_CANDIDATE = 16  # of a row; a group of digits is `WORK_OF_GROUP`
_MOST_ROUNDS = 8

_NOTHING: frozenset[str] = frozenset()
_FOLD = FIRST_FREE_CLUE  # the clue that a text has to be folded


@dataclass(frozen=True, slots=True)
class Span:
    """Where something of a kind stands: characters `start` to `end` (not included) of the text as it was given."""

    kind: str
    start: int
    end: int


def placeholder(kind: str, number: int) -> str:
    """What takes the place of the `number`th thing of a kind in a masked text: `[EMAIL_1]`. No detector finds it."""
    return f"[{kind.upper()}_{number}]"


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
        rows = [row for row in ROWS if row.kind in wanted]
        words = [_hint(row) for row in rows if not row.counts]
        counts = [_hint(row) for row in rows if row.counts]
        self._numbers = Numbers(wanted & DIGIT_KINDS)
        if self._numbers.kinds:
            words += [(pattern, (clue, None)) for pattern, clue in self._numbers.words]
            counts += [(pattern, (clue, None)) for pattern, clue in self._numbers.counts]
        own = [_hint(Row(name, pattern)) for name, pattern in patterns.items() if name in wanted]
        # Words, what counts, and what nobody knows each have an automaton of their own: together they would have as
        # many states as there are combinations of theirs.
        finders = (finder for _, (_, finder) in (*words, *counts, *own) if finder is not None)
        self._order = {finder: number for number, finder in enumerate(finders)}
        automata = [Automaton(hints) for hints in ([*words, (CHANGES, (_FOLD, None))], counts, own) if hints]
        self._automata = [(automaton.match, automaton.meanings) for automaton in automata]

    def scan(self, texts: Sequence[str]) -> frozenset[str]:
        """The kinds that occur in the texts, which are read as one, a line each: what is split over two is found.

        Where the texts could not be looked at to the end, `unscannable` is among them, and all kinds that may occur.
        """
        joined = "\n".join(texts)
        text = encode(joined)
        clues, finders = self._hints(text, _FOLD)
        if clues & _FOLD:
            text = encode(folded(joined))
            clues, finders = self._hints(text, 0)
        if not finders and not clues & RUN:
            return _NOTHING
        seen = Seen(MOST_WORK, clues)
        try:
            for finder in finders:
                finder.find(text, seen)
            if clues & RUN:
                self._numbers.find(text, seen)
        except Exception:  # noqa: BLE001 - whatever a check failed of, what was not looked at may be anything
            kinds = {one.kind for one in finders}
            return frozenset({UNSCANNABLE, *kinds, *(self._numbers.kinds if clues & RUN else ())})
        return frozenset(seen.kinds) if seen.kinds else _NOTHING

    def _hints(self, text: bytes, last: int) -> tuple[int, list[_RowFinder]]:
        """The clues, and the detectors whose hints fired: not all of them where there is the clue `last`."""
        clues = 0
        finders: list[_RowFinder] = []
        for match, meanings in self._automata:
            for number in match(text):
                clue, finder = meanings[number]
                clues |= clue
                if finder is not None:
                    finders.append(finder)
            if clues & last:
                break
        return clues, finders

    def spans(self, text: str) -> tuple[Span, ...] | None:
        """Every occurrence of every kind, in order and without overlap; None where that cannot be said. Where kinds
        overlap, one span covers all of it and has one of their names.

        With a `placeholder` in the place of each, a scan finds nothing more.
        """
        spans: list[Span] = []
        left = 2 * MOST_WORK  # once more, at the least, to see that nothing is left
        try:
            for _ in range(_MOST_ROUNDS):
                masked, origin = _masked(text, spans)
                found, left = self._occurrences(masked, left)
                if not found:
                    return tuple(spans)
                spans = _united([*spans, *(Span(span.kind, *origin(span)) for span in found)])
        except Exception:  # noqa: BLE001 - what was not looked at to its end cannot be masked
            return None
        return None

    def _occurrences(self, text: str, work: int) -> tuple[list[Span], int]:
        """What is found at first sight, in any order, and the work that is left. Raises `OutOfWorkError`."""
        aligned = Aligned.of(text)
        clues, finders = self._hints(aligned.text, 0)
        seen = Seen(work, clues, every=True)
        # In a fixed order, so that what several kinds claim is always called by the same one; numbers of digits alone
        # after what may claim these.
        for finder in sorted(finders, key=self._order.__getitem__):
            finder.find(aligned.text, seen)
        if clues & RUN:
            self._numbers.find(aligned.text, seen)
        return [Span(kind, aligned.starts[start], aligned.ends[end - 1]) for kind, start, end in seen.found], seen.left


class _RowFinder:
    """A row of the table at work."""

    __slots__ = ("_check", "_claims", "_overlaps", "_search", "kind")

    def __init__(self, row: Row) -> None:
        self.kind = row.kind
        self._check = row.check
        self._claims = row.claims
        self._overlaps = row.overlaps
        self._search: Search = searcher(row.pattern)

    def find(self, text: bytes, seen: Seen) -> None:
        """Note the candidates that the row's check accepts."""
        to_the_end = seen.all or self._claims
        if self.kind in seen.kinds and not to_the_end:
            return
        position, length = 0, len(text)
        while True:
            start, end = self._search(text, position, length)[0]
            if start < 0:
                return
            seen.spend(WORK_OF_CANDIDATE)
            place = self._check(text, start, end)
            if place is None:
                # A rejected match of limited length may hide one that begins within it.
                position = start + 1 if self._overlaps else max(end, start + 1)
                continue
            if not to_the_end:
                seen.kinds.add(self.kind)
                return
            seen.add(self.kind, place)
            if self._claims:
                seen.claimed.append(place)
            position = max(place[1], end)


# A pattern; a clue or none, and what looks closer or nothing.
_Hint = tuple[str, tuple[int, _RowFinder | None]]


def _hint(row: Row) -> _Hint:
    return row.hint or row.pattern, (0, _RowFinder(row))


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
