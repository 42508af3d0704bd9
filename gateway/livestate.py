"""What a running gateway knows of its fleet, as JSON, and back: so that a decision can be explained against it.

Owns the document of `GET /state` on the admin port. Refuses keys, addresses and anything of a request. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gateway.policy import Policy
from gateway.record import fleet_from, status_to_record
from gateway.snapshot import DeploymentStatus, Snapshot


@dataclass(frozen=True, slots=True)
class LiveState:
    """A fleet as its gateway knew it. `windows` and `unavailable` are of every deployment there, None where a window is
    not known, or where nothing keeps it from being called."""

    policy_hash: str
    wall: float
    statuses: Mapping[str, DeploymentStatus]
    windows: Mapping[str, int | None]
    unavailable: Mapping[str, str | None]

    def in_policy(self, policy: Policy) -> tuple[Policy, Snapshot]:
        """The policy with what the gateway knows of its deployments, and the fleet. A deployment that the gateway does
        not have is up and not measured."""
        for name in policy.deployments.keys() & self.windows.keys():
            deployment = policy.deployments[name]
            known = replace(
                deployment, unavailable=self.unavailable[name], window=self.windows[name] or deployment.window
            )
            policy = policy.with_deployment(known)
        unknown = DeploymentStatus()
        statuses = {name: self.statuses.get(name, unknown) for name in policy.deployments}
        return policy, Snapshot(0.0, 0.0, statuses, self.wall)


def state_document(policy: Policy, snapshot: Snapshot) -> dict[str, Any]:
    """The document for the policy that is in use."""
    deployments = {
        deployment.name: {
            "zone": deployment.zone,
            "window": deployment.window,
            "unavailable": deployment.unavailable,
            "status": status_to_record(snapshot.deployments[deployment.name], snapshot.now),
        }
        for deployment in policy.deployments.values()
    }
    return {"policy": policy.hash, "wall": snapshot.wall, "deployments": deployments}


def state_from(document: Any) -> LiveState:
    """The state that a document tells. Raises ValueError where it is none."""
    try:
        deployments = document["deployments"]
        return LiveState(
            policy_hash=str(document["policy"]),
            wall=float(document["wall"]),
            statuses=fleet_from({name: told["status"] for name, told in deployments.items()}),
            windows={name: told["window"] for name, told in deployments.items()},
            unavailable={name: told["unavailable"] for name, told in deployments.items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"it is no state of a gateway ({type(error).__name__})") from None
