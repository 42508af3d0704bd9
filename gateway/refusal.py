"""What an exhausted chain means for the caller: an error that tells every reason. Pure.

Owns the step from rejections and failed attempts to a status. Refuses to choose: that is routing's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.decision import Decision, Gate
from gateway.errors import (
    BadRequest,
    ContextLengthExceeded,
    CostCapExceeded,
    DeadlineExceeded,
    Forbidden,
    GatewayError,
    NoCandidate,
    ProtectedRefused,
)
from gateway.gates import GATES
from gateway.types import Outcome


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
    furthest = max(gates, key=GATES.index) if gates else "zone"
    told, error, param = _REFUSALS.get(furthest, _UNAVAILABLE)
    return error(f"{told}: {detail}", param=param, retry_after=retry_after if error is NoCandidate else None)


_Told = tuple[str, type[GatewayError], str | None]
_UNAVAILABLE: _Told = ("no permitted deployment is available", NoCandidate, None)
_REFUSALS: Mapping[Gate, _Told] = {
    "caller": ("no deployment of this rule is allowed to this key", Forbidden, None),
    "zone": ("the request is protected and no permitted deployment can take it", ProtectedRefused, None),
    "capability": ("no permitted deployment supports what the request needs", BadRequest, None),
    "window": ("the request fits no permitted window", ContextLengthExceeded, "messages"),
    "limit": ("the limits of every permitted deployment are used up", NoCandidate, None),
    "cost_cap": ("no permitted deployment stays below the cost cap", CostCapExceeded, "x-hybridgate-max-cost-usd"),
}
