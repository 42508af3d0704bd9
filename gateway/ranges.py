"""What a rule compares a fact with, where that is no plain set: numbers, loads, hours, patterns of names.

Owns whether a fact is in such a range, and whether another range has all of it. Refuses to know which fact that is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from fnmatch import translate
from functools import lru_cache
from zoneinfo import ZoneInfo

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTES_A_DAY = 24 * 60

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `at_least` on, up to but without `below`; None where that side is open."""

    at_least: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        lower = None if self.at_least is None else f"at least {self.at_least:g}"
        upper = None if self.below is None else f"below {self.below:g}"
        return " and ".join(side for side in (lower, upper) if side)

    def within(self, other: Range) -> bool:
        """Whether `other` has all of these numbers."""
        return (other.at_least is None or (self.at_least is not None and self.at_least >= other.at_least)) and (
            other.below is None or (self.below is not None and self.below <= other.below)
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A share of a deployment's capacity that is in use, 0 to 1. `unknown` is whether a deployment that does not say
    counts as in the range."""

    share: Range
    unknown: bool = False

    def holds(self, busy: float | None) -> bool:
        return self.unknown if busy is None else busy in self.share

    def within(self, other: Load) -> bool:
        return self.share.within(other.share) and (other.unknown or not self.unknown)


@dataclass(frozen=True, slots=True)
class Hours:
    """Part of each of some days, by the clocks of a place: from minute `begin` of the day on, up to but without minute
    `end`; past midnight where that is not later. `days` (0 is Monday) are those on which it begins.

    Clocks that are set back show some minutes twice, and both count; those that are set forward skip some.
    """

    zone: ZoneInfo
    days: frozenset[int] = frozenset(range(7))
    begin: int = 0
    end: int = MINUTES_A_DAY

    def __contains__(self, wall: float) -> bool:
        """Whether the moment, in seconds since 1970 in UTC, is part of it."""
        local = datetime.fromtimestamp(wall, self.zone)
        minute, day = 60 * local.hour + local.minute, local.weekday()
        if self.begin < self.end:
            return self.begin <= minute < self.end and day in self.days
        return (minute >= self.begin and day in self.days) or (minute < self.end and (day - 1) % 7 in self.days)

    def __str__(self) -> str:
        days = "" if len(self.days) == 7 else f"{', '.join(WEEKDAYS[day] for day in sorted(self.days))} "
        hours = "" if (self.begin, self.end) == (0, MINUTES_A_DAY) else f"{_clock(self.begin)} to {_clock(self.end)} "
        return f"{days}{hours}in {self.zone.key}"

    def within(self, other: Hours) -> bool:
        same = (self.zone.key, self.begin, self.end) == (other.zone.key, other.begin, other.end)
        return same and self.days <= other.days


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


class Globs:
    """Patterns as in a shell: `*` any characters, `?` one, `[ab]` one of these. Upper and lower case differ."""

    __slots__ = ("_matches", "patterns", "plain")

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = frozenset(patterns)
        self.plain = _WILD.search("".join(self.patterns)) is None  # each matches itself alone
        self._matches = _matching(self.patterns)

    def __contains__(self, name: str) -> bool:
        return self._matches(name) is not None

    def within(self, other: Globs) -> bool:
        """Whether `other` is known to match all that these do: each is one of its own, or a plain name that it
        matches."""
        rest = self.patterns - other.patterns
        return not rest or all(is_plain(pattern) and pattern in other for pattern in rest)


@lru_cache(maxsize=1024)  # hundreds of rules look at the same few
def _matching(patterns: frozenset[str]) -> Callable[[str], object]:
    return re.compile("|".join(map(translate, sorted(patterns)))).match


def is_plain(pattern: str) -> bool:
    """Whether a pattern matches itself alone."""
    return _WILD.search(pattern) is None
