"""Which numbers of digits alone a text holds: cards, social security, national identity and phone numbers.

Owns the order in which groups of digits are claimed: what has a check digit first, phones last. Refuses to look at texts
where the automaton saw no run of digits, and at runs whose groups have the sizes of nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from gateway.detectors import cards, national, phones, ssn
from gateway.detectors.base import Place, Seen
from gateway.detectors.digits import HINT, Run, runs
from gateway.detectors.words import PHONE, SSN

DIGIT_KINDS = frozenset(("credit_card", "us_ssn", "national_id", "phone"))
# What the automaton looks for: runs of digits, and words without which some numbers are not looked at.
RUNS = HINT
CLUES: Mapping[str, str] = {
    "us_ssn": f"(?i){SSN.pattern}",
    "national_id": f"(?i){national.ANY.pattern}",
    "phone": f"(?i){PHONE.pattern}",
}
WORK_OF_GROUP = 4
_MOST_PLANNED = 12  # groups; longer runs are looked at for everything


@lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, ...]) -> frozenset[str]:
    """What groups of these sizes may be: kinds, and with `?` those that a word must stand before."""
    windows = [sizes[first:last] for first in range(len(sizes)) for last in range(first + 1, len(sizes) + 1)]
    return frozenset(
        kind
        for kind, possible in (
            ("credit_card", cards.possible),
            ("us_ssn", ssn.possible),
            ("us_ssn?", ssn.possible_after_a_word),
            ("national_id", national.possible),
            ("national_id?", national.possible_after_a_word),
            ("phone", phones.possible),
        )
        if any(map(possible, windows))
    )


_EVERYTHING = frozenset((*DIGIT_KINDS, "us_ssn?", "national_id?"))


class Numbers:
    """Finds the kinds that are wanted, of `DIGIT_KINDS`."""

    __slots__ = ("kinds",)

    def __init__(self, wanted: frozenset[str]) -> None:
        self.kinds = wanted

    def find(self, text: bytes, seen: Seen) -> None:
        """Note each kind and place."""
        wanted, clues = self.kinds, seen.clues
        named, several_lines = "phone" in clues, b"\n" in text
        for (begin, end), pieces in runs(text):
            if seen.claimed and any(first <= begin and end <= last for first, last in seen.claimed):
                continue
            digits = pieces[1::2]
            sizes = tuple(map(len, digits))
            seen.spend(WORK_OF_GROUP * len(sizes))
            anything = len(sizes) > _MOST_PLANNED or (several_lines and _broken(pieces))
            plan = _EVERYTHING if anything else _plan(sizes)
            phone = "phone" in wanted
            if not plan and not (phone and (named or phones.begun(text, digits))):
                continue
            run = Run(text, begin, pieces, digits, sizes)
            taken = _claimed(run, seen.claimed) if seen.claimed else set()
            if plan and not taken:
                self._checked(seen, plan, run, taken)
            if phone and len(taken) < len(sizes) and (named or "phone" in plan or phones.begun(text, digits)):
                for place in phones.places(run, named, taken):
                    seen.add("phone", place)
            if not seen.all and wanted <= seen.kinds:
                return

    def _checked(self, seen: Seen, plan: frozenset[str], run: Run, taken: set[int]) -> None:
        """Numbers that have a check digit, or nearly."""
        wanted, clues = self.kinds, seen.clues
        if "credit_card" in plan and "credit_card" in wanted and (places := cards.places(run)):
            taken.update(range(len(run.sizes)))
            for place in places:
                seen.add("credit_card", place)
            return
        for kind, module in _AFTER_CARDS:
            worded = kind in clues
            if kind in wanted and not taken and (kind in plan or (worded and f"{kind}?" in plan)):
                _take(seen, kind, run, module.groups(run, worded), taken)


_AFTER_CARDS = (("us_ssn", ssn), ("national_id", national))


def _broken(pieces: list[bytes]) -> bool:
    """Whether line breaks stand between groups."""
    return b"\n" in b"".join(pieces[2:-1:2])


def _take(seen: Seen, kind: str, run: Run, found: list[tuple[int, int]], taken: set[int]) -> None:
    for first, last in found:
        taken.update(range(first, last + 1))
        seen.add(kind, run.place(first, last))


def _claimed(run: Run, places: list[Place]) -> set[int]:
    """The groups that belong to something else."""
    claimed = set()
    for group in range(len(run.sizes)):
        start, end = run.place(group, group)
        if any(first < end and start < last for first, last in places):
            claimed.add(group)
    return claimed
