"""What a compiled policy is: labels, invariants, SLO classes, rules, and the questions that a request asks of them.

Owns labels and the permit; what a rule may look at is in `conditions`. Refuses text: YAML becomes these types in
`policyfile`, which reports every error; what is constructed here is taken to be valid. Also refuses clocks and
measurements: what a deployment does now is the snapshot's, and `routing` brings both together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from types import MappingProxyType
from typing import Literal

from gateway.conditions import Deployments
from gateway.conditions import Match as Match
from gateway.decision import Caching
from gateway.limits import DeploymentLimits
from gateway.shortlist import Shortlist
from gateway.types import UNSCANNABLE, Deployment, Permit, RequestFacts

DATA_CLASS_HEADER = "x-data-class"
DEFAULT_RULE = "default"
AUTO = "auto"

Unknown = Literal["eligible", "ineligible"]
Otherwise = Literal["fastest", "cheapest", "reject"]
OrderBy = Literal["listed", "marginal_cost", "first_token", "total_latency", "weighted"]
OrderTerm = Literal["marginal_cost", "first_token", "total_latency"]
Sticky = Literal["request", "key", "tenant"]
Protected = Literal["refuse", "skip"]


# What is asked of a candidate's times: which of TIMES, who asks, and how many milliseconds at most.
Asked = tuple[int, str, float]
TIMES = ("first token", "whole answer", "each token")


def _asks(who: str, *limits: float | None) -> tuple[Asked, ...]:
    return tuple([(which, who, limit) for which, limit in enumerate(limits) if limit is not None])


@dataclass(frozen=True, slots=True)
class Slo:
    """A latency class that a caller names: of 100 answers 95 have their first token within `first_token_p95_ms`, are
    whole within `total_p95_ms`, and take at most `per_token_p95_ms` for each token after the first. Milliseconds; None
    where the class does not say."""

    name: str
    first_token_p95_ms: float | None
    total_p95_ms: float | None = None
    per_token_p95_ms: float | None = None

    asks: tuple[Asked, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        asks = _asks(self.name, self.first_token_p95_ms, self.total_p95_ms, self.per_token_p95_ms)
        object.__setattr__(self, "asks", asks)


@dataclass(frozen=True, slots=True)
class LabelSource:
    """A label and the facts that raise it; any one of them is enough. Header names and values are lower-case."""

    name: str
    detects: frozenset[str] = frozenset()
    headers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    key_tags: frozenset[str] = frozenset()

    def raised_by(self, kinds: frozenset[str], headers: Mapping[str, str], key_tags: frozenset[str]) -> bool:
        """Whether a request with these detected kinds, headers (lower-case names) and tags of its key carries the
        label."""
        if not self.detects.isdisjoint(kinds) or not self.key_tags.isdisjoint(key_tags):
            return True
        return any(
            not values.isdisjoint(_listed(headers[name])) for name, values in self.headers.items() if name in headers
        )


@dataclass(frozen=True, slots=True)
class Invariant:
    """What must never happen: a request that has any of these labels, comes from any of these tenants and with a key
    that has any of these tags never leaves the zones of `stay_in`, unless all of these labels that it has are in `mask`
    and what raised them is masked. An empty set of labels, tenants or tags states nothing; one of them is not empty."""

    name: str
    any_label: frozenset[str]
    stay_in: frozenset[str]
    mask: frozenset[str] = frozenset()
    tenant: frozenset[str] = frozenset()
    key_tag: frozenset[str] = frozenset()

    def concerns(self, facts: RequestFacts) -> bool:
        """Whether a request with these facts must stay as it is. A label or a tag more never makes it free."""
        return (
            (not self.any_label or not self.any_label.isdisjoint(facts.labels))
            and (not self.tenant or facts.tenant in self.tenant)
            and (not self.key_tag or not self.key_tag.isdisjoint(facts.key_tags))
        )

    def binds(self, labels: frozenset[str], masked_labels: frozenset[str]) -> bool:
        """Whether a request that this concerns must stay even when it is masked, which leaves `masked_labels`."""
        concerning = self.any_label & labels
        return not concerning or not concerning <= self.mask or not self.any_label.isdisjoint(masked_labels)


UNBOUND = Permit(labels=frozenset(), zones=None)


def permit(invariants: Iterable[Invariant], facts: RequestFacts) -> Permit:
    """Where a request with these facts may go: all invariants that match apply, so more labels never allow more."""
    matching = [invariant for invariant in invariants if invariant.concerns(facts)]
    if not matching:
        return Permit(labels=facts.labels, zones=None)
    because = " and ".join(f'"{invariant.name}"' for invariant in matching)
    zones = frozenset.intersection(*(invariant.stay_in for invariant in matching))
    left = facts.masked_labels
    if left is None:
        return Permit(facts.labels, zones, because)
    binding = [invariant for invariant in matching if invariant.binds(facts.labels, left)]
    masked_zones = frozenset.intersection(*(invariant.stay_in for invariant in binding)) if binding else None
    return Permit(facts.labels, zones, because, masked_zones)


@dataclass(frozen=True, slots=True)
class Require:
    """What ranks candidates first: nothing here removes one. `cost_at_most_nusd` is nano-dollars a request; the times
    are of the 95th percentile, in milliseconds, as in `Slo`. None where it is no matter."""

    slo_met: bool = False
    cost_at_most_nusd: int | None = None
    first_token_at_most_ms: float | None = None
    total_at_most_ms: float | None = None
    per_token_at_most_ms: float | None = None
    asks: tuple[Asked, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        times = self.first_token_at_most_ms, self.total_at_most_ms, self.per_token_at_most_ms
        object.__setattr__(self, "asks", _asks("the rule", *times))


@dataclass(frozen=True, slots=True)
class Rule:
    """What is preferred for the requests that match; `match` is None where all do. `candidates` are names of
    deployments, each once.

    `protected` says what happens where an invariant leaves no candidate: refuse the request, or skip to the next
    rule. It is None only where that cannot be: every set of labels leaves a candidate.

    `weights` (empty: none) draw which candidate goes first, each with a share of the sum, the same for all requests of
    one `sticky` key; the others follow in order. `order_weights` are the terms of `order_by: weighted`: dollars and
    seconds, each times its weight. `slo` is the class of requests that name none. `timeouts`, in seconds, replace the
    deployments', each by itself. `cache` is None where no answer is stored.
    """

    name: str
    match: Match | None
    candidates: tuple[str, ...]
    require: Require | None = None
    unknown: Unknown = "ineligible"
    otherwise: Otherwise = "fastest"
    order_by: OrderBy = "listed"
    protected: Protected | None = None
    because: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    sticky: Sticky = "request"
    order_weights: Mapping[OrderTerm, float] = field(default_factory=dict)
    slo: str | None = None
    timeouts: Mapping[str, float] = field(default_factory=dict)
    cache: Caching | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that loaded without an error: every name in it is defined, every rule can be reached, every protected
    request has a place or an explicit refusal. `hash` is 12 hexadecimal digits over both files' content; secrets have
    no part in it. `patterns` are the operator's own detectors, RE2 text by name. `cache` is for requests that no rule
    decides: those that name a deployment.

    `limits` are those of deployments that have some, by their names.

    `asked_headers` are the headers, names and values, that some rule looks at: no other gets into the facts of a
    request. `thresholds` are the numbers of prompt tokens that some rule compares with, each with the deployment that
    counts them. `shortlist` looks up which of the `rules` may match.
    """

    path: str
    hash: str
    deployments: Deployments
    models: Mapping[str, str]
    labels: tuple[LabelSource, ...]
    invariants: tuple[Invariant, ...]
    slo: Mapping[str, Slo]
    rules: tuple[Rule, ...]
    default: Rule
    patterns: Mapping[str, str] = field(default_factory=dict)
    cache: Caching | None = None
    limits: Mapping[str, DeploymentLimits] = field(default_factory=dict)
    asked_headers: Mapping[str, frozenset[str]] = field(init=False, repr=False, compare=False)
    thresholds: frozenset[tuple[str, int]] = field(init=False, repr=False, compare=False)
    slo_ranks: Mapping[str, int] = field(init=False, repr=False, compare=False)
    shortlist: Shortlist = field(init=False, repr=False, compare=False)
    protects_labels_alone: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        asked: dict[str, frozenset[str]] = {}
        thresholds: set[tuple[str, int]] = set()
        for part in chain.from_iterable(rule.match.parts() for rule in self.rules if rule.match is not None):
            stated = part.stated
            for name, values in stated.get("header", {}).items():
                asked[name] = asked.get(name, frozenset()) | values
            counted_by, tokens = stated.get("counted_by"), stated.get("prompt_tokens")
            if tokens is not None and counted_by is not None:
                sides = tokens.at_least, tokens.below
                thresholds |= {(counted_by, int(side)) for side in sides if side is not None}
        object.__setattr__(self, "asked_headers", asked)
        object.__setattr__(self, "thresholds", frozenset(thresholds))
        object.__setattr__(self, "shortlist", Shortlist([rule.match for rule in self.rules]))
        by_speed = sorted(self.slo.values(), key=lambda slo: slo.first_token_p95_ms or inf)
        object.__setattr__(self, "protects_labels_alone", all(invariant.any_label for invariant in self.invariants))
        object.__setattr__(self, "slo_ranks", {slo.name: rank for rank, slo in enumerate(by_speed)})

    def priority(self, slo: str | None, permit: Permit) -> int:
        """For engines that order their work, the lowest first: the latency class, the strictest before others and none
        last; then what must stay home before what could go elsewhere."""
        rank = len(self.slo_ranks) if slo is None else self.slo_ranks[slo]
        return 2 * rank + (permit.zones is None or permit.masked_zones != frozenset())

    def class_for(self, first_token_ms: float) -> str | None:
        """The strictest class that a first token after so long meets; None where none does."""
        for name in self.slo_ranks:  # the strictest first
            limit = self.slo[name].first_token_p95_ms
            if limit is not None and first_token_ms <= limit:
                return name
        return None

    @property
    def kinds(self) -> frozenset[str]:
        """The detectors that the labels use; the others need not run."""
        return frozenset().union(*(label.detects for label in self.labels))

    @property
    def data_classes(self) -> frozenset[str]:
        """The values that `x-data-class` may have: each label's name, and the values that labels list for that
        header."""
        listed = (label.headers.get(DATA_CLASS_HEADER, frozenset()) for label in self.labels)
        return frozenset({UNSCANNABLE, *(label.name for label in self.labels)}).union(*listed)

    @property
    def masks(self) -> bool:
        """Whether any request may leave masked."""
        return any(invariant.mask for invariant in self.invariants)

    def permit(self, facts: RequestFacts) -> Permit:
        """Where a request with these facts may go: all invariants that match apply, so more labels never allow more."""
        if not facts.labels and self.protects_labels_alone:
            return UNBOUND
        return permit(self.invariants, facts)

    def labels_of(
        self, kinds: frozenset[str], headers: Mapping[str, str], key_tags: frozenset[str], unscannable: bool
    ) -> frozenset[str]:
        """The labels of a request.

        `kinds` are the detectors that fired; `headers` have lower-case names, one sent several times is joined with
        commas; `unscannable` is true where the request holds what cannot be read, or a detector failed.
        """
        raised = {label.name for label in self.labels if label.raised_by(kinds, headers, key_tags)}
        known = {UNSCANNABLE, *(label.name for label in self.labels)}
        raised |= known & _listed(headers.get(DATA_CLASS_HEADER, ""))
        return frozenset(raised | {UNSCANNABLE} if unscannable else raised)

    def headers_of(self, headers: Mapping[str, str]) -> frozenset[tuple[str, str]]:
        """What of a request's headers (lower-case names, one sent several times joined with commas) some rule looks
        at. A header that is a list has each of its items."""
        if not self.asked_headers:
            return frozenset()
        return frozenset(
            (name, value)
            for name, values in self.asked_headers.items()
            if name in headers
            for value in values & _listed(headers[name])
        )

    def unknown_data_class(self, headers: Mapping[str, str]) -> str | None:
        """A sentence for the caller where `x-data-class` has a value that no label knows, or none at all; None
        otherwise.

        A class that is not understood is no reason to send the request anywhere. The value itself is not repeated.
        """
        sent = headers.get(DATA_CLASS_HEADER)
        if sent is None:
            return None
        known = self.data_classes
        classes = _listed(sent)
        if classes and classes <= known:
            return None
        what = "has a value that this policy does not know" if classes else "has no value"
        return f"the header {DATA_CLASS_HEADER} {what}; known are: {', '.join(sorted(known))}"

    def rule_named(self, name: str) -> Rule | None:
        """The rule of that name, the default included."""
        return next((rule for rule in (*self.rules, self.default) if rule.name == name), None)

    def with_deployment(self, deployment: Deployment) -> Policy:
        """The same policy with one deployment replaced, such as by what the running engine reports of itself.
        KeyError if it has none such."""
        if deployment.name not in self.deployments:
            raise KeyError(deployment.name)
        return replace(self, deployments=MappingProxyType({**self.deployments, deployment.name: deployment}))


def _listed(value: str) -> set[str]:
    """The items of a header's value: separated by commas, case and empty ones (RFC 9110, 5.6.1) ignored."""
    return {item for part in value.split(",") if (item := part.strip().lower())}
