"""Which numbers of digits alone a text holds: cards, social security, national identity and phone numbers.

Owns the order in which groups of digits are claimed: what has a check digit first, phones last. Refuses to look at texts
where the automaton saw nothing that could be one, and at runs whose groups have the sizes of nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import NamedTuple, TypeVar

from gateway.detectors import cards, national, phones, ssn, words
from gateway.detectors.base import Place, Seen
from gateway.detectors.digits import (
    HINT,
    LEAST,
    LINE_END,
    MOST_SIGNS,
    Groups,
    Run,
    Window,
    fitting,
    groups,
    parts,
    stretches,
)

DIGIT_KINDS = frozenset(("credit_card", "us_ssn", "national_id", "phone"))
# Clues that an automaton gives, each a bit: a run of digits; groups that by their sizes may be a number with a check
# digit, and such that may be a phone number; and words, each for the kind whose numbers need it.
RUN, LIKELY, PHONE, PHONE_WORD, SOCIAL_WORD, IDENTITY_WORD, FIRST_FREE_CLUE = (1 << bit for bit in range(7))
_WORDS = {
    "phone": (f"(?i){words.PHONE.pattern}", PHONE_WORD),
    "us_ssn": (f"(?i){words.SSN.pattern}", SOCIAL_WORD),
    "national_id": (f"(?i){national.ANY.pattern}", IDENTITY_WORD),
}
_CHECKED = {"credit_card": cards.HINT, "us_ssn": ssn.HINT, "national_id": national.HINT}
WORK_OF_GROUP = 4
T = TypeVar("T")
_MOST_PLANNED = 12  # groups; what longer runs may be is worked out anew


class Plan(NamedTuple):
    """What groups of some sizes may be: the windows of cards, social security numbers and national identity numbers.
    `enough`: there are digits enough for anything."""

    enough: bool
    cards: Sequence[Window]
    ssn: Sequence[Window]
    national: Sequence[national.Window]


def _planned(sizes: tuple[int, ...]) -> Plan:
    return Plan(sum(sizes) >= LEAST, cards.windows(sizes), ssn.windows(sizes), national.windows(sizes))


def _kept(windows: Callable[[tuple[int, ...]], T]) -> Callable[[tuple[int, ...]], T]:
    """The same, which is kept for runs that are not long: texts have few sizes of groups."""
    kept = lru_cache(maxsize=4096)(windows)
    return lambda sizes: kept(sizes) if len(sizes) <= _MOST_PLANNED else windows(sizes)


_plan = _kept(_planned)
_ssn_after_a_word = _kept(ssn.windows_after_a_word)
_national_after_a_word = _kept(national.windows_after_a_word)


class Numbers:
    """Finds the kinds that are wanted, of `DIGIT_KINDS`."""

    __slots__ = ("kinds",)

    def __init__(self, wanted: frozenset[str]) -> None:
        self.kinds = wanted

    @property
    def words(self) -> list[tuple[str, int]]:
        """RE2 patterns of words, each with its clue."""
        return [hint for kind, hint in _WORDS.items() if kind in self.kinds]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """RE2 patterns of digits, each with its clue."""
        hints = [(HINT, RUN)]
        if likely := [hint for kind, hint in _CHECKED.items() if kind in self.kinds]:
            hints.append(("|".join(likely), LIKELY))
        if "phone" in self.kinds:
            hints.append((phones.HINT, PHONE))
        return hints

    def find(self, text: bytes, seen: Seen) -> None:
        """Note each kind and place."""
        clues, lines = seen.clues, LINE_END in text
        if clues & RUN and (lines or clues != RUN):
            self._find(text, seen, stretches(text), lines)

    def _find(self, text: bytes, seen: Seen, found: Iterable[re.Match[bytes]], lines: bool) -> None:
        clues, claimed = seen.clues, seen.claimed
        for stretch in found:
            digits = groups(stretch[0])
            sizes = tuple(map(len, digits))
            begin, end = stretch.span()
            if end - begin - sum(sizes) > MOST_SIGNS and (several := parts(text, begin, end)):
                self._find(text, seen, several, lines)
                continue
            plan = _plan(sizes)
            if not plan.enough or (claimed and _within(claimed, begin, end)):
                continue
            seen.spend(WORK_OF_GROUP * len(sizes))
            run = Run(text, begin, end, digits, sizes)
            taken = _claimed(run, claimed) if claimed else _NONE
            if not taken:
                taken = self._checked(seen, plan, run, lines and text.find(b"\n", begin, end) > 0)
            if (clues & (PHONE | PHONE_WORD) or taken) and len(taken) < len(sizes):
                self._phones(seen, run, taken)
            if seen.kinds and not seen.all and self.kinds <= seen.kinds:
                return

    def _checked(self, seen: Seen, plan: Plan, run: Run, broken: bool) -> AbstractSet[int]:
        """Numbers that have a check digit, or nearly; the groups that they take. `broken`: there are line breaks."""
        kinds, clues = self.kinds, seen.clues
        if (plan.cards or broken) and "credit_card" in kinds:
            where, found = cards.find(run, plan.cards, broken)
            if found:
                _note(seen, "credit_card", where, found)
                return set(range(len(run.sizes)))
        if "us_ssn" in kinds:
            windows = _ssn_after_a_word(run.sizes) if clues & SOCIAL_WORD else plan.ssn
            if windows and (found := fitting(run, windows, ssn.issued)):
                return _note(seen, "us_ssn", run, found)
        if "national_id" in kinds:
            worded = clues & IDENTITY_WORD
            identities = _national_after_a_word(run.sizes) if worded else plan.national
            if identities and (found := national.groups(run, identities, bool(worded))):
                return _note(seen, "national_id", run, found)
        return _NONE

    def _phones(self, seen: Seen, run: Run, taken: AbstractSet[int]) -> None:
        if "phone" not in self.kinds or ("phone" in seen.kinds and not seen.all):
            return
        for first, last in phones.groups(run, bool(seen.clues & PHONE_WORD), taken):
            seen.add("phone", phones.place(run, first, last) if seen.all else (run.begin, run.end))


_NONE: AbstractSet[int] = frozenset()


def _note(seen: Seen, kind: str, run: Run, found: Iterable[Groups]) -> AbstractSet[int]:
    """The groups that are taken."""
    seen.kinds.add(kind)
    if seen.all:
        seen.found += [(kind, *run.place(first, last)) for first, last in found]
    return {group for first, last in found for group in range(first, last + 1)}


def _within(places: Iterable[Place], begin: int, end: int) -> bool:
    for first, last in places:  # noqa: SIM110 - a generator costs more than the comparisons
        if first <= begin and end <= last:
            return True
    return False


def _claimed(run: Run, places: Iterable[Place]) -> set[int]:
    """The groups that belong to something else."""
    claimed = set()
    for group in range(len(run.sizes)):
        start, end = run.place(group, group)
        if any(first < end and start < last for first, last in places):
            claimed.add(group)
    return claimed
