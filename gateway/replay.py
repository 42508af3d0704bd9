"""A log of decisions, decided again by another policy: where requests would have gone instead, and what of it.

Owns the comparison and its sums. Refuses files (replaylog.py reads them) and guesses: what the log does not hold is
counted as unknown. Pure.

Both sides of a comparison are about the same request in the same state of the fleet. Its tokens are those that were
really used, so that costs differ by prices alone (and by what was cached, which it is not elsewhere); latencies are
predictions on both sides. A deployment that had failed this request is passed over, since it would have failed it
again. Labels are those of the log, since the text is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gateway.decision import Candidate, Decision
from gateway.errors import GatewayError
from gateway.estimate import likely_bill
from gateway.facts import knows
from gateway.policy import Policy
from gateway.record import Recorded
from gateway.refusal import refusal
from gateway.routing import decide
from gateway.types import ON_PREMISES, Attempt, Outcome


@dataclass(frozen=True, slots=True)
class Went:
    """Where a request went. `deployment` is None where it was refused, and `refused` the status and code of that. What
    is None else is not known."""

    deployment: str | None
    zone: str | None = None
    refused: str = ""
    rule: str = ""
    cost_nusd: int | None = None
    first_token_ms: float | None = None
    masked: bool = False

    @property
    def destination(self) -> str:
        """The deployment, or that there was none."""
        return self.deployment or f"refused: {self.refused}"

    @property
    def at_home(self) -> bool:
        return self.zone == ON_PREMISES


@dataclass(frozen=True, slots=True)
class Replayed:
    """One request under both policies."""

    decision_id: str
    labels: frozenset[str]
    before: Went
    after: Went

    @property
    def changed(self) -> bool:
        """Whether it would have gone elsewhere."""
        return self.before.destination != self.after.destination


def replayed(record: Recorded, policy: Policy) -> Replayed:
    """The recorded request, decided again. The policy's deployments count as configured but for those that the record
    says were not."""
    return Replayed(record.decision_id, record.facts.labels, _before(record), _after(record, policy))


def _before(record: Recorded) -> Went:
    refused = "" if record.deployment is not None else f"{record.status} {record.outcome}"
    predicted = record.predicted_first_token_ms
    return Went(record.deployment, record.zone, refused, record.rule, record.cost_nusd, predicted, masked=record.masked)


def _after(record: Recorded, policy: Policy) -> Went:
    facts = record.facts
    if not knows(policy, facts.model):
        return Went(None, refused="404 model_not_found")
    if facts.slo is not None and facts.slo not in policy.slo:
        return Went(None, refused="400 invalid_value")
    for name, gate in record.rejected.items():
        if gate == "unconfigured" and name in policy.deployments:
            deployment = replace(policy.deployments[name], unavailable="it was not configured")
            policy = policy.with_deployment(deployment)
    try:
        decision = decide(policy, facts, record.snapshot_of(policy.deployments))
    except GatewayError as error:
        return Went(None, refused=f"{error.status} {error.code}")
    first = next((c for c in decision.candidates if c.deployment not in record.failed), None)
    if first is None:
        return Went(None, refused=_refused(decision, record), rule=decision.rule)
    deployment = policy.deployments[first.deployment]
    return Went(
        first.deployment,
        deployment.zone,
        rule=decision.rule,
        cost_nusd=_cost(record, policy, first),
        first_token_ms=first.first_token_ms,
        masked=policy.permit(facts).passage(deployment.zone) == "masked",
    )


def _refused(decision: Decision, record: Recorded) -> str:
    names = [candidate.deployment for candidate in decision.candidates]
    outcomes = [Outcome(Attempt(name, number), "it had failed") for number, name in enumerate(names, 1)]
    error = refusal(decision, outcomes)
    return f"{error.status} {error.code}"


def _cost(record: Recorded, policy: Policy, candidate: Candidate) -> int | None:
    """What the bill would have said: for the tokens that were used, or for those that are likely where nobody
    answered."""
    deployment = policy.deployments[candidate.deployment]
    if record.stored:
        return 0  # it is as well stored under another policy
    if record.usage is None or deployment.bill is None:
        return likely_bill(deployment, record.facts)
    same = candidate.deployment == record.deployment
    return deployment.bill.cost(record.usage if same else replace(record.usage, cached_tokens=0))


@dataclass(slots=True)
class Side:
    """Sums over the requests under one policy."""

    answered: int = 0
    refused: int = 0
    at_home: int = 0
    labelled_away: int = 0
    labelled_masked: int = 0

    def add(self, went: Went, labels: frozenset[str]) -> None:
        if went.deployment is None:
            self.refused += 1
            return
        self.answered += 1
        self.at_home += went.at_home
        if labels and not went.at_home:
            self.labelled_masked += went.masked
            self.labelled_away += not went.masked

    @property
    def local_share(self) -> float | None:
        """Of the answered requests, those that were answered on premises."""
        return self.at_home / self.answered if self.answered else None


@dataclass(slots=True)
class Flow:
    """The requests that went from one destination to another. Costs and latencies are sums over those for which both
    sides are known."""

    requests: int = 0
    costed: int = 0
    cost_before: int = 0
    cost_after: int = 0
    timed: int = 0
    first_token_before: float = 0.0
    first_token_after: float = 0.0

    def add(self, one: Replayed) -> None:
        self.requests += 1
        before, after = one.before, one.after
        if before.cost_nusd is not None and after.cost_nusd is not None:
            self.costed += 1
            self.cost_before += before.cost_nusd
            self.cost_after += after.cost_nusd
        if before.first_token_ms is not None and after.first_token_ms is not None:
            self.timed += 1
            self.first_token_before += before.first_token_ms
            self.first_token_after += after.first_token_ms


@dataclass(slots=True)
class Sums:
    """What a replay comes to. `examples` are the first changes, at most `most_examples`; `unknown_labels` counts
    requests with labels that the policy does not define, which therefore protect nothing there."""

    most_examples: int = 20
    requests: int = 0
    changed: int = 0
    before: Side = field(default_factory=Side)
    after: Side = field(default_factory=Side)
    flows: dict[tuple[str, str], Flow] = field(default_factory=dict)
    examples: list[Replayed] = field(default_factory=list)
    unknown_labels: dict[str, int] = field(default_factory=dict)
    policies: dict[str, int] = field(default_factory=dict)

    def add(self, record: Recorded, one: Replayed, known_labels: frozenset[str]) -> None:
        """Count one request."""
        self.requests += 1
        self.policies[record.policy_hash] = self.policies.get(record.policy_hash, 0) + 1
        self.before.add(one.before, one.labels)
        self.after.add(one.after, one.labels)
        key = (one.before.destination, one.after.destination)
        self.flows.setdefault(key, Flow()).add(one)
        for label in one.labels - known_labels:
            self.unknown_labels[label] = self.unknown_labels.get(label, 0) + 1
        if one.changed:
            self.changed += 1
            if len(self.examples) < self.most_examples:
                self.examples.append(one)

    @property
    def whole(self) -> Flow:
        """All flows as one."""
        flow = Flow()
        for part in self.flows.values():
            for name in Flow.__dataclass_fields__:
                setattr(flow, name, getattr(flow, name) + getattr(part, name))
        return flow

    @property
    def cost_increase(self) -> float | None:
        """By which share the costs grow, over the requests whose cost is known on both sides; None where there is
        none, or nothing was paid before."""
        whole = self.whole
        return (whole.cost_after - whole.cost_before) / whole.cost_before if whole.cost_before else None
