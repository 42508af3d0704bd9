"""RE2: which of many patterns occur in a text, in one pass whose time is linear in its length; and where one does.

Owns its options and the memory that it may use. Refuses patterns that it has no room for: an automaton without room to
run would find nothing, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import re2

from gateway.fold import encode, legible

# Bytes for the states of one automaton: it forgets and rebuilds them when full, which is slow, never wrong.
_MEMORY = 64 << 20
_MEMORY_OF_ONE = 1 << 20  # of one pattern of an operator's own; RE2 refuses one that needs more
# What tells that a pattern matches between characters: at either end of a word, and of a line.
_PROBES = ("", "a", "a a", "1.\na", "é ")
_PROBE = "\x00\x01\x00"  # whatever else fires there, something does if the automaton runs

T = TypeVar("T")
Search = Callable[[bytes, int, int], list[tuple[int, int]]]


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False  # it would write the pattern's failure to stderr
    options.never_capture = True
    return options


class Automaton(Generic[T]):
    """Patterns, each with something that stands for it. Immutable once built, so that threads may share it."""

    def __init__(self, patterns: Sequence[tuple[str, T]]) -> None:
        """`patterns`: at least one. Raises `ValueError` where together they need more memory than there is."""
        searched = re2.Set.SearchSet(_options())
        # One more, to see whether it runs at all; what it stands for fires in one text of all that there are too often.
        patterns = [*patterns, (_PROBE, patterns[0][1])]
        for pattern, _ in patterns:
            searched.Add(pattern)
        self.meanings = [meaning for _, meaning in patterns]
        # Of a text, the numbers of the patterns that occur in it, in any order: what `Match` of the wrapper calls.
        self.match: Callable[[bytes], list[int]] = searched._set.Match
        try:
            searched.Compile()
            runs = bool(self.match(_PROBE.encode()))
        except re2.error:
            runs = False
        if not runs:
            raise ValueError("the patterns together need more memory than a scan has: make them shorter, or fewer")

    def fired(self, text: bytes) -> list[T]:
        """What stands for the patterns that occur in the text."""
        return [self.meanings[number] for number in self.match(text)]


def searcher(pattern: str) -> Search:
    """A function of a text, a place and the text's length: a list that begins with the bounds of the first match from
    that place on, both -1 where there is none."""
    # What `search` of the wrapper calls: its generator and its match object cost twice what the search does.
    return partial(re2.compile(pattern, _options())._regexp.Match, re2._Anchor.UNANCHORED)


def occurs(pattern: str) -> Callable[[bytes], bool]:
    """A function of a text: whether the pattern matches anywhere in it."""
    search = searcher(pattern)
    return lambda text: search(text, 0, len(text))[0][0] >= 0


def pattern_problem(pattern: str) -> str | None:
    """Why an operator's pattern cannot be used, as the rest of a sentence that begins with its name; None where it
    can."""
    if pattern != encode(legible(pattern)).decode():
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
