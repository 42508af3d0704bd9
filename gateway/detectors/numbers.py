"""Which numbers of digits alone a text holds: cards, social security, national identity and phone numbers.

Owns the order in which groups of digits are claimed: what has a check digit first, phones last. Refuses to look at texts
where the automaton saw nothing that could be one, and at runs whose groups have the sizes of nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from gateway.detectors import cards, national, phones, ssn, words
from gateway.detectors.base import Place, Seen
from gateway.detectors.digits import (
    ALIKE,
    HINT,
    LEAST,
    MOST_SIGNS,
    NO_DIGITS,
    Groups,
    Run,
    Shape,
    Window,
    apart,
    fitting,
    marked,
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
# After what is claimed, a number may begin that the automaton took for the rest of a longer one.
_ZERO_NEXT = re.compile(rb"[^0-9A-Za-z]{1,%d}0" % MOST_SIGNS)
WORK_OF_GROUP = 4
_MOST_KEPT, _LONGEST_KEPT = 4096, 48  # plans, and bytes of a run: what longer ones may be is worked out anew


class Plan:
    """What groups of a shape may be: the windows of cards, also `across` lines, social security numbers and national
    identity numbers.
    `enough`: there are digits enough for anything. `possible`: it may be any of those. `apart`: it may be several runs.
    Not changed once made, but for what is found out when it is asked for."""

    __slots__ = (
        "_national",
        "_phones",
        "_ssn",
        "across",
        "apart",
        "cards",
        "enough",
        "national",
        "possible",
        "shape",
        "size",
        "ssn",
    )

    def __init__(self, written: bytes) -> None:
        shape = self.shape = Shape(written)
        digits = shape.offsets[-1]
        self.size = len(shape.sizes)
        self.enough = digits >= LEAST
        self.apart = len(written) - digits > MOST_SIGNS and apart(written)
        self.cards: Sequence[Window] = ()
        self.across: Sequence[Window] = ()
        self.ssn: Sequence[Window] = ()
        self.national: Sequence[national.Window] = ()
        if self.enough:
            self.cards, self.ssn, self.national = cards.windows(shape), ssn.windows(shape), national.windows(shape)
            if b"\n" in written:
                self.across = cards.windows_across_lines(shape)
        self.possible = bool(self.cards or self.across or self.ssn or self.national)
        self._ssn: Sequence[Window] | None = None
        self._national: Sequence[national.Window] | None = None
        self._phones: phones.Layout | None = None

    def ssn_after_a_word(self) -> Sequence[Window]:
        if self._ssn is None:
            self._ssn = ssn.windows_after_a_word(self.shape)
        return self._ssn

    def national_after_a_word(self) -> Sequence[national.Window]:
        if self._national is None:
            self._national = national.windows_after_a_word(self.shape)
        return self._national

    def phones(self) -> phones.Layout:
        if self._phones is None:
            self._phones = phones.Layout(self.shape)
        return self._phones


class _Plans(dict[bytes, Plan]):
    """Plans by what they are made from. Kept are those of ASCII signs without letters: texts have few of them, and
    nothing of what a text says is in them."""

    def __missing__(self, written: bytes) -> Plan:
        plan = Plan(written)
        if len(written) <= _LONGEST_KEPT and written.isascii() and not written.islower():
            if len(self) >= _MOST_KEPT:
                self.clear()
            self[written] = plan
        return plan


class Numbers:
    """Finds the kinds that are wanted, of `DIGIT_KINDS`."""

    __slots__ = ("_plans", "kinds")

    def __init__(self, wanted: frozenset[str]) -> None:
        self.kinds = wanted
        self._plans = _Plans()

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
        """Note each kind and place, where there is the clue that there are runs."""
        if seen.clues != RUN or b"\n" in text or any(_ZERO_NEXT.match(text, end) for _, end in seen.claimed):
            tagged = marked(text)
            seen.claimed = _united(seen.claimed)
            self._look(text, seen, stretches(text, tagged), tagged)

    def _look(
        self, text: bytes, seen: Seen, found: Iterable[re.Match[bytes]], tagged: bool, beside: bool = False
    ) -> None:
        """`beside`: it is what is left of a run in which something was found, which the automaton saw as one."""
        plans, clues, claimed = self._plans, seen.clues, seen.claimed
        for stretch in found:
            begin, end = stretch.span()
            written = text[begin:end]
            plan = plans[written.translate(ALIKE)]
            if plan.apart and not tagged:
                self._look(text, seen, parts(text, begin, end), tagged, beside)
                continue
            if not plan.enough:
                continue
            if claimed and (taken := _touching(claimed, begin, end)):
                self._look_beside(text, seen, taken, begin, end)
                continue
            seen.spend(WORK_OF_GROUP * plan.size)
            run = Run(text, begin, end, plan.shape, written.translate(None, NO_DIGITS))
            if (plan.possible or clues & (SOCIAL_WORD | IDENTITY_WORD)) and (checked := self._checked(seen, plan, run)):
                self._look_beside(text, seen, checked, begin, end)
            elif clues & (PHONE | PHONE_WORD) or beside:
                self._phones(seen, plan, run)
            if seen.kinds and not seen.all and self.kinds <= seen.kinds:
                return

    def _look_beside(self, text: bytes, seen: Seen, taken: Sequence[Place], begin: int, end: int) -> None:
        """Look at what of a run is in none of the places, which are in order."""
        for first, last in (*taken, (end, end)):
            if first - begin >= LEAST:
                self._look(text, seen, parts(text, begin, first), True, True)
            begin = max(begin, last)

    def _checked(self, seen: Seen, plan: Plan, run: Run) -> Sequence[Place]:
        """Numbers that have a check digit, or nearly: the places that they take."""
        kinds, clues = self.kinds, seen.clues
        if (plan.cards or plan.across) and "credit_card" in kinds:
            where, found = cards.find(run, plan.cards, plan.across)
            if found:
                return _note(seen, "credit_card", where, found)
        if "us_ssn" in kinds:
            windows = plan.ssn_after_a_word() if clues & SOCIAL_WORD else plan.ssn
            if windows and (found := fitting(run, windows, ssn.issued)):
                return _note(seen, "us_ssn", run, found)
        if "national_id" in kinds:
            worded = clues & IDENTITY_WORD
            identities = plan.national_after_a_word() if worded else plan.national
            if identities and (found := national.groups(run, identities, bool(worded))):
                return _note(seen, "national_id", run, found)
        return _NONE

    def _phones(self, seen: Seen, plan: Plan, run: Run) -> None:
        if "phone" not in self.kinds or ("phone" in seen.kinds and not seen.all):
            return
        for first, last in phones.groups(run, plan.phones(), bool(seen.clues & PHONE_WORD)):
            if not seen.all:
                seen.kinds.add("phone")
                return
            seen.add("phone", phones.place(run, first, last))


_NONE: Sequence[Place] = ()


def _note(seen: Seen, kind: str, run: Run, found: Sequence[Groups]) -> list[Place]:
    """The places that are taken, in order; all of the run where what is left is too little for anything."""
    seen.kinds.add(kind)
    offsets = run.shape.offsets
    if not seen.all and offsets[-1] - sum(offsets[last + 1] - offsets[first] for first, last in found) < LEAST:
        return [(run.begin, run.end)]
    places = [run.place(first, last) for first, last in found]
    if seen.all:
        seen.found += [(kind, first, last) for first, last in places]
    return sorted(places)


def _united(places: Iterable[Place]) -> list[Place]:
    """In order; those that overlap as one."""
    united: list[Place] = []
    for first, last in sorted(places):
        if united and first < united[-1][1]:
            first, last = united[-1][0], max(last, united.pop()[1])
        united.append((first, last))
    return united


def _touching(places: Sequence[Place], begin: int, end: int) -> Sequence[Place]:
    """Of places in order and apart, those that have something in common with a run."""
    after = bisect_left(places, (end,))
    before = after
    while before and places[before - 1][1] > begin:
        before -= 1
    return places[before:after]
