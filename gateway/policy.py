"""What a compiled policy is: labels, invariants, SLO classes, rules, and the questions that a request asks of them.

Owns matching and the permit. Refuses text: YAML becomes these types in `policyfile`, which reports every error; what
is constructed here is taken to be valid. Also refuses clocks and measurements: what a deployment does now is the
snapshot's, and `routing` brings both together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from gateway.types import UNSCANNABLE, Capability, Deployment, Permit, RequestFacts, Snapshot, Timeouts

DATA_CLASS_HEADER = "x-data-class"
DEFAULT_RULE = "default"
AUTO = "auto"

Unknown = Literal["eligible", "ineligible"]
Otherwise = Literal["fastest", "cheapest", "reject"]
OrderBy = Literal["listed", "marginal_cost", "first_token", "total_latency", "weighted"]
OrderTerm = Literal["marginal_cost", "first_token", "total_latency"]
Sticky = Literal["request", "key", "tenant"]
Protected = Literal["refuse", "skip"]

Deployments = Mapping[str, Deployment]


@dataclass(frozen=True, slots=True)
class Slo:
    """A latency class that a caller names: of 100 answers 95 have their first token within `first_token_p95_ms`, are
    whole within `total_p95_ms`, and take at most `per_token_p95_ms` for each token after the first. Milliseconds; None
    where the class does not say."""

    name: str
    first_token_p95_ms: float | None
    total_p95_ms: float | None = None
    per_token_p95_ms: float | None = None


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
class Condition:
    """One key of `when`: the test, and the sentence that says why a request fails it. The sentence quotes the policy
    alone."""

    holds: Callable[[RequestFacts, Deployments, Snapshot], bool]
    unmet: str


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of a rule. All stated ones hold or the rule does not apply; within a set any one item is enough.

    An empty set and None state nothing. `conditions` is compiled from the other fields once, and is all that
    `matches` and `why_not` look at.
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
    conditions: tuple[Condition, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(_compiled(self)))

    def matches(self, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> bool:
        """Whether all conditions hold."""
        return all(condition.holds(facts, deployments, snapshot) for condition in self.conditions)

    def why_not(self, facts: RequestFacts, deployments: Deployments, snapshot: Snapshot) -> str | None:
        """The conditions that do not hold, as one sentence; None where the request matches."""
        unmet = [condition.unmet for condition in self.conditions if not condition.holds(facts, deployments, snapshot)]
        return "; ".join(unmet) or None

    @property
    def needs(self) -> frozenset[Capability]:
        """What every request that matches asks of a deployment."""
        asked: dict[Capability, bool | None] = {"tools": self.tools, "images": self.images, "schema": self.schema}
        return frozenset(capability for capability, wanted in asked.items() if wanted)

    @property
    def sets(self) -> Mapping[str, frozenset[str]]:
        """The stated conditions of which any one item is enough, by key."""
        every = {
            "any_label": self.any_label,
            "does_not_fit": self.does_not_fit,
            "slo": self.slo,
            "tenant": self.tenant,
            "key_tag": self.key_tag,
            "tag": self.tag,
        }
        return {key: items for key, items in every.items() if items}

    @property
    def flags(self) -> Mapping[str, bool]:
        """The stated conditions that are true or false, by key."""
        every = {"stream": self.stream, "tools": self.tools, "images": self.images, "schema": self.schema}
        return {key: wanted for key, wanted in every.items() if wanted is not None}

    def covers(self, other: Match) -> bool:
        """Whether every request that `other` matches is matched by this one as well, as far as the conditions alone
        tell."""
        sets, flags = other.sets, other.flags
        return all(key in sets and sets[key] <= items for key, items in self.sets.items()) and all(
            flags.get(key) is wanted for key, wanted in self.flags.items()
        )


def _compiled(match: Match) -> Iterable[Condition]:
    """The stated conditions, the cheap ones first: `does_not_fit` counts, the others compare."""
    if (stream := match.stream) is not None:
        yield Condition(lambda f, _d, _s: f.stream is stream, f"the request is {'not ' if stream else ''}a stream")
    if (tools := match.tools) is not None:
        yield Condition(lambda f, _d, _s: f.tools is tools, f"the request {'offers no' if tools else 'offers'} tools")
    if (images := match.images) is not None:
        yield Condition(lambda f, _d, _s: f.images is images, f"the request {'holds no' if images else 'holds'} images")
    if (schema := match.schema) is not None:
        yield Condition(
            lambda f, _d, _s: f.schema is schema, f"the request {'asks for no' if schema else 'asks for a'} schema"
        )
    if slo := match.slo:
        yield Condition(lambda f, _d, _s: f.slo in slo, f"the request's SLO class is not {_either(slo)}")
    if tenant := match.tenant:
        yield Condition(lambda f, _d, _s: f.tenant in tenant, f"the tenant is not {_either(tenant)}")
    if tag := match.tag:
        yield Condition(lambda f, _d, _s: not tag.isdisjoint(f.tags), f"the request has no tag {_either(tag)}")
    if key_tag := match.key_tag:
        yield Condition(lambda f, _d, _s: not key_tag.isdisjoint(f.key_tags), f"the key has no tag {_either(key_tag)}")
    if any_label := match.any_label:
        unmet = f"the request has no label {_either(any_label)}"
        yield Condition(lambda f, _d, _s: not any_label.isdisjoint(f.labels), unmet)
    if names := tuple(sorted(match.does_not_fit)):
        yield Condition(
            lambda f, d, _s: any(not d[name].fits(f.prompt, f.max_tokens) for name in names),
            f"the request fits {' and '.join(names)}",
        )


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))


@dataclass(frozen=True, slots=True)
class Require:
    """What ranks candidates first: nothing here removes one. `cost_at_most_nusd` is nano-dollars a request, None
    where cost is no matter."""

    slo_met: bool = False
    cost_at_most_nusd: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What is preferred for the requests that match; `match` is None where all do. `candidates` are names of
    deployments, each once.

    `protected` says what happens where an invariant leaves no candidate: refuse the request, or skip to the next
    rule. It is None only where that cannot be: every set of labels leaves a candidate.

    `weights` (empty: none) draw which candidate goes first, each with a share of the sum, the same for all requests of
    one `sticky` key; the others follow in order. `order_weights` are the terms of `order_by: weighted`: dollars and
    seconds, each times its weight. `slo` is the class of requests that name none. `timeouts` replace the deployments'.
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
    timeouts: Timeouts | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that loaded without an error: every name in it is defined, every rule can be reached, every protected
    request has a place or an explicit refusal. `hash` is 12 hexadecimal digits over both files' content; secrets have
    no part in it."""

    path: str
    hash: str
    deployments: Deployments
    models: Mapping[str, str]
    labels: tuple[LabelSource, ...]
    invariants: tuple[Invariant, ...]
    slo: Mapping[str, Slo]
    rules: tuple[Rule, ...]
    default: Rule

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
