"""What a detector is, and how a check looks at what stands around a candidate.

Owns a `Row` of the table (a pattern and its check), and what is `Seen` of a text meanwhile. Refuses to know any kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Place = tuple[int, int]
Found = tuple[str, int, int]
Check = Callable[[bytes, int, int], Place | None]


def whole(text: bytes, start: int, end: int) -> Place | None:
    """The pattern alone is proof enough."""
    return start, end


@dataclass(frozen=True, slots=True)
class Row:
    """One shape of one kind.

    `pattern` (RE2, over folded UTF-8 text) finds candidates, and `check(text, start, end)` says where in such a one the
    thing itself stands, or None. `hint` is a pattern that fires wherever `pattern` does: words and prefixes, which an
    automaton can look for many at a time; or, where it `counts` digits, a short one: such automata have many states.
    `claims`: digits within it are no other number. `overlaps`: a rejected candidate may hide another one that begins
    within it; candidates of such a row are short.
    """

    kind: str
    pattern: str
    check: Check = whole
    hint: str | None = None
    overlaps: bool = False
    counts: bool = False
    claims: bool = False


class Seen:
    """What is known of a text while its detectors look at it: which `clues` fired (of numbers, as bits), what was
    `found`, which places are `claimed` by what may be no other number, and the work that is `left` to do. `all` asks
    for every occurrence, else the first of each kind will do, and only the `kinds` are kept."""

    __slots__ = ("all", "claimed", "clues", "found", "kinds", "left")

    def __init__(self, work: int, clues: int = 0, every: bool = False) -> None:
        self.clues = clues
        self.all = every
        self.found: list[Found] = []
        self.kinds: set[str] = set()
        self.claimed: list[Place] = []
        self.left = work

    def spend(self, work: int) -> None:
        """Raises `OutOfWorkError` where not so much is left."""
        self.left -= work
        if self.left < 0:
            raise OutOfWorkError

    def add(self, kind: str, place: Place) -> None:
        """Note what was found."""
        self.kinds.add(kind)
        if self.all:
            self.found.append((kind, *place))


class OutOfWorkError(Exception):
    """More work than a scan may take."""


def near(text: bytes, start: int, words: re.Pattern[bytes], reach: int = 40) -> bool:
    """Whether one of the words, which are in lower case, stands shortly before a candidate."""
    return words.search(text[max(0, start - reach) : start].lower()) is not None


def runs_on(text: bytes, end: int) -> bool:
    """Whether a word goes on after a place: with a Latin letter, a digit or an underscore."""
    after = text[end : end + 1]
    return after.isalnum() or after == b"_"


def glued(text: bytes, start: int, end: int) -> bool:
    """Whether a candidate is part of a longer word."""
    before = text[max(0, start - 1) : start]
    return before.isalnum() or before == b"_" or runs_on(text, end)
