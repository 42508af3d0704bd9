"""What is known of one deployment now, and of the replicas that it has.

Owns who its replicas are, which of them gets a request, and how it all reads as a status. Times come in as arguments
(seconds of a monotonic clock). Refuses to know names, other deployments, and requests (`fleet.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from gateway.backlogs import EngineBacklog
from gateway.balance import Affinity, choose, key_of
from gateway.demand import Demand
from gateway.latencies import Latencies
from gateway.snapshot import CircuitState, DeploymentStatus
from gateway.targets import Member, Target
from gateway.types import Replica


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """What is known of one replica now."""

    replica: Replica
    ordinal: int
    up: bool
    in_flight: int
    busy: float | None


@dataclass(slots=True, eq=False)
class Standing(Target):
    """What is known of one deployment. `down` is set from outside (starting, stopped). Where there are `members`,
    circuits and backlogs are theirs; latencies are of all of them, since each may get the next request."""

    down: str | None = None
    down_retry_after: float = 1.0
    latencies: Latencies = field(default_factory=Latencies)
    demand: Demand = field(default_factory=Demand)
    members: dict[Replica, Member] = field(default_factory=dict)

    def forget(self) -> None:
        Target.forget(self)
        self.latencies = Latencies()

    def follow(self, replicas: Collection[Replica]) -> None:
        """These are its replicas from now on; what is known of one that stays is kept."""
        for gone in self.members.keys() - replicas:
            del self.members[gone]
        for replica in replicas:
            if replica not in self.members:
                taken = {member.ordinal for member in self.members.values()}
                ordinal = next(number for number in range(len(taken) + 1) if number not in taken)
                key = key_of(f"{replica.url} {replica.address or ''}")
                self.members[replica] = Member(replica=replica, ordinal=ordinal, key=key)

    def member_statuses(self, now: float) -> list[MemberStatus]:
        """Its replicas by ordinal; none where it has but one address."""
        members = sorted(self.members.values(), key=lambda member: member.ordinal)
        return [
            MemberStatus(
                member.replica,
                member.ordinal,
                member.able(now) and not member.silent,
                member.in_flight,
                None if member.engine is None else member.engine.busy(now),
            )
            for member in members
        ]

    def chosen(self, now: float, affinity: Affinity, tried: Collection[Replica]) -> Member:
        """The replica that gets a request: of those that answer, else of those that may be called, else of all."""
        members = [member for member in self.members.values() if member.replica not in tried]
        members = members or list(self.members.values())
        able = [member for member in members if member.able(now)] or members
        well = [member for member in able if not member.silent] or able
        return well[choose([m.key for m in well], lambda index: well[index].reading(now), affinity)]

    def status(
        self, engine: EngineBacklog | None, down: str | None, retry_after: float, circuit: CircuitState, now: float
    ) -> DeploymentStatus:
        """What is known of it, with the state of one engine of it."""
        latencies = self.latencies
        always = (
            down,
            retry_after if down else 0.0,
            circuit,
            self.in_flight,
            latencies.first_token_p95_ms,
            None if engine is None else engine.busy(now),
            latencies.by_size,
            latencies.per_token_p95_ms,
        )
        if engine is None:
            return DeploymentStatus(*always)
        demand = self.demand
        return DeploymentStatus(*always, engine.backlog(now), demand.price_nusd, demand.rooms, demand.dearest_nusd)
