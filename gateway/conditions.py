"""What a rule may look at: each key of `when`, compiled once to a test and to the sentences that tell how it came out.

Owns matching, and which match covers which. Refuses clocks (the time of day comes with the snapshot), the order of
rules, and what follows from a match.

A `Match` is a conjunction; `any`, `all` and `not` hold further ones. So that every question has one answer in one
place, a match is compiled to `Condition`s, and everything asked of it afterwards is asked of those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import translate
from operator import attrgetter, eq, le
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from gateway.types import Capability, Deployment, RequestFacts, Snapshot

Deployments = Mapping[str, Deployment]
Test = Callable[[RequestFacts, Deployments, Snapshot], bool]
Sentence = Callable[[RequestFacts, Deployments, Snapshot], str]

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

    __slots__ = ("_matches", "patterns")

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = frozenset(patterns)
        self._matches = re.compile("|".join(map(translate, sorted(self.patterns)))).match

    def __contains__(self, name: str) -> bool:
        return self._matches(name) is not None

    def within(self, other: Globs) -> bool:
        """Whether `other` is known to match all that these do: each is one of its own, or a plain name that it
        matches."""
        return all(pattern in other.patterns or (is_plain(pattern) and pattern in other) for pattern in self.patterns)


def is_plain(pattern: str) -> bool:
    """Whether a pattern matches itself alone."""
    return _WILD.search(pattern) is None


class Condition(NamedTuple):
    """One condition, of which a match wants all.

    `key` and `value` are what it says, `within` whether one such value means another: all that meets the first meets
    the second. `unmet` tells why a request that fails it does, `met` why one that does not; both quote the policy
    alone. `cost` orders conditions: the cheap ones are asked first.
    """

    key: str
    value: Any
    within: Callable[[Any, Any], bool]
    holds: Test
    unmet: Sentence
    met: Sentence
    cost: int = 0

    def follows_from(self, match: Match) -> bool:
        """Whether every request that matches meets this, as far as the conditions alone tell."""
        key, value, within = self.key, self.value, self.within
        for other in match.conditions:
            if other.key == key and within(other.value, value):
                return True
        return key == "any" and any(branch.covers(match) for branch in value)


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of a rule. All stated ones hold or the rule does not apply; within a set any one item is enough,
    of `any_of` any one match, of `header` every name with any one of its values, of `local_load` every deployment.

    What is empty or None states nothing. `counted_by` names the deployment whose tokenizer `prompt_tokens` is about;
    without one it is the estimate. `conditions` is compiled from the other fields once, and is all that is looked at
    afterwards; `matches` is whether all of them hold, `keys` what they are about but for alternatives: a match that
    covers another has no key that the other lacks.
    """

    any_label: frozenset[str] = frozenset()
    does_not_fit: frozenset[str] = frozenset()
    slo: frozenset[str] = frozenset()
    tenant: frozenset[str] = frozenset()
    key_tag: frozenset[str] = frozenset()
    tag: frozenset[str] = frozenset()
    stream: bool | None = None
    tools: bool | None = None
    images: bool | None = None
    schema: bool | None = None
    fits: frozenset[str] = frozenset()
    model: frozenset[str] = frozenset()
    header: Mapping[str, frozenset[str]] = field(default_factory=dict)
    prompt_tokens: Range | None = None
    counted_by: str | None = None
    max_tokens: Range | None = None
    local_load: Mapping[str, Load] = field(default_factory=dict)
    time: Hours | None = None
    any_of: tuple[Match, ...] = ()
    all_of: tuple[Match, ...] = ()
    not_: Match | None = None
    conditions: tuple[Condition, ...] = field(init=False, repr=False, compare=False)
    matches: Test = field(init=False, repr=False, compare=False)
    keys: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        compiled = [*_flags(self), *_sets(self), *_measures(self), *_compounds(self)]
        compiled.sort(key=_cost)
        object.__setattr__(self, "conditions", tuple(compiled))
        object.__setattr__(self, "matches", _all([condition.holds for condition in compiled]))
        object.__setattr__(self, "keys", frozenset([condition.key for condition in compiled]) - {"any"})

    def why_not(self, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str | None:
        """The conditions that do not hold, as one sentence; None where the request matches."""
        asked = (facts, deployments, snapshot)
        return "; ".join(c.unmet(*asked) for c in self.conditions if not c.holds(*asked)) or None

    def why(self, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str:
        """How a request that matches meets the conditions, as one sentence."""
        return " and ".join(condition.met(facts, deployments, snapshot) for condition in self.conditions)

    def covers(self, other: Match) -> bool:
        """Whether every request that `other` matches is matched by this one as well, as far as the conditions alone
        tell: never wrongly true."""
        if not self.keys <= other.keys:
            return False
        for condition in self.conditions:  # noqa: SIM110 - as in `_all`; loading compares hundreds of rules
            if not condition.follows_from(other):
                return False
        return True

    @property
    def never(self) -> bool:
        """Whether no request matches, as far as the conditions alone tell: what it excepts is all that it asks for, it
        wants a flag both ways, or no alternative can hold. Never wrongly true."""
        flags: dict[str, bool] = {}
        for key, value, *_ in self.conditions:
            if value.__class__ is bool and flags.setdefault(key, value) is not value:
                return True
            if key == "not" and value.conditions and value.covers(self):
                return True
            if key == "any" and all(branch.never for branch in value):
                return True
        return False

    @property
    def needs(self) -> frozenset[Capability]:
        """What every request that matches asks of a deployment."""
        asked: dict[Capability, bool | None] = {"tools": self.tools, "images": self.images, "schema": self.schema}
        needed = frozenset(capability for capability, wanted in asked.items() if wanted)
        if self.any_of:
            needed |= frozenset.intersection(*(branch.needs for branch in self.any_of))
        return needed.union(*(part.needs for part in self.all_of))

    def parts(self) -> Iterator[Match]:
        """This match and all that it holds."""
        yield self
        for inner in (*self.any_of, *self.all_of, *([self.not_] if self.not_ is not None else [])):
            yield from inner.parts()


_cost = attrgetter("cost")


def _stated(
    key: str,
    value: Any,
    within: Callable[[Any, Any], bool],
    holds: Test,
    told: tuple[str, str],
    shown: Callable[[Any], str],
    cost: int,
) -> Condition:
    """A condition whose sentences, `told` with the value behind it, are the same for every request. They are made only
    for who reads them."""
    unmet, met = told
    return Condition(
        key,
        value,
        within,
        holds,
        lambda _f, _d, _s: f"{unmet} {shown(value)}",
        lambda _f, _d, _s: f"{met} {shown(value)}",
        cost,
    )


def _flags(match: Match) -> Iterator[Condition]:
    def flag(key: str, wanted: bool, holds: Test, yes: str, no: str) -> Condition:
        unmet, met = (no, yes) if wanted else (yes, no)
        return Condition(
            key, wanted, eq, holds, lambda _f, _d, _s: f"the request {unmet}", lambda _f, _d, _s: f"the request {met}"
        )

    if (stream := match.stream) is not None:
        yield flag("stream", stream, lambda f, _d, _s: f.stream is stream, "is a stream", "is not a stream")
    if (tools := match.tools) is not None:
        yield flag("tools", tools, lambda f, _d, _s: f.tools is tools, "offers tools", "offers no tools")
    if (images := match.images) is not None:
        yield flag("images", images, lambda f, _d, _s: f.images is images, "holds images", "holds no images")
    if (schema := match.schema) is not None:
        yield flag("schema", schema, lambda f, _d, _s: f.schema is schema, "asks for a schema", "asks for no schema")


def _sets(match: Match) -> Iterator[Condition]:
    def words(key: str, items: frozenset[str], holds: Test, lack: str, have: str) -> Condition:
        return _stated(key, items, le, holds, (lack, have), _either, 1)

    if slo := match.slo:
        lack, have = "the request's SLO class is not", "the request's SLO class is"
        yield words("slo", slo, lambda f, _d, _s: f.slo in slo, lack, have)
    if tenant := match.tenant:
        yield words("tenant", tenant, lambda f, _d, _s: f.tenant in tenant, "the tenant is not", "the tenant is")
    if tag := match.tag:
        lack, have = "the request has no tag", "the request has the tag"
        yield words("tag", tag, lambda f, _d, _s: not tag.isdisjoint(f.tags), lack, have)
    if key_tag := match.key_tag:
        lack, have = "the key has no tag", "the key has the tag"
        yield words("key_tag", key_tag, lambda f, _d, _s: not key_tag.isdisjoint(f.key_tags), lack, have)
    if labels := match.any_label:
        lack, have = "the request has no label", "the request has the label"
        yield words("any_label", labels, lambda f, _d, _s: not labels.isdisjoint(f.labels), lack, have)
    for name, values in match.header.items():
        lack, have = f"the header {name} is not", f"the header {name} is"
        yield words(f"header {name}", values, _sent(name, values), lack, have)
    if match.model:
        globs = Globs(match.model)
        told = "the model asked for is not", "the model asked for is"
        holds: Test = lambda f, _d, _s: f.model in globs  # noqa: E731
        yield _stated("model", globs, Globs.within, holds, told, lambda globs: _either(globs.patterns), 2)


def _sent(name: str, values: frozenset[str]) -> Test:
    pairs = frozenset((name, value) for value in values)
    return lambda f, _d, _s: not pairs.isdisjoint(f.headers)


def _measures(match: Match) -> Iterator[Condition]:
    """What is compared with a number, a window or the time: looked at after what is only looked up."""
    if (most := match.max_tokens) is not None:
        told = "max_tokens is not", "max_tokens is"
        holds: Test = lambda f, _d, _s: f.max_tokens is not None and f.max_tokens in most  # noqa: E731
        yield _stated("max_tokens", most, Range.within, holds, told, str, 2)
    if (prompt := match.prompt_tokens) is not None:
        told, key = ("the prompt's tokens are not", "the prompt's tokens are"), f"prompt_tokens {match.counted_by}"
        yield _stated(key, prompt, Range.within, _counts(prompt, match.counted_by), told, str, 2)
    for name, load in match.local_load.items():
        yield _load(name, load)
    if fitting := match.fits:
        told = "the request does not fit", "the request fits"
        yield _stated("fits", fitting, le, lambda f, d, _s: any(map(_fits(f, d), fitting)), told, _either, 3)
    if small := match.does_not_fit:
        yield Condition(
            "does_not_fit",
            small,
            le,
            _overflows(tuple(sorted(small))),
            lambda _f, _d, _s: f"the request fits {' and '.join(sorted(small))}",
            lambda _f, _d, _s: f"the request does not fit {_either(small)}",
            3,
        )
    if (hours := match.time) is not None:
        told = "it is not", "it is"
        yield _stated("time", hours, Hours.within, lambda _f, _d, s: s.wall in hours, told, str, 4)


def _load(name: str, wanted: Load) -> Condition:
    return Condition(
        f"local_load {name}",
        wanted,
        Load.within,
        lambda _f, _d, s: wanted.holds(s.deployments[name].busy),
        lambda _f, _d, _s: f"the load of {name} is not {wanted.share}{'' if wanted.unknown else ', or not known'}",
        lambda _f, _d, _s: f"the load of {name} is {wanted.share}{', or not known' if wanted.unknown else ''}",
        2,
    )


def _counts(wanted: Range, counted_by: str | None) -> Test:
    if counted_by is None:
        return lambda f, _d, _s: f.prompt.estimate in wanted
    return lambda f, d, _s: f.prompt.about(d[counted_by].tokenizer) in wanted


def _overflows(small: Sequence[str]) -> Test:
    def holds(facts: RequestFacts, deployments: Deployments, _: Snapshot) -> bool:
        for name in small:  # noqa: SIM110 - as in `_all`
            if not deployments[name].fits(facts.prompt, facts.max_tokens):
                return True
        return False

    return holds


def _fits(facts: RequestFacts, deployments: Deployments) -> Callable[[str], bool]:
    return lambda name: deployments[name].fits(facts.prompt, facts.max_tokens)


def _compounds(match: Match) -> Iterator[Condition]:
    for part in match.all_of:
        yield from part.conditions
    if branches := match.any_of:
        yield _any(branches)
    if (excepted := match.not_) is not None:
        yield Condition(
            "not",
            excepted,
            lambda inner, wanted: inner.covers(wanted),
            lambda f, d, s: not excepted.matches(f, d, s),
            lambda f, d, s: f"excepted is that {excepted.why(f, d, s)}",
            lambda f, d, s: excepted.why_not(f, d, s) or "",
            cost=5,
        )


def _all(tests: Sequence[Test]) -> Test:
    """Whether all hold. Loops where `all` over a generator would take twice as long."""
    if len(tests) == 1:
        return tests[0]

    def holds(facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> bool:
        for test in tests:  # noqa: SIM110 - see above
            if not test(facts, deployments, snapshot):
                return False
        return True

    return holds


def _any(branches: Sequence[Match]) -> Condition:
    def unmet(facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str:
        reasons = (branch.why_not(facts, deployments, snapshot) for branch in branches)
        return f"no alternative holds ({' / '.join(reason or '' for reason in reasons)})"

    def met(facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str:
        return next(b.why(facts, deployments, snapshot) for b in branches if b.matches(facts, deployments, snapshot))

    tests = [branch.matches for branch in branches]

    def holds(facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> bool:
        for test in tests:  # noqa: SIM110 - as in `_all`
            if test(facts, deployments, snapshot):
                return True
        return False

    def within(narrow: Sequence[Match], wide: Sequence[Match]) -> bool:
        return all(any(wider.covers(branch) for wider in wide) for branch in narrow)

    return Condition("any", branches, within, holds, unmet, met, cost=5)


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))
