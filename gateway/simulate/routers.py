"""Who decides in the simulated world: a policy, by the server's own `decide`, and what a policy is compared with.

Owns the baselines: simple rules that others route by, as decisions of the same kind. All of them keep private requests
where the invariants want them. Refuses to know the world: a router sees facts and a snapshot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from gateway.decision import Candidate, Decision, Rejection
from gateway.estimate import likely_cost
from gateway.gates import static_gate
from gateway.policy import Policy
from gateway.routing import decide
from gateway.snapshot import Snapshot
from gateway.types import RequestFacts

THRESHOLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Requests in flight at an engine above which a threshold sends elsewhere: each is tried, and the best one told."""


class Router(Protocol):
    """What the world asks where a request goes."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def queues(self) -> bool:
        """Whether the engines' queues are without end in its world."""

    def decide(self, facts: RequestFacts, snapshot: Snapshot) -> Decision:
        """The chain of deployments to try. May raise GatewayError as `routing.decide` does."""


@dataclass(frozen=True, slots=True)
class PolicyRouter:
    """A policy, as the server follows it."""

    name: str
    policy: Policy
    queues: bool = False

    def decide(self, facts: RequestFacts, snapshot: Snapshot) -> Decision:
        return decide(self.policy, facts, snapshot)


class Baseline(ABC):
    """A rule that looks at no class, no price of an engine-second and no forecast.

    `engines` and `clouds` are deployments of the policy, those that cost least first. A request goes to what `_prefers`
    puts first of those that may take it; the rest is the failover chain. Engines work on what they get in order of
    arrival.
    """

    queues = False

    def __init__(self, name: str, policy: Policy, engines: Sequence[str], clouds: Sequence[str]) -> None:
        self.name = name
        self._policy = policy
        self._engines = tuple(engines)
        self._clouds = tuple(clouds)

    def decide(self, facts: RequestFacts, snapshot: Snapshot) -> Decision:
        policy = self._policy
        permit = policy.permit(facts)
        allowed: list[str] = []
        rejections: list[Rejection] = []
        for name in (*self._engines, *self._clouds):
            rejection = static_gate(policy.deployments[name], facts, permit)
            down = snapshot.deployments[name].down
            if rejection is None and down is not None:
                rejection = Rejection(name, "available", down)
            if rejection is None:
                allowed.append(name)
            else:
                rejections.append(rejection)
        chain = [
            Candidate(name, likely_cost(policy.deployments[name], facts), None, meets=True)
            for name in self._chain(allowed, snapshot)
        ]
        return Decision(self.name, "a baseline", tuple(chain), tuple(rejections), facts.labels, policy.hash)

    @abstractmethod
    def _chain(self, allowed: list[str], snapshot: Snapshot) -> list[str]:
        """The allowed deployments in this baseline's order."""

    def _least_busy(self, allowed: list[str], snapshot: Snapshot) -> list[str]:
        engines = [name for name in allowed if name in self._engines]
        return sorted(engines, key=lambda name: snapshot.deployments[name].in_flight)


class AlwaysLocal(Baseline):
    """Everything queues at the engines, however long that takes."""

    queues = True

    def _chain(self, allowed: list[str], snapshot: Snapshot) -> list[str]:
        return self._least_busy(allowed, snapshot)


class AlwaysCloud(Baseline):
    """Everything that may leave goes to the cheapest cloud, and to an engine only where none answers."""

    def _chain(self, allowed: list[str], snapshot: Snapshot) -> list[str]:
        return [*(name for name in allowed if name in self._clouds), *self._least_busy(allowed, snapshot)]


class Threshold(Baseline):
    """The engines until each has so many requests in flight, then the cheapest cloud."""

    def __init__(
        self, name: str, policy: Policy, engines: Sequence[str], clouds: Sequence[str], in_flight: int
    ) -> None:
        super().__init__(name, policy, engines, clouds)
        self._in_flight = in_flight

    def _chain(self, allowed: list[str], snapshot: Snapshot) -> list[str]:
        engines = self._least_busy(allowed, snapshot)
        clouds = [name for name in allowed if name in self._clouds]
        if engines and snapshot.deployments[engines[0]].in_flight < self._in_flight:
            return [*engines, *clouds]
        return [*clouds, *engines]


class RoundRobin(Baseline):
    """Each deployment in turn."""

    def __init__(self, name: str, policy: Policy, engines: Sequence[str], clouds: Sequence[str]) -> None:
        super().__init__(name, policy, engines, clouds)
        self._turn = count()

    def _chain(self, allowed: list[str], snapshot: Snapshot) -> list[str]:
        if not allowed:
            return []
        first = next(self._turn) % len(allowed)
        return allowed[first:] + allowed[:first]


def baselines(policy: Policy, engines: Sequence[str], clouds: Sequence[str]) -> list[Router]:
    """All baselines over these deployments of the policy; cheap ones first, by what a thousand tokens each way cost."""

    def price(name: str) -> float:
        known = policy.deployments[name].price
        return float("inf") if known is None else known.input + known.output

    engines, clouds = sorted(engines, key=price), sorted(clouds, key=price)
    made: list[Router] = [
        AlwaysLocal("always local", policy, engines, clouds),
        AlwaysCloud("always cloud", policy, engines, clouds),
        RoundRobin("round robin", policy, engines, clouds),
    ]
    made += [Threshold(f"threshold {most}", policy, engines, clouds, most) for most in THRESHOLDS]
    return made
