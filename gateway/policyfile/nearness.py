"""Which of the known words a wrong one may stand for.

Owns how near is near enough, which is `difflib`'s measure, and how much of that is looked at: a file may be wrong in
thousands of places, and comparing a word with hundreds takes milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import lru_cache

MOST_SUGGESTIONS = 100  # for one entry or list; of those that are as wrong, nobody reads more

Suggest = Callable[[str, Iterable[str]], str]

_CUTOFF = 0.6
_BUCKETS = 96  # of characters
_MOST = 8  # of one bucket that a mask tells apart
_FULL = (1 << _BUCKETS * _MOST) - 1


class NotAmong(ValueError):
    """A value that is none of the known words. `known` is asked only where a suggestion is made."""

    def __init__(self, message: str, known: Callable[[], Iterable[str]]) -> None:
        super().__init__(message)
        self.known = known


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean "..."?)` where one of the known words is near, and nothing otherwise."""
    near = nearest(word, known)
    return f' (did you mean "{near}"?)' if near is not None else ""


def no_suggestion(_word: str, _known: Iterable[str]) -> str:
    return ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The nearest of the known words, if one is near at all."""
    return next(iter(get_close_matches(word, plausible(word, known), n=1, cutoff=_CUTOFF)), None)


def plausible(word: str, known: Iterable[str]) -> list[str]:
    """Those that have enough characters in common with the word to be near, in whatever order: `difflib` takes none but
    these, and a hundred times as long to say so."""
    letters, length = _letters(word), len(word)
    return [
        other
        for other in known
        if 2.0 * (letters & _known_letters(other)).bit_count() >= _CUTOFF * (length + len(other))
    ]


def _letters(word: str) -> int:
    """How often each character occurs, as that many bits for each: what two words share are the bits of both."""
    counts = Counter([ord(character) % _BUCKETS for character in word])
    if max(counts.values(), default=0) > _MOST:
        return _FULL  # more than can be told: near to all
    mask = 0
    for bucket, count in counts.items():
        mask |= ((1 << count) - 1) << bucket * _MOST
    return mask


_known_letters = lru_cache(maxsize=8192)(_letters)  # the same few are compared with many
