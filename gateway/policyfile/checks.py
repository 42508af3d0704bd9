"""What rules mean together: which can never apply, which cannot do what they ask for, which leave a protected request
without a place.

Owns the checks that need the whole policy. Refuses entries that are wrong by themselves: about those nothing further
is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from gateway.conditions import Condition, Match
from gateway.policy import DEFAULT_RULE, Invariant, Rule, permit
from gateway.policyfile.rules import Written
from gateway.policyfile.tree import Problem
from gateway.ranges import Globs
from gateway.types import UNSCANNABLE, Deployment, Permit, RequestFacts

_ANY = Match()


def unreachable(rules: Sequence[Written], default: Written | None) -> Iterator[Problem]:
    """Rules that no request matches, or that an earlier one leaves none for. One that skips protected requests leaves
    those."""
    earlier = Earlier()
    for written in (*rules, *([default] if default else [])):
        if not written.entry.intact:
            continue
        match = written.rule.match
        if match is not None and match.never:
            yield written.entry.problem("can never apply: its conditions contradict each other", "when", key=True)
            continue
        before = earlier.covering(match or _ANY)
        if before is not None:
            why = "matches all its requests" if before.match else "has no conditions"
            yield written.entry.problem(f'can never apply: the rule "{before.name}" before it {why}')
        elif written.rule.protected != "skip" and (match is None or match.conditions):
            earlier.add(written.rule)  # an empty `when` is a problem already


class Earlier:
    """The rules so far. Each is filed once: under the places of that one of its conditions whose places hold the
    fewest, or as `broad` if none has a place.

    A rule that covers a match has each of its conditions met by one of the match's own that is about the same, so it
    is filed where one of those is looked up; of hundreds of rules few are compared with each other.
    """

    def __init__(self) -> None:
        self._broad: list[Rule] = []
        self._filed: dict[_Spot, list[Rule]] = {}

    def add(self, rule: Rule) -> None:
        spots = self._emptiest(rule.match) if rule.match else ()
        for spot in spots:
            self._filed.setdefault(spot, []).append(rule)
        if not spots:
            self._broad.append(rule)

    def covering(self, match: Match) -> Rule | None:
        for filed in (self._broad, *[self._filed[spot] for spot in _looked_up(match) if spot in self._filed]):
            for rule in filed:
                if rule.match is None or rule.match.covers(match):
                    return rule
        return None

    def _emptiest(self, match: Match) -> Sequence[_Spot]:
        """The places of that condition whose places hold the fewest; alternatives have those of each, if all do."""
        places = []
        for condition in match.conditions:
            spots = _places(condition)
            if condition.key == "any":
                branches = [self._emptiest(branch) for branch in condition.value]
                spots = list(chain.from_iterable(branches)) if all(branches) else ()
            if spots:
                places.append(spots)
        return min(places, key=self._held, default=()) if len(places) > 1 else places[0] if places else ()

    def _held(self, spots: Sequence[_Spot]) -> int:
        """How many rules places hold."""
        held = 0
        for spot in spots:
            if spot in self._filed:
                held += len(self._filed[spot])
        return held


_Spot = tuple[str, object]


def _places(condition: Condition) -> Sequence[_Spot]:
    """Where a rule with this condition is filed: under each of its items, since any of them may be all that another
    has, or under None."""
    key, value = condition.key, condition.value
    if isinstance(value, frozenset):
        return [(key, item) for item in value]
    if isinstance(value, Globs):
        return [(key, pattern) for pattern in value.patterns] if value.plain else [(key, None)]
    return [(key, value if isinstance(value, bool) else None)]


def _looked_up(match: Match) -> Iterator[_Spot]:
    """Where any rule that covers the match is filed. One that covers alternatives covers the first of them."""
    for condition in match.conditions:
        if condition.key == "any":
            yield from _looked_up(condition.value[0])
        else:
            yield _places(condition)[0]
            yield condition.key, None


def incapable(rules: Sequence[Written], deployments: Mapping[str, Deployment]) -> Iterator[Problem]:
    """Rules for requests that need what no candidate has."""
    for written in rules:
        needs = written.rule.match.needs if written.rule.match else frozenset()
        candidates = _candidates(written, deployments) if needs else []
        if candidates and not any(needs <= candidate.capabilities for candidate in candidates):
            what = " and ".join(sorted(needs))
            message = f"matches only requests with {what}, and no candidate has that capability"
            yield written.entry.problem(message, "candidates", key=True)


def unplaced(
    rules: Sequence[Written],
    labels: frozenset[str],
    invariants: Sequence[Invariant],
    deployments: Mapping[str, Deployment],
) -> Iterator[Problem]:
    """Rules that do not say what happens to protected requests, where some have no candidate.

    A permit only shrinks as labels and tags of the key are added, so a rule leaves some request of a tenant without a
    candidate if and only if it leaves the one with all labels and tags without one. Each tenant, label and tag counts
    for every rule, whatever its conditions and the rules before it took out: a client may name a rule and so enter
    there. Masking places none for sure: a header may raise the label as well.
    """
    worst = [(facts, permit(invariants, facts)) for facts in _worst(labels | {UNSCANNABLE}, invariants)]
    placed: set[tuple[str, ...]] = set()  # candidates that leave none without; many rules have the same
    for written in rules:
        if written.rule.protected is not None or written.rule.candidates in placed:
            continue
        candidates = _candidates(written, deployments)
        for facts, allowed in worst if candidates else ():
            if not _placed(candidates, allowed):
                least = _least(facts, written.rule, candidates, invariants)
                masked = any(invariant.mask & least.labels for invariant in invariants)
                message = _no_place(least, permit(invariants, least), written.rule, masked=masked)
                yield written.entry.problem(message, "candidates", key=True)
                break
        else:
            if candidates:
                placed.add(written.rule.candidates)


def _worst(labels: frozenset[str], invariants: Sequence[Invariant]) -> Iterator[RequestFacts]:
    """For each tenant that the invariants tell apart, the request that they bind most; first of a tenant that none
    names."""
    key_tags = frozenset().union(*(invariant.key_tag for invariant in invariants))
    tenants = sorted(frozenset().union(*(invariant.tenant for invariant in invariants)))
    for tenant in ("", *tenants):
        yield RequestFacts("", tenant=tenant, key_tags=key_tags, labels=labels)


def _no_place(facts: RequestFacts, allowed: Permit, rule: Rule, *, masked: bool) -> str:
    zones = ", ".join(sorted(allowed.zones or ()))
    zones += " to one that cannot be masked" if masked and zones else ""
    verdict = f"permits only {zones}; add a candidate there, or" if zones else "leaves no zone;"
    choice = "refuse" if rule.name == DEFAULT_RULE else "refuse or skip"
    who = " ".join(_described(facts))
    return f"no candidate is left for a request {who}: {allowed.because} {verdict} write protected: {choice}"


def _described(facts: RequestFacts) -> Iterator[str]:
    if facts.labels:
        yield f"with the label{'s' if len(facts.labels) > 1 else ''} {' and '.join(sorted(facts.labels))}"
    if facts.tenant:
        yield f"of the tenant {facts.tenant}"
    if facts.key_tags:
        yield f"whose key has the tag{'s' if len(facts.key_tags) > 1 else ''} {' and '.join(sorted(facts.key_tags))}"


def _candidates(written: Written, deployments: Mapping[str, Deployment]) -> list[Deployment]:
    """The rule's candidates, or none where it or one of them is wrong, so that nothing is said about it."""
    names = written.rule.candidates
    known = written.entry.intact and all(name in deployments for name in names)
    return [deployments[name] for name in names] if known else []


def _placed(candidates: Sequence[Deployment], allowed: Permit) -> bool:
    return any(allowed.allows(candidate.zone) for candidate in candidates)


def _least(
    facts: RequestFacts, rule: Rule, candidates: Sequence[Deployment], invariants: Sequence[Invariant]
) -> RequestFacts:
    """A request without a place from which no label or tag can be taken away: what the message is about."""
    for label in sorted(facts.labels):
        fewer = replace(facts, labels=facts.labels - {label})
        matches = rule.match is None or not rule.match.any_label or not rule.match.any_label.isdisjoint(fewer.labels)
        if matches and not _placed(candidates, permit(invariants, fewer)):
            facts = fewer
    for tag in sorted(facts.key_tags):
        fewer = replace(facts, key_tags=facts.key_tags - {tag})
        if not _placed(candidates, permit(invariants, fewer)):
            facts = fewer
    return facts
