"""The values that were found in a request, and where they stand in any of its texts.

Owns what belongs to a value beyond what its detector saw (the rest of a word, a number without its country's code, a
secret without the word before it), and the bounds on the work for one request. Pure. Refuses what has no place for
certain: that cannot be masked.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import re2

from gateway.fold import Aligned, encode, folded
from gateway.labels import Span

# Bounds on the work for one request; above them it stays home.
MOST_SPANS = 2_000
MOST_OCCURRENCES = 50_000
MOST_OF_ONE = 2_048  # characters of one value
MOST_OF_ALL = 256 * 1024
_MEMORY = 256 << 20  # bytes that the automaton of one request's values may take

_NEVER = frozenset({"private_key"})  # a detector finds the head, and where the rest ends nobody knows
_SECRETS = frozenset({"api_key", "jwt", "password"})
_MOST_GLUED = 256  # characters that belong to what was found and are not in its span
_IN_A_SECRET = re.compile(r"[^\s\"'`<>,;)\]}]")
_BEFORE_A_PHONE = re.compile(r"[^0-9+(@]*(?=[0-9+(])")

# A number that people write in several ways: seven digits and more, with or without what separates them.
_DIGITS = (re.compile(r"[0-9](?:[ \t\r\n.\-()/]{0,3}[0-9]){6,}"), re.compile(r"[0-9](?:[ .\-/]?[0-9]){6,}"))
_GAP = rb"[ \t\r\n.\-()/]{0,3}"
_LONGEST_CALLING_CODE = 3
_WITH_CALLING_CODE = 10  # digits
# What of a span is the secret itself, apart from the words that gave it away: it may stand elsewhere without them.
_TOKEN = re.compile(r"[^\s\"'`<>,;:=()\[\]{}]*[0-9][^\s\"'`<>,;:=()\[\]{}]*")
_SHORTEST_TOKEN = 8
_ENDS_OF_WORDS = re.compile(r"[\s\"'`=:]+")
_SHORTEST_SECRET = 6


class CannotMask(Exception):
    """Something that was found cannot be replaced for certain."""


class Values:
    """What must not be seen, and where it occurs in a text: in upper or lower case, in any form that detectors read
    as the same, numbers with any separators."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        """`kinds`: by value. Raises `CannotMask` where there are too many or one is empty."""
        self.kinds = dict(kinds)
        patterns: set[bytes] = set()
        for value, kind in kinds.items():
            read = folded(value)
            patterns.add(re2.escape(encode(read)))
            for digits in _numbers(read, kind):
                patterns.add(_GAP.join(digit.encode() for digit in digits))
                self.kinds.setdefault(digits, kind)
        options = re2.Options()
        options.max_mem = _MEMORY
        options.log_errors = False  # it would write the values to stderr
        options.longest_match = True
        options.never_capture = True
        options.case_sensitive = False
        if b"" in patterns:
            raise CannotMask
        try:
            self._pattern = re2.compile(b"|".join(sorted(patterns)), options)
        except re2.error:
            raise CannotMask from None
        self._by_spelling = {_spelling(value): kind for value, kind in self.kinds.items()}

    def intervals(self, text: str) -> list[tuple[int, int, str]]:
        """Where the values occur, as (start, end, kind) in characters; those that overlap as one. Raises `CannotMask`
        where there are too many."""
        if self._pattern.search(encode(folded(text))) is None:  # where things stand takes longer to find out
            return []
        aligned = Aligned.of(text)
        found: list[tuple[int, int, str]] = []
        match = self._pattern.search(aligned.text)
        while match is not None:
            start, end = match.span()
            kind = self._kind(aligned.text[start:end].decode())
            found.append((aligned.starts[start], aligned.ends[end - 1], kind))
            if len(found) > MOST_OCCURRENCES:
                raise CannotMask
            match = self._pattern.search(aligned.text, start + 1)  # another may begin within this one and go further
        return list(_whole(text, _merged(found)))

    def _kind(self, text: str) -> str:
        return self._by_spelling.get(_spelling(text)) or next(iter(self.kinds.values()))


def values_in(texts: Sequence[str], spans: Sequence[Span] | None) -> Values:
    """What was found in the texts, read as one, a line each: so a value that is split over two of them is noticed.
    Raises `CannotMask`."""
    joined = "\n".join(texts)
    if not spans or len(spans) > MOST_SPANS:
        raise CannotMask
    starts = list(accumulate((len(text) + 1 for text in texts), initial=0))
    kinds: dict[str, str] = {}
    length = 0
    for start, end, kind in (_place(joined, starts, span) for span in spans):
        value = joined[start:end]
        length += len(value)
        if len(value) > MOST_OF_ONE or length > MOST_OF_ALL:
            raise CannotMask
        kinds.setdefault(value, kind)
        for token in _tokens(value, kind):
            kinds.setdefault(token, kind)
    return Values(kinds)


def _place(texts: str, starts: Sequence[int], span: Span) -> tuple[int, int, str]:
    """Where all of what was found stands. A detector may have seen the end of a name only, so what is glued to its span
    belongs to it. Raises `CannotMask` where it spans two texts; `starts` are where each begins, and the end."""
    start, end, kind = span.start, span.end, span.kind
    if kind in _NEVER or start >= end:
        raise CannotMask
    if kind == "phone" and (words := _BEFORE_A_PHONE.match(texts, start, end)):
        start = words.end()  # "call me at" tells a number from others, and is no part of it
    text = bisect_right(starts, start)
    first, last = max(starts[text - 1], start - _MOST_GLUED), min(starts[text] - 1, end + _MOST_GLUED)
    if end >= starts[text]:
        raise CannotMask
    if kind == "email" and '"' in texts[start:end]:  # "jane doe"@example.org
        opening = texts.rfind('"', first, start)
        start = start if opening < 0 else opening
    if _glued(texts[start], kind):
        while start > first and _glued(texts[start - 1], kind):
            start -= 1
    while end < last and (_glued(texts[end]) or (kind in _SECRETS and _IN_A_SECRET.match(texts[end]))):
        end += 1
    if end - span.end >= _MOST_GLUED or span.start - start >= _MOST_GLUED:
        raise CannotMask
    return start, end, kind


def _glued(character: str, kind: str = "") -> bool:
    """Whether a character next to another one of the kind belongs to the same word."""
    return (
        character.isalnum()
        or character == "_"
        or (kind == "email" and character in ".%+'&-")
        or (not character.isascii() and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"))
    )


def _tokens(value: str, kind: str) -> Iterator[str]:
    """What of a value gives it away without the words around it."""
    for token in _TOKEN.findall(value):
        if len(token) >= _SHORTEST_TOKEN:
            yield token
    if kind in _SECRETS:
        last = _ENDS_OF_WORDS.split(value)[-1]
        if len(last) >= _SHORTEST_SECRET:
            yield last


def _numbers(text: str, kind: str) -> Iterator[str]:
    """The digits of the numbers in what was found; two that stand together also by themselves, and a phone number also
    without its country's code."""
    for pattern in _DIGITS:
        for number in pattern.findall(text):
            digits = re.sub(r"[^0-9]", "", number)
            yield digits
            if kind == "phone" and len(digits) >= _WITH_CALLING_CODE:
                yield digits[_LONGEST_CALLING_CODE:]


def _merged(found: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Intervals in order, those that overlap as one, of the kind of the first."""
    pending: tuple[int, int, str] | None = None
    for start, end, kind in sorted(found, key=lambda interval: (interval[0], -interval[1])):
        if pending is not None and start < pending[1]:
            pending = (pending[0], max(pending[1], end), pending[2])
            continue
        if pending is not None:
            yield pending
        pending = (start, end, kind)
    if pending is not None:
        yield pending


def _whole(text: str, intervals: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """The intervals with the ASCII letters and digits that go on at either end: half a number tells too much. Those
    that come to touch become one. `intervals` are in order and apart; no character is looked at twice."""
    pending: tuple[int, int, str] | None = None
    for start, end, kind in intervals:
        if pending is not None and end <= pending[1]:
            continue
        first = pending[1] if pending is not None else 0
        while start > first and _goes_on(text, start):
            start -= 1
        while end < len(text) and _goes_on(text, end):
            end += 1
        if pending is not None and start <= first and _goes_on(text, first):
            pending = (pending[0], end, pending[2])
            continue
        if pending is not None:
            yield pending
        pending = (start, end, kind)
    if pending is not None:
        yield pending


def _goes_on(text: str, at: int) -> bool:
    """Whether an ASCII word has no end between this character and the one before."""
    pair = text[at - 1 : at + 1]
    return pair.isascii() and pair.isalnum()


def _spelling(text: str) -> str:
    """What two ways to write the same value have in common."""
    return re.sub(r"[ \t\r\n.\-()/]", "", folded(text)).casefold()
