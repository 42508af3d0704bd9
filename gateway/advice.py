"""What is allowed in a policy and probably not meant. Pure.

Owns warnings: sentences about a policy that loads. What is an error is refused at load, by `policyfile`.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.policy import Policy, Rule
from gateway.types import ON_PREMISES, UNSCANNABLE


def advice(policy: Policy) -> list[str]:
    """Everything worth a second look, in the policy's order."""
    return [*_labels(policy), *_zones(policy), *_rules(policy), *_deployments(policy)]


def _labels(policy: Policy) -> Iterator[str]:
    protected = frozenset[str]().union(*(invariant.any_label for invariant in policy.invariants))
    asked = frozenset[str]().union(*(_labels_asked(rule) for rule in policy.rules))
    for label in policy.labels:
        if label.name not in protected | asked:
            yield f'label "{label.name}" protects nothing: no invariant and no rule names it'
    if policy.labels and policy.invariants and UNSCANNABLE not in protected:
        yield f'no invariant names "{UNSCANNABLE}": pictures, files and what a detector cannot read may go anywhere'
    if _leaves(policy) and not policy.invariants:
        yield "there is no invariant: every request may go to every deployment"


def _leaves(policy: Policy) -> bool:
    return any(deployment.zone != ON_PREMISES for deployment in policy.deployments.values())


def _labels_asked(rule: Rule) -> frozenset[str]:
    if rule.match is None:
        return frozenset()
    return frozenset[str]().union(*(part.any_label for part in rule.match.parts()))


def _zones(policy: Policy) -> Iterator[str]:
    zones = {deployment.zone for deployment in policy.deployments.values()}
    for invariant in policy.invariants:
        if zones.isdisjoint(invariant.stay_in) and not invariant.mask:
            named = " and ".join(sorted(invariant.stay_in))
            yield f'invariant "{invariant.name}": no deployment is in {named}, so what it protects is refused'


def _rules(policy: Policy) -> Iterator[str]:
    for rule in (*policy.rules, policy.default):
        subject = "default" if rule is policy.default else f'rule "{rule.name}"'
        candidates = [policy.deployments[name] for name in rule.candidates]
        by_cost = rule.order_by == "marginal_cost" or rule.order_weights.get("marginal_cost")
        capped = rule.require is not None and rule.require.cost_at_most_nusd is not None
        unpriced = [d.name for d in candidates if d.price is None]
        if unpriced and (by_cost or capped):
            yield f"{subject} compares costs, and nobody knows what {' and '.join(unpriced)} costs: it comes last"
        if all(deployment.unavailable is not None for deployment in candidates):
            yield f"{subject}: none of its candidates is configured here"


def _deployments(policy: Policy) -> Iterator[str]:
    named = {name for rule in (*policy.rules, policy.default) for name in rule.candidates}
    for name in policy.deployments:
        if name not in named:
            yield f"deployment {name} is no rule's candidate: only requests that name it reach it"
