"""What a rule may look at: each key of `when`, compiled once to a test and to the sentences that tell how it came out.

Owns matching, and which match covers which. Refuses clocks (the time of day comes with the snapshot), the order of
rules, and what follows from a match.

A `Match` is a conjunction; `any`, `all` and `not` hold further ones. So that every question has one answer in one
place, a match is compiled to `Condition`s, and everything asked of it afterwards is asked of those.

Policies have hundreds of them and are loaded while requests wait, so a match has nothing in it for what it does not
state: each key that it does state is looked up in one table, `_COMPILED`, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, eq, le
from typing import Any, NamedTuple, TypedDict, Unpack

from gateway.ranges import Globs, Hours, Load, Range
from gateway.snapshot import Snapshot
from gateway.types import Capability, Deployment, RequestFacts

Deployments = Mapping[str, Deployment]
Test = Callable[[RequestFacts, Deployments, Snapshot], bool]
Tell = Callable[[bool, RequestFacts, Deployments, Snapshot], str]


class Condition(NamedTuple):
    """One condition, of which a match wants all.

    `key` and `value` are what it says, `within` whether one such value means another: all that meets the first meets
    the second. `tell` is how a request meets it, for true, or why one does not; it quotes the policy alone. `cost`
    orders conditions: the cheap ones are asked first.
    """

    key: str
    value: Any
    within: Callable[[Any, Any], bool]
    holds: Test
    tell: Tell
    cost: int

    def follows_from(self, match: Match) -> bool:
        """Whether every request that matches meets this, as far as the conditions alone tell."""
        key, value, within = self.key, self.value, self.within
        for other in match.conditions:
            if other.key == key and within(other.value, value):
                return True
        return key == "any" and any(branch.covers(match) for branch in value)


class Stated(TypedDict, total=False):
    """What a rule looks at. Within a set any one item is enough, of `any_of` any one match, of `header` every name with
    any one of its values, of `local_load` every deployment. `counted_by` names the deployment whose tokenizer
    `prompt_tokens` is about; without one it is the estimate. What is empty or None states nothing."""

    stream: bool | None
    tools: bool | None
    images: bool | None
    schema: bool | None
    slo: frozenset[str]
    tenant: frozenset[str]
    tag: frozenset[str]
    key_tag: frozenset[str]
    any_label: frozenset[str]
    header: Mapping[str, frozenset[str]]
    model: frozenset[str]
    max_tokens: Range | None
    prompt_tokens: Range | None
    counted_by: str | None
    local_load: Mapping[str, Load]
    fits: frozenset[str]
    does_not_fit: frozenset[str]
    time: Hours | None
    all_of: tuple[Match, ...]
    any_of: tuple[Match, ...]
    not_: Match | None


@dataclass(frozen=True, slots=True, init=False)
class Match:
    """The conditions of a rule. All that are stated hold or the rule does not apply.

    `conditions` is compiled from `stated` once, and is all that is looked at afterwards; `matches` is whether all of
    them hold, `keys` what they are about but for alternatives: a match that covers another has no key that the other
    lacks.
    """

    stated: Stated
    conditions: tuple[Condition, ...] = field(repr=False, compare=False)
    matches: Test = field(repr=False, compare=False)
    keys: frozenset[str] = field(repr=False, compare=False)

    def __init__(self, **stated: Unpack[Stated]) -> None:
        said: dict[str, Any] = {key: value for key, value in stated.items() if value or value is False}
        compiled: list[Condition] = []
        for key in sorted(said, key=_ORDER.__getitem__):
            compiled += _COMPILED[key](said[key], said)
        if "all_of" in said:
            compiled.sort(key=_cost)
        object.__setattr__(self, "stated", said)
        object.__setattr__(self, "conditions", tuple(compiled))
        object.__setattr__(self, "matches", _all([condition.holds for condition in compiled]))
        object.__setattr__(self, "keys", frozenset([c.key for c in compiled if c.key != "any"]))

    def why_not(self, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str | None:
        """The conditions that do not hold, as one sentence; None where the request matches."""
        asked = (facts, deployments, snapshot)
        return "; ".join(c.tell(False, *asked) for c in self.conditions if not c.holds(*asked)) or None

    def why(self, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str:
        """How a request that matches meets the conditions, as one sentence."""
        return " and ".join(condition.tell(True, facts, deployments, snapshot) for condition in self.conditions)

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
        for condition in self.conditions:
            key, value = condition.key, condition.value
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
        stated = self.stated
        needed = frozenset([capability for capability in _CAPABILITIES if stated.get(capability)])
        if branches := stated.get("any_of"):
            needed |= frozenset.intersection(*(branch.needs for branch in branches))
        return needed.union(*[part.needs for part in stated.get("all_of", ())])

    @property
    def any_label(self) -> frozenset[str]:
        return self.stated.get("any_label", _NOTHING)

    @property
    def does_not_fit(self) -> frozenset[str]:
        return self.stated.get("does_not_fit", _NOTHING)

    def parts(self) -> Iterator[Match]:
        """This match and all that it holds."""
        yield self
        inner = [*self.stated.get("any_of", ()), *self.stated.get("all_of", ())]
        excepted = self.stated.get("not_")
        for part in inner if excepted is None else (*inner, excepted):
            yield from part.parts()


_NOTHING: frozenset[str] = frozenset()
_CAPABILITIES: tuple[Capability, ...] = ("tools", "images", "schema")
_cost = attrgetter("cost")

# From the value of a key, and all that is stated beside it, to conditions.
_Compile = Callable[[Any, Mapping[str, Any]], Iterable[Condition]]


def _flag(key: str, holds: Callable[[bool], Test], yes: str, no: str) -> _Compile:
    def compiled(wanted: bool, _: Mapping[str, Any]) -> Iterable[Condition]:
        def tell(met: bool, _f: RequestFacts, _d: Deployments, _s: Snapshot) -> str:
            return f"the request {yes if met is wanted else no}"

        return (Condition(key, wanted, eq, holds(wanted), tell, 0),)

    return compiled


def _words(key: str, holds: Callable[[frozenset[str]], Test], lack: str, have: str) -> _Compile:
    def compiled(items: frozenset[str], _: Mapping[str, Any]) -> Iterable[Condition]:
        return (Condition(key, items, le, holds(items), _told(lack, have, _either, items), 1),)

    return compiled


def _told(lack: str, have: str, shown: Callable[[Any], str], value: Any) -> Tell:
    """The same sentences for every request, which are made only for who reads them."""
    return lambda met, _f, _d, _s: f"{have if met else lack} {shown(value)}"


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))


def _headers(headers: Mapping[str, frozenset[str]], _: Mapping[str, Any]) -> Iterator[Condition]:
    for name, values in headers.items():
        told = _told(f"the header {name} is not", f"the header {name} is", _either, values)
        yield Condition(f"header {name}", values, le, _sent(name, values), told, 1)


def _sent(name: str, values: frozenset[str]) -> Test:
    pairs = frozenset([(name, value) for value in values])
    return lambda f, _d, _s: not pairs.isdisjoint(f.headers)


def _model(patterns: frozenset[str], _: Mapping[str, Any]) -> Iterable[Condition]:
    globs = Globs(patterns)
    told = _told("the model asked for is not", "the model asked for is", _either, patterns)
    return (Condition("model", globs, Globs.within, lambda f, _d, _s: f.model in globs, told, 2),)


# What is compared with a number, a window or the time is looked at after what is only looked up.


def _max_tokens(most: Range, _: Mapping[str, Any]) -> Iterable[Condition]:
    def holds(facts: RequestFacts, _d: Deployments, _s: Snapshot) -> bool:
        return facts.max_tokens is not None and facts.max_tokens in most

    told = _told("max_tokens is not", "max_tokens is", str, most)
    return (Condition("max_tokens", most, Range.within, holds, told, 2),)


def _prompt_tokens(wanted: Range, stated: Mapping[str, Any]) -> Iterable[Condition]:
    counted_by: str | None = stated.get("counted_by")
    told = _told("the prompt's tokens are not", "the prompt's tokens are", str, wanted)
    key = f"prompt_tokens {counted_by}"
    return (Condition(key, wanted, Range.within, _counts(wanted, counted_by), told, 2),)


def _counts(wanted: Range, counted_by: str | None) -> Test:
    if counted_by is None:
        return lambda f, _d, _s: f.prompt.estimate in wanted
    return lambda f, d, _s: f.prompt.about(d[counted_by].tokenizer) in wanted


def _local_load(loads: Mapping[str, Load], _: Mapping[str, Any]) -> Iterable[Condition]:
    return [_load(name, wanted) for name, wanted in loads.items()]


def _load(name: str, wanted: Load) -> Condition:
    def tell(met: bool, _f: RequestFacts, _d: Deployments, _s: Snapshot) -> str:
        also = ", or not known" if wanted.unknown is met else ""
        return f"the load of {name} is {'' if met else 'not '}{wanted.share}{also}"

    def holds(_f: RequestFacts, _d: Deployments, snapshot: Snapshot) -> bool:
        return wanted.holds(snapshot.deployments[name].busy)

    return Condition(f"local_load {name}", wanted, Load.within, holds, tell, 2)


def _fits(fitting: frozenset[str], _: Mapping[str, Any]) -> Iterable[Condition]:
    def holds(facts: RequestFacts, deployments: Deployments, _: Snapshot) -> bool:
        return any(deployments[name].fits(facts.prompt, facts.max_tokens) for name in fitting)

    told = _told("the request does not fit", "the request fits", _either, fitting)
    return (Condition("fits", fitting, le, holds, told, 3),)


def _does_not_fit(small: frozenset[str], _: Mapping[str, Any]) -> Iterable[Condition]:
    def tell(met: bool, _f: RequestFacts, _d: Deployments, _s: Snapshot) -> str:
        return (
            f"the request does not fit {_either(small)}" if met else f"the request fits {' and '.join(sorted(small))}"
        )

    return (Condition("does_not_fit", small, le, _overflows(tuple(sorted(small))), tell, 3),)


def _overflows(small: Sequence[str]) -> Test:
    def holds(facts: RequestFacts, deployments: Deployments, _: Snapshot) -> bool:
        for name in small:  # noqa: SIM110 - as in `_all`
            if not deployments[name].fits(facts.prompt, facts.max_tokens):
                return True
        return False

    return holds


def _time(hours: Hours, _: Mapping[str, Any]) -> Iterable[Condition]:
    told = _told("it is not", "it is", str, hours)
    return (Condition("time", hours, Hours.within, lambda _f, _d, s: s.wall in hours, told, 4),)


def _all_of(parts: Sequence[Match], _: Mapping[str, Any]) -> Iterable[Condition]:
    return chain.from_iterable([part.conditions for part in parts])


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


def _any_of(branches: Sequence[Match], _: Mapping[str, Any]) -> Iterable[Condition]:
    def tell(met: bool, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str:
        asked = facts, deployments, snapshot
        if met:
            return next(branch.why(*asked) for branch in branches if branch.matches(*asked))
        return f"no alternative holds ({' / '.join(branch.why_not(*asked) or '' for branch in branches)})"

    tests = [branch.matches for branch in branches]

    def holds(facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> bool:
        for test in tests:  # noqa: SIM110 - as in `_all`
            if test(facts, deployments, snapshot):
                return True
        return False

    return (Condition("any", branches, _any_within, holds, tell, 5),)


def _any_within(narrow: Sequence[Match], wide: Sequence[Match]) -> bool:
    return all(any(wider.covers(branch) for wider in wide) for branch in narrow)


def _not(excepted: Match, _: Mapping[str, Any]) -> Iterable[Condition]:
    matches = excepted.matches

    def tell(met: bool, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str:
        asked = facts, deployments, snapshot
        return excepted.why_not(*asked) or "" if met else f"excepted is that {excepted.why(*asked)}"

    def within(inner: Match, wanted: Match) -> bool:
        return inner.covers(wanted)

    return (Condition("not", excepted, within, lambda f, d, s: not matches(f, d, s), tell, 5),)


# In the order in which conditions are asked: their cost must not decrease.
_COMPILED: Mapping[str, _Compile] = {
    "stream": _flag("stream", lambda wanted: lambda f, _d, _s: f.stream is wanted, "is a stream", "is not a stream"),
    "tools": _flag("tools", lambda wanted: lambda f, _d, _s: f.tools is wanted, "offers tools", "offers no tools"),
    "images": _flag("images", lambda wanted: lambda f, _d, _s: f.images is wanted, "holds images", "holds no images"),
    "schema": _flag(
        "schema", lambda wanted: lambda f, _d, _s: f.schema is wanted, "asks for a schema", "asks for no schema"
    ),
    "slo": _words(
        "slo",
        lambda items: lambda f, _d, _s: f.slo in items,
        "the request's SLO class is not",
        "the request's SLO class is",
    ),
    "tenant": _words("tenant", lambda items: lambda f, _d, _s: f.tenant in items, "the tenant is not", "the tenant is"),
    "tag": _words(
        "tag",
        lambda items: lambda f, _d, _s: not items.isdisjoint(f.tags),
        "the request has no tag",
        "the request has the tag",
    ),
    "key_tag": _words(
        "key_tag",
        lambda items: lambda f, _d, _s: not items.isdisjoint(f.key_tags),
        "the key has no tag",
        "the key has the tag",
    ),
    "any_label": _words(
        "any_label",
        lambda items: lambda f, _d, _s: not items.isdisjoint(f.labels),
        "the request has no label",
        "the request has the label",
    ),
    "header": _headers,
    "model": _model,
    "max_tokens": _max_tokens,
    "prompt_tokens": _prompt_tokens,
    "counted_by": lambda *_: (),
    "local_load": _local_load,
    "fits": _fits,
    "does_not_fit": _does_not_fit,
    "time": _time,
    "all_of": _all_of,
    "any_of": _any_of,
    "not_": _not,
}
_ORDER: Mapping[str, int] = {key: position for position, key in enumerate(_COMPILED)}
