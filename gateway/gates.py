"""The gates: what removes a deployment from a request's candidates, each with its reason. Pure.

Owns their order: caller, zone, capability, window; then what a moment changes: not configured, down, the caller's own
cost cap. Refuses preferences: what merely ranks is routing's.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.decision import Gate, Rejection
from gateway.estimate import most_cost
from gateway.snapshot import DeploymentStatus
from gateway.types import Capability, Deployment, Permit, RequestFacts, usd

# Which gate a deployment failed says how far it came; the one that came furthest says what the caller is told (the
# statuses' order in reverse).
GATES: tuple[Gate, ...] = (
    "unconfigured",
    "caller",
    "zone",
    "capability",
    "window",
    "cost_cap",
    "require",
    "limit",
    "available",
)


def static_gate(deployment: Deployment, facts: RequestFacts, permit: Permit) -> Rejection | None:
    """The first gate that removes the deployment whatever the time and the fleet's state, or None."""
    name = deployment.name
    if facts.deployments is not None and name not in facts.deployments:
        return Rejection(name, "caller", "this key may not use it")
    if permit.zones is not None and permit.passage(deployment.zone) is None:
        return Rejection(name, "zone", f"zone {deployment.zone} is outside of what {permit.because} permits")
    if facts.tools or facts.images or facts.schema:
        for capability in _needed(facts):
            if capability not in deployment.capabilities:
                return Rejection(name, "capability", f"does not support {capability}")
    if deployment.window is not None and not deployment.fits(facts.prompt, facts.max_tokens):
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


def gate(deployment: Deployment, facts: RequestFacts, permit: Permit, status: DeploymentStatus) -> Rejection | None:
    """The first gate that removes the deployment now, or None."""
    rejection = static_gate(deployment, facts, permit)
    if rejection is not None:
        return rejection
    if deployment.unavailable is not None:
        return Rejection(deployment.name, "unconfigured", deployment.unavailable)
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
