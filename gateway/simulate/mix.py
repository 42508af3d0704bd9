"""What a trace leaves open: which requests are private, of which latency class they are, how fast time passes.

Owns the draws that turn rows into requests with the facts that a decision looks at. Refuses to overrule the trace: a
row that names its class or its labels keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from gateway.policy import Policy
from gateway.simulate.trace import Trace, TraceError
from gateway.types import UNSCANNABLE, RequestFacts, TokenCount


@dataclass(frozen=True, slots=True)
class Mix:
    """`private` is the share of requests that carry `private_label`; `classes` are shares of the latency classes (those
    that are left of 1 name none); a `time_scale` of 2 lets everything arrive twice as fast; `limit` keeps the first
    requests alone."""

    private: float = 0.0
    private_label: str = ""
    classes: Mapping[str, float] = field(default_factory=dict)
    time_scale: float = 1.0
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One request to simulate. `facts` are what a decision may look at, `output_tokens` what only the world knows.
    `draw` is the decision's chance."""

    index: int
    arrival_s: float
    facts: RequestFacts
    output_tokens: int
    draw: float

    @property
    def prompt_tokens(self) -> int:
        return self.facts.prompt.estimate


def private_label(policy: Policy) -> str:
    """The label that makes a request private under this policy: the first that the first invariant names. Empty where
    none does."""
    bound = [label for invariant in policy.invariants for label in sorted(invariant.any_label - {UNSCANNABLE})]
    return bound[0] if bound else ""


def requests(trace: Trace, mix: Mix, policy: Policy) -> tuple[Request, ...]:
    """The requests of a trace, in order of arrival. Raises TraceError where a row, or the mix, names a class or a label
    that the policy does not know."""
    _check(mix, policy)
    chance = Random(mix.seed)  # noqa: S311 - a seeded draw is what is wanted
    labels = {label.name for label in policy.labels} | {UNSCANNABLE}
    made = []
    for index, row in enumerate(trace.rows[: mix.limit]):
        # Drawn for every row, used or not, so that the same request has the same luck under every option.
        private, by_class, draw = chance.random(), chance.random(), chance.random()
        slo = row.slo if row.slo is not None else _drawn(mix.classes, by_class)
        if slo is not None and slo not in policy.slo:
            known = ", ".join(policy.slo) or "none"
            raise TraceError(
                f'{trace.name}: request {index + 1}: the policy has no latency class "{slo}"; it has {known}'
            )
        carried = row.labels or (frozenset({mix.private_label}) if private < mix.private else frozenset())
        if unknown := sorted(carried - labels):
            known = ", ".join(sorted(labels))
            raise TraceError(
                f'{trace.name}: request {index + 1}: the policy has no label "{unknown[0]}"; it has {known}'
            )
        facts = RequestFacts(
            model=row.model,
            tenant=row.tenant,
            tags=row.tags,
            labels=carried,
            prompt=TokenCount(row.prompt_tokens, row.prompt_tokens),
            max_tokens=row.max_tokens,
            stream=row.stream,
            slo=slo,
            key_id=row.tenant,
        )
        output = row.output_tokens if row.max_tokens is None else min(row.output_tokens, row.max_tokens)
        made.append(Request(index, row.arrival_s / mix.time_scale, facts, output, draw))
    return tuple(made)


def _check(mix: Mix, policy: Policy) -> None:
    if mix.private and not mix.private_label:
        raise TraceError("no invariant of the policy protects a label, so no request can be private")
    for name in mix.classes:
        if name not in policy.slo:
            raise TraceError(f'the policy has no latency class "{name}"; it has {", ".join(policy.slo) or "none"}')
    if sum(mix.classes.values()) > 1 + 1e-9:
        raise TraceError("the shares of the latency classes are more than 1 together")


def _drawn(classes: Mapping[str, float], draw: float) -> str | None:
    for name, share in classes.items():
        if draw < share:
            return name
        draw -= share
    return None
