"""A decision told in full: every rule that was looked at, every candidate with its prediction, every rejection with its
reason. Pure.

What `POST /v1/route` answers and `hybridgate policy explain` prints; both are made from the same `decide`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gateway.decision import Candidate, Decision
from gateway.estimate import likely_bill
from gateway.policy import AUTO, Policy
from gateway.refusal import refusal
from gateway.snapshot import Snapshot
from gateway.types import RequestFacts, usd


def rules_tried(policy: Policy, facts: RequestFacts, snapshot: Snapshot, decision: Decision) -> list[tuple[str, str]]:
    """Each rule down to the one that decided, with why it did not apply (`matched` for the last)."""
    tried: list[tuple[str, str]] = []
    if policy.models.get(facts.model, facts.model) == AUTO:
        for rule in policy.rules:
            if rule.name == decision.rule:
                break
            why_not = rule.match.why_not(facts, policy.deployments, snapshot) if rule.match is not None else None
            tried.append((rule.name, why_not or "matched, but protected requests skip it"))
    return [*tried, (decision.rule, "matched")]


def explanation(policy: Policy, facts: RequestFacts, snapshot: Snapshot, decision: Decision) -> dict[str, Any]:
    """The decision as a JSON document. Quotes nothing of the request."""
    told: dict[str, Any] = {
        "policy": {"path": policy.path, "hash": decision.policy_hash},
        "rule": decision.rule,
        "because": decision.because,
        "labels": sorted(decision.labels),
        "slo": decision.slo,
        "priority": decision.priority,
        "late": decision.late,
        "cache": None if decision.caching is None else asdict(decision.caching),
        "prompt_tokens": {"estimate": facts.prompt.estimate, "at_most": facts.prompt.bound, **facts.prompt.exact},
        "deployment": decision.candidates[0].deployment if decision.candidates else None,
        "rules": [
            {"rule": rule, "outcome": outcome} for rule, outcome in rules_tried(policy, facts, snapshot, decision)
        ],
        "candidates": [
            {
                "deployment": candidate.deployment,
                "zone": policy.deployments[candidate.deployment].zone,
                "cost_usd": _dollars(candidate.cost_nusd),
                "bill_usd": _dollars(likely_bill(policy.deployments[candidate.deployment], facts)),
                "congestion_usd": _dollars(candidate.congestion_nusd),
                "engine": _engine(candidate, snapshot),
                "first_token_p95_ms": candidate.first_token_ms,
                "per_token_p95_ms": candidate.per_token_ms,
                "total_p95_ms": candidate.total_ms,
                "meets_requirement": candidate.meets,
                "note": candidate.note,
            }
            for candidate in decision.candidates
        ],
        "rejections": [
            {"deployment": rejection.deployment, "gate": rejection.gate, "reason": rejection.reason}
            for rejection in decision.rejections
        ],
    }
    if not decision.candidates:
        error = refusal(decision)
        told["refusal"] = {"status": error.status, "code": error.code, "message": error.message}
    return told


def _engine(candidate: Candidate, snapshot: Snapshot) -> dict[str, float | None] | None:
    """What the request takes of an engine, and the two prices of its seconds; None where it is none that says."""
    if candidate.engine_s is None:
        return None
    status = snapshot.deployments[candidate.deployment]
    return {
        "seconds": candidate.engine_s,
        "second_usd": _dollars(round(status.engine_second_nusd)),
        "dearest_second_usd": _dollars(round(status.dearest_nusd)),
    }


def _dollars(nusd: int | None) -> float | None:
    return None if nusd is None else float(usd(nusd))
