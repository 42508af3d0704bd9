"""The decision: which deployments may answer a request, in which order, and why the others may not. Pure.

Owns the order of the gates (caller, zone, capability, window, availability, cost cap), the ranking by `require` and
`order_by`, the failover chain, and what an empty chain means for the caller. Refuses clocks, chance and sockets: they
come in with the snapshot.

The server, `policy explain` and the tests call the same `decide`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from gateway.errors import (
    BadRequest,
    ContextLengthExceeded,
    CostCapExceeded,
    DeadlineExceeded,
    Forbidden,
    GatewayError,
    NoCandidate,
    ProtectedRefused,
    UnknownModel,
)
from gateway.estimate import first_token_ms, likely_cost, most_cost
from gateway.policy import AUTO, Policy, Rule
from gateway.types import (
    Attempt,
    Candidate,
    Capability,
    Decision,
    Deployment,
    Gate,
    Outcome,
    Permit,
    Rejection,
    RequestFacts,
    Snapshot,
    usd,
)

# Which gate a deployment failed says how far it came; the one that came furthest says what the caller is told (the
# statuses' order in reverse).
_GATES: tuple[Gate, ...] = (
    "unconfigured",
    "caller",
    "zone",
    "capability",
    "window",
    "cost_cap",
    "require",
    "available",
)


def decide(policy: Policy, facts: RequestFacts, snapshot: Snapshot) -> Decision:
    """The ranked candidates for these facts now, each gate's rejections beside them. Raises `UnknownModel` where
    `facts.model` names nothing."""
    permit = policy.permit(facts)
    for rule in matching_rules(policy, facts, snapshot):
        if rule.protected == "skip" and not any(permit.passage(policy.deployments[n].zone) for n in rule.candidates):
            continue
        candidates, rejections = _weigh(policy, rule, facts, permit, snapshot)
        return Decision(rule.name, rule.because, candidates, rejections, facts.labels, policy.hash)
    return Decision("default", "every rule was skipped", (), (), facts.labels, policy.hash)


def matching_rules(policy: Policy, facts: RequestFacts, snapshot: Snapshot) -> Iterator[Rule]:
    """The rules to try, in order: those that match for `auto`; from a named rule on; or a rule of its own for a pinned
    deployment."""
    target = policy.models.get(facts.model, facts.model)
    if target in policy.deployments:
        yield Rule(name=target, match=None, candidates=(target,), because="the request names this deployment")
        return
    rules = policy.rules
    if target != AUTO:
        names = [rule.name for rule in rules]
        if target == policy.default.name:
            rules = ()
        elif target in names:
            entered = names.index(target)
            yield rules[entered]
            rules = rules[entered + 1 :]
        else:
            raise UnknownModel(
                "the model is not known here: GET /v1/models lists those that are, `auto` among them", param="model"
            )
    for rule in rules:
        if rule.match is None or rule.match.matches(facts, policy.deployments, snapshot):
            yield rule
    yield policy.default


def static_gate(deployment: Deployment, facts: RequestFacts, permit: Permit) -> Rejection | None:
    """The first gate that removes the deployment whatever the time and the fleet's state, or None."""
    name = deployment.name
    if facts.deployments is not None and name not in facts.deployments:
        return Rejection(name, "caller", "this key may not use it")
    if permit.passage(deployment.zone) is None:
        return Rejection(name, "zone", f"zone {deployment.zone} is outside of what {permit.because} permits")
    if facts.tools or facts.images or facts.schema:
        for capability in _needed(facts):
            if capability not in deployment.capabilities:
                return Rejection(name, "capability", f"does not support {capability}")
    if not deployment.fits(facts.prompt, facts.max_tokens):
        prompt = facts.prompt.at_most(deployment.tokenizer)
        output = deployment.output_tokens(facts.max_tokens)
        reason = f"{prompt} prompt and {output} output tokens do not fit its window of {deployment.window}"
        return Rejection(name, "window", reason)
    return None


def _needed(facts: RequestFacts) -> Iterator[Capability]:
    if facts.tools:
        yield "tools"
    if facts.images:
        yield "images"
    if facts.schema:
        yield "schema"


def _gate(deployment: Deployment, facts: RequestFacts, permit: Permit, snapshot: Snapshot) -> Rejection | None:
    rejection = static_gate(deployment, facts, permit)
    if rejection is not None:
        return rejection
    if deployment.unavailable is not None:
        return Rejection(deployment.name, "unconfigured", deployment.unavailable)
    status = snapshot.deployments[deployment.name]
    if status.down is not None:
        return Rejection(deployment.name, "available", status.down, status.retry_after)
    if facts.max_cost_nusd is not None:
        cost = most_cost(deployment, facts)
        if cost is None or cost > facts.max_cost_nusd:
            most = "an unknown amount" if cost is None else f"up to {usd(cost)} USD"
            return Rejection(
                deployment.name, "cost_cap", f"may cost {most}, above the cap of {usd(facts.max_cost_nusd)} USD"
            )
    return None


def _weigh(
    policy: Policy, rule: Rule, facts: RequestFacts, permit: Permit, snapshot: Snapshot
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    for name in rule.candidates:
        deployment = policy.deployments[name]
        rejection = _gate(deployment, facts, permit, snapshot)
        if rejection is None:
            candidate = _predicted(policy, rule, deployment, facts, snapshot)
            candidates.append(candidate if permit.allows(deployment.zone) else _masked(candidate))
        else:
            rejections.append(rejection)
    if rule.match is not None:  # why a rule for long prompts matched belongs to why nothing else may answer
        for name in sorted(rule.match.does_not_fit.difference(rule.candidates)):
            rejection = static_gate(policy.deployments[name], facts, permit)
            rejections += [rejection] if rejection is not None else []
    if rule.require is not None and rule.otherwise == "reject":
        rejections += [Rejection(c.deployment, "require", c.note) for c in candidates if not c.meets]
        candidates = [candidate for candidate in candidates if candidate.meets]
    return _ranked(candidates, rule), tuple(rejections)


def _predicted(
    policy: Policy, rule: Rule, deployment: Deployment, facts: RequestFacts, snapshot: Snapshot
) -> Candidate:
    cost = likely_cost(deployment, facts)
    latency = first_token_ms(snapshot.deployments[deployment.name])
    if rule.require is None:
        return Candidate(deployment.name, cost, latency, meets=True)
    unmet = []
    cap = rule.require.cost_at_most_nusd
    if cap is not None and (cost > cap if cost is not None else rule.unknown == "ineligible"):
        unmet.append(f"cost {'unknown' if cost is None else usd(cost) + ' USD'}, required at most {usd(cap)} USD")
    slo = policy.slo[facts.slo] if rule.require.slo_met and facts.slo is not None else None
    limit = slo.first_token_p95_ms if slo is not None else None
    if (
        slo is not None
        and limit is not None
        and (latency > limit if latency is not None else rule.unknown == "ineligible")
    ):
        measured = "not measured" if latency is None else f"{latency:.0f} ms"
        unmet.append(f"first token p95 {measured}, {slo.name} requires {limit:g} ms")
    return Candidate(deployment.name, cost, latency, not unmet, "; ".join(unmet))


def _masked(candidate: Candidate) -> Candidate:
    """The candidate with a note that it gets the request masked."""
    return replace(candidate, note="; ".join(filter(None, ("masked", candidate.note))))


def _ranked(candidates: list[Candidate], rule: Rule) -> tuple[Candidate, ...]:
    """Those that meet the rule's requirement first, in its order; the rest as `otherwise` says. Ties keep the listed
    order."""
    if len(candidates) < 2:
        return tuple(candidates)
    otherwise = "marginal_cost" if rule.otherwise == "cheapest" else "first_token"

    def key(item: tuple[int, Candidate]) -> tuple[bool, float, int]:
        index, candidate = item
        order = rule.order_by if candidate.meets else otherwise
        if order == "listed":
            value: float | None = 0.0
        else:
            value = candidate.cost_nusd if order == "marginal_cost" else candidate.first_token_ms
        return (not candidate.meets, inf if value is None else value, index)

    return tuple(candidate for _, candidate in sorted(enumerate(candidates), key=key))


def next_attempt(decision: Decision, outcomes: Sequence[Outcome]) -> Attempt:
    """The next deployment of the chain that has not been tried. Raises what the caller is told when none is left."""
    tried = {outcome.attempt.deployment for outcome in outcomes}
    for candidate in decision.candidates:
        if candidate.deployment not in tried:
            return Attempt(candidate.deployment, len(outcomes) + 1)
    raise refusal(decision, outcomes)


def refusal(decision: Decision, outcomes: Sequence[Outcome] = ()) -> GatewayError:
    """What an exhausted chain means for the caller: the deployment that came furthest through the gates sets the
    status, all reasons are told."""
    reasons = [f"{o.attempt.deployment}: {o.reason}" for o in outcomes]
    failed = {outcome.attempt.deployment for outcome in outcomes}
    reasons += [f"{r.deployment}: {r.reason}" for r in decision.rejections if r.deployment not in failed]
    detail = f'rule "{decision.rule}": ' + ("; ".join(reasons) or "it has no candidates for this request")
    retry_after = min((r.retry_after for r in decision.rejections if r.retry_after > 0), default=1.0)
    if outcomes:
        if all(outcome.timed_out for outcome in outcomes):
            return DeadlineExceeded(f"no deployment answered in time: {detail}")
        return NoCandidate(f"every permitted deployment failed: {detail}", retry_after=retry_after)
    gates: list[Gate] = [rejection.gate for rejection in decision.rejections]
    furthest = max(gates, key=_GATES.index) if gates else "zone"
    told, error, param = _REFUSALS.get(furthest, _UNAVAILABLE)
    return error(f"{told}: {detail}", param=param, retry_after=retry_after if error is NoCandidate else None)


_Told = tuple[str, type[GatewayError], str | None]
_UNAVAILABLE: _Told = ("no permitted deployment is available", NoCandidate, None)
_REFUSALS: Mapping[Gate, _Told] = {
    "caller": ("no deployment of this rule is allowed to this key", Forbidden, None),
    "zone": ("the request is protected and no permitted deployment can take it", ProtectedRefused, None),
    "capability": ("no permitted deployment supports what the request needs", BadRequest, None),
    "window": ("the request fits no permitted window", ContextLengthExceeded, "messages"),
    "cost_cap": ("no permitted deployment stays below the cost cap", CostCapExceeded, "x-hybridgate-max-cost-usd"),
}
