"""Which rules may match a request: looked up by its facts, so that of hundreds of rules few are asked.

Owns the tables, one for each fact that some rule wants to be one of a set. Refuses to say that a rule does match: what
is on the list is still asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from gateway.conditions import Match
from gateway.types import RequestFacts

# By the key of a condition, the fact that it looks at: one word or None, and a set of words.
_ONE: Mapping[str, str] = {"tenant": "tenant", "slo": "slo"}
_SEVERAL: Mapping[str, str] = {"tag": "tags", "key_tag": "key_tags", "any_label": "labels"}


class _Table(NamedTuple):
    """The rules that each word of a fact allows, a bit each; `others` are those that do not look at the fact."""

    fact: Callable[[RequestFacts], object]
    allowed: Mapping[object, int]
    others: int


class Shortlist:
    """The positions of the rules that may match. Invariant: a rule that matches is among them."""

    __slots__ = ("_all", "_one", "_several")

    def __init__(self, matches: Sequence[Match | None]) -> None:
        """`matches`: of the rules in their order; None matches all requests."""
        self._all = (1 << len(matches)) - 1
        self._one = list(_tables(_ONE, matches))
        self._several = list(_tables(_SEVERAL, matches))

    def positions(self, facts: RequestFacts, start: int = 0) -> Iterator[int]:
        """Those from `start` on, in order."""
        left = self._all >> start << start
        for fact, allowed, others in self._one:
            left &= allowed.get(fact(facts), others)
        for fact, allowed, others in self._several:
            for word in fact(facts):  # type: ignore[attr-defined]
                others |= allowed.get(word, 0)
            left &= others
        while left:
            yield (left & -left).bit_length() - 1
            left &= left - 1


def _tables(facts: Mapping[str, str], matches: Sequence[Match | None]) -> Iterator[_Table]:
    """For each fact that some rule looks at."""
    allowed: dict[str, dict[object, int]] = {key: {} for key in facts}
    looking = dict.fromkeys(facts, 0)  # the rules that do
    for position, match in enumerate(matches):
        bit = 1 << position
        for condition in match.conditions if match is not None else ():
            key = condition.key
            # Of several sets that a rule wants something of, the first is looked up; any would do.
            if key in allowed and not looking[key] & bit:
                looking[key] |= bit
                words = allowed[key]
                for word in condition.value:
                    words[word] = words.get(word, 0) | bit
    for key, fact in facts.items():
        others = ((1 << len(matches)) - 1) & ~looking[key]
        if allowed[key]:
            yield _Table(attrgetter(fact), {word: rules | others for word, rules in allowed[key].items()}, others)
